"""Learning from prepared samples: the work of the pretraining stages, annealing and fine-tuning."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Batch, Feed, MicroBatches
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.parallel.watchdog import Watchdog
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.guard import SPIKE_SIGMA, Guard
from megatron_mm.train.meter import Meter, Mishaps, module_grad_norms, module_rates
from megatron_mm.train.run import Place
from megatron_mm.train.step import CrossEntropy, StepResult, train_step
from megatron_mm.train.timing import StepTimer
from megatron_mm.train.validate import Validation


class LearningJob:
    """A run that learns from prepared samples (loop.py Job)."""

    wants_initial_weights = False
    spike_sigma = SPIKE_SIGMA

    def __init__(self, config: RunConfig, platform: Platform, data: PreparedData, tokenizer: ChatTokenizer):
        self._config, self._platform = config, platform
        gpu = platform.device().index  # None of a CPU
        self._dataset = MicroBatches(config, tokenizer, state.data_rank(), state.data_ranks(), gpu=gpu)
        self._validation = Validation(config, data, tokenizer, gpu) if config.train.validate_every is not None else None

    @property
    def fingerprint(self) -> str:
        """See Job."""
        return self._dataset.fingerprint

    def describe(self) -> str:
        """See Job."""
        plan = self._dataset.plan
        return f"data: {plan.num_samples:,} samples an epoch; {len(plan.left_out):,} do not fit and are left out"

    def look_at_initial_weights(self, chunks: Sequence[VisionLanguageModel]) -> None:
        """See Job."""

    def work(self, trainee: Trainee, guard: Guard, watchdog: Watchdog, warn: Callable[[str], None]) -> "Learning":
        """See Job."""
        del warn
        return Learning(self._config, self._platform, trainee, self._dataset, self._validation, guard, watchdog)


class Learning:
    """Batches, update, figures (run.py Work).

    Args:
        validation: on held-out samples, where it is asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        platform: Platform,
        trainee: Trainee,
        dataset: MicroBatches,
        validation: Validation | None,
        guard: Guard,
        watchdog: Watchdog,
    ):
        self._config, self._platform, self._trainee, self._dataset = config, platform, trainee, dataset
        self._validation, self._guard, self._watchdog = validation, guard, watchdog
        self._objective = CrossEntropy(len(dataset.parts))
        self._timer = StepTimer(platform.synchronize)
        self._timer.attach(trainee)
        self._meter = Meter(config, platform, dataset.parts)
        self._num_broken = 0

    def begin(self, place: Place) -> None:
        """See Work."""
        self._feed = Feed(
            self._dataset, place.data_step, self._config, place.data_step + self._config.train.steps - place.step
        )
        self._source: Iterator[list[Batch]] = iter(self._feed)
        self._meter.restart()

    def take_step(self, place: Place, *, is_logged: bool) -> tuple[StepResult, int]:
        """See Work."""
        self._watchdog.at(place.step + 1, "data")
        self._timer.measure(is_logged)
        before = self._feed.waited_seconds
        with self._timer.part("data"):
            batches = next(self._source)
        self._num_broken += sum(len(batch.broken) for batch in batches)
        self._watchdog.at(place.step + 1, "forward, backward and update")
        look = module_grad_norms if is_logged else None
        device = self._platform.device()
        result = train_step(self._trainee, batches, device, self._objective, self._guard.judge, look)
        self._meter.add(result, batches, self._feed.waited_seconds - before)
        return result, 1

    def metrics(self, place: Place, result: StepResult) -> dict[str, float]:
        """See Work."""
        part_seconds = self._timer.take()
        validated = {}
        if self._config.train.is_validated(place.step):
            assert self._validation is not None
            self._watchdog.at(place.step, "validation")
            validated = self._validation.run(self._trainee, self._platform.device())
        self._watchdog.at(place.step, "metrics")
        return validated | self._meter.metrics(
            result,
            part_seconds=part_seconds,
            rates=module_rates(self._config, self._trainee),
            grad_norms=result.module_norms,
            mishaps=Mishaps(self._guard.num_skipped, self._guard.num_rollbacks, self._num_broken),
        )

    def state(self) -> dict[str, Any]:
        """See Work: its place says all."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """See Work."""
