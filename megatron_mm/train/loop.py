"""A whole run: weights in, steps, checkpoints out."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.checkpoint import store
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.checkpoint.verify import newest_sound
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER, PreparedData
from megatron_mm.files import in_use
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform, get_platform
from megatron_mm.parallel.watchdog import Watchdog, watch
from megatron_mm.telemetry.run import Telemetry
from megatron_mm.train.assemble import Trainee, build_trainee
from megatron_mm.train.check import DATA_PLAN, check_data_plan, check_inputs
from megatron_mm.train.guard import Guard
from megatron_mm.train.initial import initial_weights, load_initial
from megatron_mm.train.learning import LearningJob
from megatron_mm.train.run import Outcome, Place, Run, Work
from megatron_mm.train.stop import StopRequest, stop_signals

_LONGER_THAN_WATCHDOG = 300.0


class Job(Protocol):
    """A kind of run."""

    @property
    def wants_initial_weights(self) -> bool:
        """Whether it looks at the weights that the run began with whenever it is started."""
        ...

    @property
    def spike_sigma(self) -> float:
        """What guard.spike_sigma is where it is left out."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the whole sequence of data that its steps use."""
        ...

    def describe(self) -> str:
        """A line for the user about its data."""
        ...

    def look_at_initial_weights(self, chunks: Sequence[VisionLanguageModel]) -> None:
        """Called while the model has the weights that the run began with."""
        ...

    def work(self, trainee: Trainee, guard: Guard, watchdog: Watchdog, warn: Callable[[str], None]) -> Work:
        """What its steps do; `warn` takes what the user should know of them."""
        ...


MakeJob = Callable[[RunConfig, Platform, PreparedData, ChatTokenizer], Job]


def train(config: RunConfig, make_job: MakeJob = LearningJob) -> Outcome:
    """Run this rank's part of a run; continues it where the run directory holds a checkpoint.

    SIGUSR1, SIGTERM and SIGINT make it save and return early. Use in the main thread.

    Args:
        make_job: of the data; left out, the run learns from samples.

    Raises:
        InputError: the layout does not fit, data or the checkpoint to start from are missing or damaged, another run
            uses the directory, or the run cannot go on (see Run.go).
    """
    check_inputs(config, state.num_ranks())
    platform = get_platform(config.platform)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        timeout = longest_wait(config)
        stack.enter_context(state.process_group(platform, timeout))
        watchdog = stack.enter_context(watch(config.guard.hang_seconds))
        if state.writes():
            stack.enter_context(in_use(config.run_dir))
        dist.barrier()
        groups = stack.enter_context(state.model_parallel(config.parallel, config.seed, timeout))
        run = _begin(config, platform, groups, stop, watchdog, make_job)
        try:
            outcome = run.go()
            if outcome is Outcome.DONE:
                run.telemetry.done(_following(config))
            return outcome
        finally:
            run.telemetry.close()


def _following(config: RunConfig) -> str:
    """What a user does with a run that is done."""
    form = "" if config.model.projector.pre_norm else " --format llava_onevision"
    return f"megatron-mm export {shlex.quote(str(config.run_dir))} DIR{form}"


def longest_wait(config: RunConfig) -> float:
    """Seconds after which a collective gives up, unlike the watchdog without a word of which rank hangs where."""
    return max(state.TIMEOUT_SECONDS, config.guard.hang_seconds + _LONGER_THAN_WATCHDOG)


def _begin(
    config: RunConfig,
    platform: Platform,
    groups: ProcessGroupCollection,
    stop: StopRequest,
    watchdog: Watchdog,
    make_job: MakeJob,
) -> Run:
    """A run with its weights in place, from a checkpoint of its own where there is one."""
    assert config.data.path is not None
    data = PreparedData(config.data.path)
    tokenizer = data.tokenizer()
    job = make_job(config, platform, data, tokenizer)
    chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
    checkpoint = newest_sound(config.run_dir, verify=config.checkpoint.verify)
    if checkpoint is not None:
        check_data_plan(config.run_dir, job.fingerprint)
    if checkpoint is None or job.wants_initial_weights:
        initial = initial_weights(config, begins=checkpoint is None, writes=state.writes())
        if initial is not None:
            load_initial(config, initial, chunks)
    job.look_at_initial_weights(chunks)
    saver = Saver(config.run_dir, config.checkpoint, longest_wait(config))
    trainee = build_trainee(config, chunks, groups, overlap=platform.overlaps_collectives)
    guard, place = Guard(config.guard, job.spike_sigma), Place(0, 0)
    progress = None if checkpoint is None else store.resume(checkpoint, chunks, trainee.optimizer)
    if progress is not None:
        place = Place(progress["step"], progress["data_step"])
        guard.load(progress["guard"])
        trainee.set_step(place.step)
    telemetry = Telemetry(config, writes=state.writes(), first_step=place.step)
    if state.writes():
        (config.run_dir / DATA_PLAN).write_text(job.fingerprint + "\n", encoding="utf-8")
        tokenizer.save(config.run_dir / TOKENIZER)  # what the weights' ids mean goes with them
    telemetry.say(_greeting(config, platform, trainee, place.step))
    telemetry.say(job.describe())
    work = job.work(trainee, guard, watchdog, telemetry.warn)
    if progress is not None:
        work.load(progress["work"])
    return Run(config, platform, tokenizer, trainee, work, guard, saver, telemetry, watchdog, stop, place)


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
