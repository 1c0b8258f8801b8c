"""Grading in processes of its own: whatever an answer does, the run goes on and the answer gets 0.

Formats are told here, by splitting, in a time that grows with the response and not faster; so only answers travel, and
only those that are not the reference to the letter. What may take any time or memory is done in a keeper's forks.
"""

import json
import math
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megatron_mm.config.errors import InputError
from megatron_mm.grading.keeper import Limits, Orders, Verdict
from megatron_mm.grading.rewards import Failure, Grade, RewardSpec, Submission

if TYPE_CHECKING:  # what grades needs no pydantic
    from megatron_mm.config.schema import RewardConfig

# Importing and reading units takes four seconds of a processor; a shared file system or a crowded machine, minutes.
_START_SECONDS = 600.0
# A keeper ends its forks itself; one that is so late is stopped. Far more than a busy machine makes an answer wait.
_LATE_SECONDS = 600.0
# Keepers end for no answer's sake. One that is killed is started again; so often in a row, something is wrong.
_MAX_STARTS = 3
_MAX_TRIES = 2


@dataclass(slots=True)
class Tally:
    """What a pool has done so far.

    Attributes:
        num_compared: answers that a worker has looked at.
        failures: by kind.
        num_lost_keepers: keepers that were gone or late, and for which others were started.
        slowest_seconds: by the clock, of one answer.
        slowest_cpu_seconds: processor time of one answer.
        peak_bytes: largest resident size of a fork.
    """

    num_graded: int = 0
    num_compared: int = 0
    failures: Counter[Failure] = field(default_factory=Counter)
    num_lost_keepers: int = 0
    slowest_seconds: float = 0.0
    slowest_cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def add(self, verdict: Verdict) -> None:
        """Count an answer that a worker has looked at."""
        self.num_compared += 1
        self.slowest_seconds = max(self.slowest_seconds, verdict.seconds)
        self.slowest_cpu_seconds = max(self.slowest_cpu_seconds, verdict.cpu_seconds)
        self.peak_bytes = max(self.peak_bytes, verdict.peak_bytes)


class Graders:
    """A pool of processes that grade; a context manager, which leaves none behind.

    The thread that opens it has to live as long, for the kernel ends children with the thread that started them.

    Attributes:
        tally: what was done so far.

    Raises:
        InputError: the plug-in of the spec cannot be loaded.
    """

    def __init__(self, spec: RewardSpec, num_workers: int = 2, limits: Limits | None = None):
        self._spec = spec
        self._limits = limits or Limits()
        self.tally = Tally()
        self._selector = selectors.DefaultSelector()
        self._num_failed_starts = 0
        self._keepers: list[_Keeper] = []
        try:
            for _ in range(num_workers):
                self._start()
            while any(keeper.is_starting for keeper in self._keepers):
                self._step({}, deque())
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_config(cls, config: "RewardConfig") -> Self:
        """As a run's config has them."""
        return cls(RewardSpec.of_config(config), config.num_workers, Limits.of_config(config))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        while self._keepers:
            self._end(self._keepers[0])
        self._selector.close()

    def grade(self, submissions: Sequence[Submission]) -> list[Grade]:
        """Grade responses, in their order."""
        answers = [self._extracted(one) for one in submissions]
        verdicts, compared = dict[int, Verdict](), []
        for index, (one, answer) in enumerate(zip(submissions, answers, strict=True)):
            if answer.failure is None and answer.text is not None:
                is_right = None if self._spec.is_plugin else self._spec.settled(answer.text, one)
                if is_right is None:
                    compared.append(index)
                else:
                    verdicts[index] = Verdict(value=float(is_right))
        tasks = [
            json.dumps([answers[index].text, submissions[index].reference, submissions[index].question])
            for index in compared
        ]
        verdicts |= zip(compared, self._run(tasks), strict=True)
        grades = [self._grade(answer, verdicts.get(index)) for index, answer in enumerate(answers)]
        self.tally.num_graded += len(grades)
        self.tally.failures.update(grade.failure for grade in grades if grade.failure is not None)
        return grades

    def _extracted(self, submission: Submission) -> "_Extracted":
        if self._spec.is_plugin:
            text, allowed = submission.response, self._limits.response_chars
            format_right = False
        else:
            format_right, text = self._spec.answer_of(submission)
            allowed = self._limits.answer_chars
        too_long = text is not None and len(text) > allowed
        return _Extracted(format_right, text, Failure.TOO_LONG if too_long else None)

    def _grade(self, answer: "_Extracted", verdict: Verdict | None) -> Grade:
        failure = answer.failure if verdict is None else verdict.failure
        note = "" if verdict is None else verdict.note
        if self._spec.is_plugin:
            return Grade(0.0 if failure or verdict is None else verdict.value, None, None, failure, note)
        is_right = verdict is not None and verdict.value > 0 and failure is None
        return Grade(self._spec.reward(answer.format_right, is_right), answer.format_right, is_right, failure, note)

    def _run(self, tasks: list[str]) -> list[Verdict]:
        """Verdicts on the tasks, in their order."""
        verdicts: dict[int, Verdict] = {}
        waiting = deque(_Task(index, f"{line}\n".encode()) for index, line in enumerate(tasks))
        try:
            while len(verdicts) < len(tasks):
                self._step(verdicts, waiting)
        except BaseException:
            # Keepers that are at work would answer the next batch with this one's verdicts.
            self.close()
            raise
        return [verdicts[index] for index in range(len(tasks))]

    def _step(self, verdicts: dict[int, Verdict], waiting: "deque[_Task]") -> None:
        """Hand out tasks, and wait until something comes back or a keeper is late."""
        for keeper in self._keepers:
            if waiting and keeper.is_idle:
                keeper.take(waiting.popleft(), self._limits.wall_seconds + _LATE_SECONDS)
                self._selector.modify(keeper.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, keeper)
        deadline = min(keeper.deadline for keeper in self._keepers)
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for key, events in self._selector.select(wait):
            keeper: _Keeper = key.data
            try:
                if events & selectors.EVENT_WRITE and keeper.send():
                    self._selector.modify(keeper.socket, selectors.EVENT_READ, keeper)
                line = keeper.receive() if events & selectors.EVENT_READ else None
            except ConnectionError:
                self._replace(keeper, verdicts, waiting)
                continue
            if line is not None:
                self._note(keeper, Verdict.of_line(line), verdicts)
        for keeper in [keeper for keeper in self._keepers if keeper.deadline < time.monotonic()]:
            self._replace(keeper, verdicts, waiting)

    def _note(self, keeper: "_Keeper", verdict: Verdict, verdicts: dict[int, Verdict]) -> None:
        if verdict.error:
            raise InputError(verdict.error)
        task = keeper.done()
        if task is None:
            self._num_failed_starts = 0
        else:
            self.tally.add(verdict)
            verdicts[task.index] = verdict

    def _replace(self, keeper: "_Keeper", verdicts: dict[int, Verdict], waiting: "deque[_Task]") -> None:
        """Start another keeper for one that is gone or late, and have its answer tried once more."""
        if keeper.is_starting:
            self._num_failed_starts += 1
            if self._num_failed_starts == _MAX_STARTS:
                raise RuntimeError(f"grading processes end before they can begin:\n{keeper.last_words()}")
        self.tally.num_lost_keepers += 1
        self._end(keeper)
        self._start()
        if keeper.task is not None and keeper.task.num_tries == _MAX_TRIES:
            verdicts[keeper.task.index] = Verdict(failure=Failure.CRASH, note="the grading process was killed")
        elif keeper.task is not None:
            waiting.appendleft(keeper.task)

    def _start(self) -> None:
        keeper = _Keeper(Orders(self._spec, self._limits, os.getpid()))
        self._keepers.append(keeper)
        self._selector.register(keeper.socket, selectors.EVENT_READ, keeper)

    def _end(self, keeper: "_Keeper") -> None:
        self._keepers.remove(keeper)
        self._selector.unregister(keeper.socket)
        keeper.end()


