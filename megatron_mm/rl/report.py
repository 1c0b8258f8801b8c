"""What steps of reinforcement learning did: figures for the log line, and the responses themselves."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from megatron_mm.chat import modes
from megatron_mm.chat.modes import Mode
from megatron_mm.parallel import state
from megatron_mm.rl.exchange import Exchange
from megatron_mm.rl.experience import Rollout
from megatron_mm.rl.update import METRICS
from megatron_mm.train.step import StepResult

ROLLOUTS = "rollouts"


class Report:
    """Collects figures over the steps since the last log line; the same on every rank, but for seconds."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what is collected: after a log line, or a roll-back."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._num_steps, self._began = 0, time.monotonic()

    def note(self, **values: float) -> None:
        """Figures whose mean over the steps is wanted; of those called /max the largest."""
        for name, value in values.items():
            self._values[name].append(value)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What the block takes belongs to a part of the step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - began

    def count_draw(self, flat: Sequence[bool]) -> None:
        """A global batch was drawn, with these prompts that tell no response from another."""
        self.note(flat_groups=sum(flat) / len(flat))

    def note_update(self, result: StepResult) -> None:
        """An update was made."""
        for name, (total, number) in zip(METRICS, result.sums.tolist(), strict=True):
            self.note(**{name: total / number})

    def note_exchange(self, exchange: Exchange) -> None:
        """Weights were handed over."""
        speed = exchange.num_bytes / max(exchange.load_seconds, 1e-9) / 1e9
        self.note(**{"exchange/bytes": exchange.num_bytes, "exchange/gb_per_second": speed})

    def take_in(self, parts: Sequence[Sequence[Sequence[Rollout]]], advantages: Sequence[Tensor]) -> None:
        """The responses of a step's updates, and their advantages, group by group."""
        self._num_steps += 1
        rollouts = [one for part in parts for group in part for one in group]
        credit = [float(one) for part in advantages for one in part]
        failures = [one.grade.failure for one in rollouts if one.grade.failure is not None]
        self.note(
            grading_failures=len(failures) / len(rollouts), truncated=_share(not one.finished for one in rollouts)
        )
        self.note(reward=sum(one.grade.reward for one in rollouts) / len(rollouts))
        for mode in Mode:
            of_mode = [one for one in rollouts if one.mode is mode]
            if not of_mode:
                continue
            credited = sum(value for one, value in zip(rollouts, credit, strict=True) if one.mode is mode)
            self.note(**{f"advantage/{mode}": credited / len(of_mode)})
            self.note(**{f"reward/{mode}": sum(one.grade.reward for one in of_mode) / len(of_mode)})
            tokens = sum(len(one.given) + len(one.drawn) for one in of_mode)
            self.note(**{f"response_tokens/{mode}": tokens / len(of_mode)})
            if mode is Mode.AUTO:
                self.note(think_rate=_share(modes.begins_thought(one.text) for one in of_mode))
            if mode is Mode.NON_THINKING:
                self.note(leak_rate=_share(_leaks(one) for one in of_mode))

    def metrics(self) -> dict[str, float]:
        """The figures; collecting starts anew."""
        found = {
            name: max(values) if name.endswith("/max") else sum(values) / len(values)
            for name, values in self._values.items()
        }
        steps = max(self._num_steps, 1)
        elapsed = time.monotonic() - self._began
        seconds = {f"time/{part}": taken / steps for part, taken in self._seconds.items()}
        seconds |= {"time/step": elapsed / steps, "time/other": (elapsed - sum(self._seconds.values())) / steps}
        self.restart()
        return {**found, **{name: float(f"{value:.6g}") for name, value in seconds.items()}}


def write_rollouts(
    run_dir: Path,
    step: int,
    parts: Sequence[Sequence[Sequence[Rollout]]],
    advantages: Sequence[Tensor],
) -> None:
    """Write the responses of a step to RUN/rollouts, one a line; pictures are named by their sample."""
    if not state.writes():
        return
    lines = []
    for part, credit in zip(parts, advantages, strict=True):
        rollouts = [one for group in part for one in group]
        for one, advantage in zip(rollouts, credit.tolist(), strict=True):
            lines.append(
                {
                    **asdict(one.wording),
                    "mode": str(one.mode),
                    "response": one.text,
                    "tokens": len(one.drawn),
                    "finished": one.finished,
                    "reward": one.grade.reward,
                    "failure": one.grade.failure,
                    "advantage": advantage,
                }
            )
    file = run_dir / ROLLOUTS / f"step_{step:08d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, file)


def _leaks(rollout: Rollout) -> bool:
    """Whether a response that was to be without thought has one behind the empty thought."""
    behind = rollout.text.removeprefix(modes.TRIGGERS[Mode.NON_THINKING])
    return modes.THINK in behind or modes.END_THINK in behind


def _share(flags: Iterator[bool]) -> float:
    found = list(flags)
    return sum(found) / len(found)
