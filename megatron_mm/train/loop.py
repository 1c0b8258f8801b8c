"""A whole training run: weights in, steps, checkpoints out."""

import time

import torch.distributed as dist

from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.checkpoint import store
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.checkpoint.verify import newest_sound
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Feed, MicroBatches
from megatron_mm.data.shards import TOKENIZER, PreparedData
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform, get_platform
from megatron_mm.telemetry.run import Telemetry
from megatron_mm.train.assemble import Trainee, build_trainee
from megatron_mm.train.check import DATA_PLAN, check_data_plan, check_inputs
from megatron_mm.train.initial import load_initial
from megatron_mm.train.step import StepResult, train_step


def train(config: RunConfig) -> None:
    """Run this rank's part of a training run; continues it where the run directory holds a checkpoint.

    Raises:
        InputError: the layout does not fit, or data or the checkpoint to start from are missing or damaged.
    """
    check_inputs(config, state.num_ranks())
    platform = get_platform(config.platform)
    assert config.data.path is not None
    tokenizer = PreparedData(config.data.path).tokenizer()
    with state.process_group(platform), state.model_parallel(config.parallel, config.seed) as groups:
        dataset = MicroBatches(config, tokenizer, state.data_rank(), state.data_ranks())
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        checkpoint = newest_sound(config.run_dir, verify=config.checkpoint.verify)
        if checkpoint is not None:
            check_data_plan(config.run_dir, dataset.fingerprint)
        elif config.init_from is not None:
            load_initial(config, config.init_from, chunks)
        trainee = build_trainee(config, chunks, groups)
        first_step = 0
        if checkpoint is not None:
            first_step = store.resume(checkpoint, chunks, trainee.optimizer)["step"]
            trainee.scheduler.step(first_step)
        telemetry = Telemetry(config, writes=state.writes())
        if state.writes():
            (config.run_dir / DATA_PLAN).write_text(dataset.fingerprint + "\n", encoding="utf-8")
            tokenizer.save(config.run_dir / TOKENIZER)  # what the weights' ids mean goes with them
        telemetry.say(_greeting(config, platform, trainee, first_step))
        plan = dataset.plan
        telemetry.say(
            f"data: {plan.num_samples:,} samples an epoch; {len(plan.left_out):,} do not fit and are left out"
        )
        feed = Feed(dataset, first_step, config)
        _steps(config, trainee, feed, first_step, platform, telemetry)
        telemetry.close()


def _steps(
    config: RunConfig,
    trainee: Trainee,
    feed: Feed,
    first_step: int,
    platform: Platform,
    telemetry: Telemetry,
) -> None:
    started, tokens, waited = time.monotonic(), 0, 0.0
    saver = Saver(config.run_dir, config.checkpoint)
    for step, batches in enumerate(feed, first_step + 1):
        result = train_step(trainee, batches, platform.device())
        tokens += sum(batch.num_tokens for batch in batches) * state.data_ranks()
        last = step == config.train.steps
        if step % config.train.log_every == 0 or last:
            seconds = time.monotonic() - started
            waiting = (feed.waited_seconds - waited) / seconds
            telemetry.log(step, _metrics(result, tokens / seconds, waiting, feed.num_broken))
            started, tokens, waited = time.monotonic(), 0, feed.waited_seconds
        if step % config.checkpoint.save_every == 0 or last:
            saver.save(step, trainee.chunks, trainee.optimizer, {}, wait=last)
        saver.poll()


def _metrics(result: StepResult, tokens_per_second: float, data_wait: float, num_broken: int) -> dict[str, float]:
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": round(tokens_per_second),
        "data_wait": round(data_wait, 4),
        "broken_samples": num_broken,
    }


def _greeting(config: RunConfig, platform: Platform, trainee: Trainee, first_step: int) -> str:
    parallel = config.parallel
    degrees = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": state.data_ranks(),
    }
    layout = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
    if parallel.expert > 1:
        layout += f", experts over {parallel.expert}"
    trained = ", ".join(f"{module} {count:,}" for module, count in trainee.num_trained.items())
    start = f"resuming at step {first_step}" if first_step else f"weights from {config.init_from or 'seed'}"
    return (
        f"{config.recipe} on {platform.describe()}; {dist.get_world_size()} ranks: {layout}; {start}\n"
        f"trained parameters: {trained}"
    )
