"""Model -> DDP, optimizer, schedule."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_mm.config.schema import RunConfig
from megatron_mm.models.freeze import freeze_all_but
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import VisionLanguageModel


@dataclass(slots=True)
class Trainee:
    """A model that can be trained.

    Attributes:
        model: the bare model, whose parameters checkpoints and exports name.
        ddp: what the schedules call.
        num_trained: trained parameters of each module on this rank.
    """

    model: VisionLanguageModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    num_trained: dict[str, int]


def build_trainee(config: RunConfig, model: VisionLanguageModel, groups: ProcessGroupCollection) -> Trainee:
    """Wrap a model, whose weights are already in place, for training.

    The optimizer copies fp32 master weights when it is made, so weights loaded later would be lost.
    """
    num_trained = freeze_all_but(model, config.train.trained)
    bf16 = config.precision == "bf16"
    wrapped = Float16Module(model.config, model) if bf16 else model
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=True
        ),
        wrapped,
        pg_collection=groups,
    )
    ddp.broadcast_params()
    optimizer = get_megatron_optimizer(_optimizer_config(config), [ddp])
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return Trainee(model, ddp, optimizer, _scheduler(config, optimizer), num_trained)


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    optim = config.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        clip_grad=optim.clip_grad,
        bf16=config.precision == "bf16",
        params_dtype=DTYPES[config.precision],
        # Its checkpoints can be read by itself only, so it is used with one data-parallel rank as well.
        use_distributed_optimizer=True,
    )


def _scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    optim, steps = config.optim, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
