"""The steps of a run, whatever they do, and what stands between them: metrics, checkpoints, roll-backs, the end."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint import store
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.checkpoint.verify import newest_sound
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.parallel.watchdog import Watchdog
from megatron_mm.telemetry.run import Telemetry
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.export import export
from megatron_mm.train.guard import Guard
from megatron_mm.train.step import StepResult
from megatron_mm.train.stop import StopRequest


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped by a signal, and saved"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is.

    Attributes:
        step: steps done.
        data_step: steps of the plan that were used or passed over; ahead of `step` after a roll-back.
    """

    step: int
    data_step: int


class Work(Protocol):
    """What the steps of a run do."""

    def begin(self, place: Place) -> None:
        """Go on from here: at the start of a run, and after a roll-back."""
        ...

    def take_step(self, place: Place, *, is_logged: bool) -> tuple[StepResult, int]:
        """Take the step behind `place`; its result, and the steps of the plan that it used up."""
        ...

    def metrics(self, place: Place, result: StepResult) -> dict[str, float]:
        """Of the steps since the last ones, the same on every rank; all ranks ask after a logged step."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: plain values, the same on every rank."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; `begin` follows."""
        ...


@dataclass(slots=True)
class Run:
    """A run under way."""

    config: RunConfig
    platform: Platform
    tokenizer: ChatTokenizer
    trainee: Trainee
    work: Work
    guard: Guard
    saver: Saver
    telemetry: Telemetry
    watchdog: Watchdog
    stop: StopRequest
    place: Place

    def go(self) -> Outcome:
        """Take the steps that are left.

        Raises:
            InputError: updates are skipped again and again, and rolling back did not help; the data are damaged; the
                disk does not take the last checkpoint.
        """
        self.work.begin(self.place)
        while self.place.step < self.config.train.steps:
            result = self._take_step()
            if self.guard.gives_up:
                self._roll_back(result)
                continue
            self._after_step(result)
            self.watchdog.at(self.step, "agreement on stopping")
            if state.any_rank(self.stop.signal_name is not None, self.platform.device()):
                self._leave()
                return Outcome.STOPPED
        self._finish()
        return Outcome.DONE

    @property
    def step(self) -> int:
        """Steps done."""
        return self.place.step

    def _take_step(self) -> StepResult:
        result, used = self.work.take_step(self.place, is_logged=self.config.train.is_logged(self.step + 1))
        self.place = Place(self.step + 1, self.place.data_step + used)
        if result.skipped is not None:
            self.telemetry.warn(f"step {self.step}: no update, since {result.skipped}", step=self.step)
        return result

    def _after_step(self, result: StepResult) -> None:
        if self.config.train.is_logged(self.step):
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
        metrics = {"data_step": self.place.data_step, **self.work.metrics(self.place, result)}
        self.telemetry.log(self.step, metrics)

    def _save(self, *, wait: bool) -> None:
        self.watchdog.at(self.step, "checkpoint")
        progress = {
            "step": self.step,
            "data_step": self.place.data_step,
            "guard": self.guard.state(),
            "work": self.work.state(),
        }
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
        self.work.load(progress["work"])
        passed_over = self.step - progress["step"]
        self.telemetry.warn(
            f"step {self.step}: {config.max_skips} updates in a row were skipped; back to step {progress['step']}, and "
            f"the data of {passed_over} steps are passed over"
        )
        self.telemetry.rewind(progress["step"])
        # Not the data's: it goes on behind what led here.
        self.place = Place(progress["step"], self.place.data_step)
        self.trainee.set_step(self.step)
        self.work.begin(self.place)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 and self.step != self.config.train.steps