@dataclass(frozen=True, slots=True)
class _Extracted:
    """What is to be compared, None where nothing is."""

    format_right: bool
    text: str | None
    failure: Failure | None


@dataclass(slots=True)
class _Task:
    """An answer on its way."""

    index: int
    line: bytes
    num_tries: int = 0


class _Keeper:
    """A keeper's process, seen from here.

    Attributes:
        socket: both its standard input and its standard output; never blocks.
        is_starting: whether it has not said yet that it can begin.
        task: what it is at.
        deadline: on the monotonic clock, for its next line.
    """

    def __init__(self, orders: Orders):
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        with theirs:
            # Not multiprocessing's spawn, which would import the program that we are part of, and torch with it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_mm.grading.keeper", orders.argument()],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._errors,
                env=_environment(),
            )
        self.is_starting = True
        self.task: _Task | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._unsent = memoryview(b"")
        self._received = bytearray()

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.task is None

    def take(self, task: _Task, seconds: float) -> None:
        task.num_tries += 1
        self.task, self._unsent, self.deadline = task, memoryview(task.line), time.monotonic() + seconds

    def send(self) -> bool:
        """Send what the socket takes; whether nothing is left."""
        self._unsent = self._unsent[self.socket.send(self._unsent) :]
        return not self._unsent

    def receive(self) -> bytes | None:
        """The keeper's line, once it is whole."""
        received = self.socket.recv(2**16)
        if not received:
            raise ConnectionResetError
        self._received += received
        if not self._received.endswith(b"\n"):
            return None
        line = bytes(self._received)
        self._received.clear()
        return line

    def done(self) -> _Task | None:
        """Take note that it has answered; to which task, None where it has only begun."""
        task, self.task = self.task, None
        self.is_starting, self.deadline = False, math.inf
        return task

    def last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]

    def end(self) -> None:
        """Kill it, and the kernel kills its fork: neither has anything to save."""
        self._process.kill()
        self._process.wait()
        self.socket.close()
        self._errors.close()


def _environment() -> dict[str, str]:
    """Ours, with our modules; and with hashes that do not change, by which sympy orders some things."""
    paths = [os.path.abspath(path) for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
