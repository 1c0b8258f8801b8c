"""Model -> DDP, optimizer, schedule."""

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_mm.config.schema import RunConfig
from megatron_mm.models.freeze import freeze_all_but, module_of, num_trained
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import VisionLanguageModel


@dataclass(slots=True)
class Trainee:
    """A model that can be trained.

    Attributes:
        chunks: the bare model chunks of this rank, whose parameters checkpoints and exports name.
        ddp: what the schedules call, one a chunk.
        num_trained: trained parameters of each module over the whole model.
    """

    chunks: list[VisionLanguageModel]
    ddp: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    num_trained: dict[str, int]

    def set_step(self, step: int) -> None:
        """Have the learning rates of a run that has done `step` steps."""
        self.scheduler.num_steps = 0
        self.scheduler.step(step)


def build_trainee(
    config: RunConfig,
    chunks: list[VisionLanguageModel],
    groups: ProcessGroupCollection,
    *,
    overlap: bool = False,
) -> Trainee:
    """Wrap a model, whose weights are already in place, for training.

    The optimizer copies fp32 master weights when it is made, so weights loaded later would be lost.

    Args:
        overlap: what optim.overlap is where it is left out (Platform.overlaps_collectives).
    """
    freeze_all_but(chunks, config.train.trained)
    if config.optim.overlap is not None:
        overlap = config.optim.overlap
    ddp: list[Any] = [_wrapped(config, chunk, groups, overlap=overlap) for chunk in chunks]
    settings = _optimizer_config(config)
    optimizer = get_megatron_optimizer(settings, ddp, _rates(config, settings))
    assert isinstance(optimizer, ChainedOptimizer), "Megatron-Core chains even a single one"
    # One config serves all chunks.
    megatron = chunks[0].config
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss
    if overlap:
        for chunk in chunks:
            chunk.encodes_blank_tile = True
        # Gradients are whole after a step's last micro-batch; until then the schedules hold their collectives back.
        held_back: Any = [chunk.no_sync for chunk in ddp]
        megatron.no_sync_func = held_back if len(ddp) > 1 else held_back[0]
    return Trainee(chunks, ddp, optimizer, make_scheduler(config, optimizer), num_trained(chunks))


def _wrapped(
    config: RunConfig, chunk: VisionLanguageModel, groups: ProcessGroupCollection, *, overlap: bool
) -> DistributedDataParallel:
    ddp = DistributedDataParallel(
        chunk.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.optim.distributed,
            # A bucket's collective begins when all its gradients are there, so each parameter that learns must get one
            # in the last micro-batch of every step, on every rank (models/vlm.py encodes_blank_tile).
            overlap_grad_reduce=overlap,
            # Updated weights are gathered before the step ends: gathered in the next forward pass, they would be stale
            # for exports, checkpoints, the weight sync and the reference model of RL, which read them in between.
            overlap_param_gather=False,
            # train/guard.py skips such steps; this would end the run.
            check_for_nan_in_grad=False,
        ),
        Float16Module(chunk.config, chunk) if config.precision == "bf16" else chunk,
        pg_collection=groups,
    )
    ddp.broadcast_params()
    return ddp


def _rates(config: RunConfig, settings: OptimizerConfig) -> dict[ParamKey, Any]:
    """Megatron-Core's overrides of parameter groups: no decay of vectors, and the rates of single modules."""
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(settings)
    for module, rate in config.optim.modules.items():
        belongs = ParamWithNamePredicate(module, lambda _, name, module=module: module_of(_bare(name)) == module)
        min_lr = rate.lr if rate.min_lr is None else rate.min_lr
        overrides[ParamKey(with_name_predicate=belongs)] = {"max_lr": rate.lr, "min_lr": min_lr}
    return overrides


def _bare(name: str) -> str:
    """A parameter's name without its wrappers'."""
    return name.removeprefix("module.").removeprefix("module.")


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
        use_distributed_optimizer=config.optim.distributed,
    )


def make_scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """The learning rates and weight decay of a run's steps."""
    optim, steps = config.optim, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if optim.schedule == "wsd" else optim.schedule,
        wsd_decay_steps=optim.decay_steps,
        lr_wsd_decay_style="linear",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )
