"""The steps of a run, and what stands between them: metrics, checkpoints, roll-backs, the end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint import store
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.checkpoint.verify import newest_sound
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Batch, Feed, MicroBatches
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.parallel.watchdog import Watchdog
from megatron_mm.telemetry.run import Telemetry
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.export import export
from megatron_mm.train.guard import Guard
from megatron_mm.train.meter import Meter, Mishaps, module_grad_norms, module_rates
from megatron_mm.train.step import CrossEntropy, StepResult, train_step
from megatron_mm.train.stop import StopRequest
from megatron_mm.train.timing import StepTimer
from megatron_mm.train.validate import Validation


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped by a signal, and saved"


@dataclass(slots=True)
class Run:
    """A run under way.

    Attributes:
        step: steps done.
        data_step: steps of the plan that were used or passed over; ahead of `step` after a roll-back.
        num_broken: damaged samples that this rank has met since it began.
    """

    config: RunConfig
    platform: Platform
    tokenizer: ChatTokenizer
    trainee: Trainee
    dataset: MicroBatches
    validation: Validation | None
    guard: Guard
    saver: Saver
    telemetry: Telemetry
    watchdog: Watchdog
    stop: StopRequest
    meter: Meter
    timer: StepTimer
    step: int = 0
    data_step: int = 0
    num_broken: int = 0

    def go(self) -> Outcome:
        """Take the steps that are left.

        Raises:
            InputError: updates are skipped again and again, and rolling back did not help; the data are damaged; the
                disk does not take the last checkpoint.
        """
        while self.step < self.config.train.steps:
            for batches, waited_seconds in self._batches():
                result = self._take_step(batches, waited_seconds)
                if self.guard.gives_up:
                    self._roll_back(result)
                    break  # batches go on behind those that led there
                self._after_step(result)
                self.watchdog.at(self.step, "agreement on stopping")
                if state.any_rank(self.stop.signal_name is not None, self.platform.device()):
                    self._leave()
                    return Outcome.STOPPED
        self._finish()
        return Outcome.DONE

    def _batches(self) -> Iterator[tuple[list[Batch], float]]:
        """Batches of the steps that are left, and the seconds that were waited for them."""
        left = self.config.train.steps - self.step
        feed = Feed(self.dataset, self.data_step, self.config, self.data_step + left)
        source = iter(feed)
        for _ in range(left):
            self.watchdog.at(self.step + 1, "data")
            self.timer.measure(self._is_logged(self.step + 1))
            before = feed.waited_seconds
            with self.timer.part("data"):
                batches = next(source)
            self.num_broken += sum(len(batch.broken) for batch in batches)
            yield batches, feed.waited_seconds - before

    def _take_step(self, batches: Sequence[Batch], waited_seconds: float) -> StepResult:
        self.watchdog.at(self.step + 1, "forward, backward and update")
        look = module_grad_norms if self._is_logged(self.step + 1) else None
        device, objective = self.platform.device(), CrossEntropy(len(self.dataset.parts))
        result = train_step(self.trainee, batches, device, objective, self.guard.judge, look)
        self.step += 1
        self.data_step += 1
        self.meter.add(result, batches, waited_seconds)
        if result.skipped is not None:
            self.telemetry.warn(f"step {self.step}: no update, since {result.skipped}", step=self.step)
        return result

    def _after_step(self, result: StepResult) -> None:
        if self._is_logged(self.step):
            self._log(result)
        every = self.config.checkpoint
        if self._is_due(every.save_every) and self.guard.is_steady:
            self._save(wait=False)
        if every.export_every is not None and self._is_due(every.export_every):
            self.watchdog.at(self.step, "export")
            fault = export(self.config, self.step, self.trainee, self.tokenizer)
            if fault is not None:
                self.telemetry.warn(fault)
        self.watchdog.at(self.step, "checkpoint")
        self.saver.poll()

    def _log(self, result: StepResult) -> None:
        part_seconds = self.timer.take()
        metrics = {"data_step": self.data_step}
        if self._is_validated(self.step):
            assert self.validation is not None
            self.watchdog.at(self.step, "validation")
            metrics |= self.validation.run(self.trainee, self.platform.device())
        self.watchdog.at(self.step, "metrics")
        metrics |= self.meter.metrics(
            result,
            part_seconds=part_seconds,
            rates=module_rates(self.config, self.trainee),
            grad_norms=result.module_norms,
            mishaps=Mishaps(self.guard.num_skipped, self.guard.num_rollbacks, self.num_broken),
        )
        self.telemetry.log(self.step, metrics)

    def _save(self, *, wait: bool) -> None:
        self.watchdog.at(self.step, "checkpoint")
        progress = {"step": self.step, "data_step": self.data_step, "guard": self.guard.state()}
        self.saver.save(self.step, self.trainee.chunks, self.trainee.optimizer, progress, wait=wait)

    def _finish(self) -> None:
        """Leave with everything saved."""
        self.watchdog.at(self.step, "checkpoint")
        self.saver.finish()
        if self.saver.last_saved != self.step:
            self._save(wait=True)

    def _leave(self) -> None:
        self._finish()
        self.telemetry.warn(
            f"{self.stop.signal_name or 'a signal to another rank'}: saved after step {self.step}, leaving"
        )

    def _roll_back(self, result: StepResult) -> None:
        """Back to the last checkpoint, and on with the data behind those that led here.

        PaLM (arXiv 2204.02311, section 5.1) got over its spikes so.
        """
        guard, config = self.guard, self.config.guard
        self.watchdog.at(self.step, "roll-back")
        self.saver.finish()
        checkpoint = newest_sound(self.config.run_dir, verify=self.config.checkpoint.verify)
        if guard.num_rollbacks == config.max_rollbacks or checkpoint is None:
            reason = f"{guard.num_rollbacks} roll-backs did not help" if checkpoint else "there is no checkpoint yet"
            raise InputError(
                f"{config.max_skips} updates in a row were skipped up to step {self.step}, the last one since "
                f"{result.skipped}, and {reason}; lower optim.lr, look at the data of these steps, or raise "
                "guard.spike_sigma"
            )
        progress = store.resume(checkpoint, self.trainee.chunks, self.trainee.optimizer)
        guard.roll_back(progress["guard"])
        passed_over = self.step - progress["step"]
        self.telemetry.warn(
            f"step {self.step}: {config.max_skips} updates in a row were skipped; back to step {progress['step']}, and "
            f"the data of {passed_over} steps are passed over"
        )
        self.telemetry.rewind(progress["step"])
        self.step = progress["step"]
        self.trainee.set_step(self.step)
        self.meter.restart()

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 and self.step != self.config.train.steps

    def _is_validated(self, step: int) -> bool:
        every = self.config.train.validate_every
        return every is not None and (step % every == 0 or step == self.config.train.steps)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.config.train.steps or self._is_validated(step)
