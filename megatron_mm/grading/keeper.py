"""A process that grades for another one, each answer in a fork of its own.

It has imported what grading needs, and nothing that runs threads or holds a device, so a fork of it is safe and costs
milliseconds; an answer that hangs, crashes or eats memory ends its own fork, and no answer finds anything that another
one has left behind. workers.py starts it as `python -P -m megatron_mm.grading.keeper ORDERS`.

On standard input a line of JSON for each answer, [answer, reference, question]; on standard output a line for each, a
`Verdict`. The first line of output is a `Verdict` too: that it can begin.
"""

import gc
import json
import math
import os
import resource
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from megatron_mm.config.errors import InputError
from megatron_mm.grading.quantities import Tolerance
from megatron_mm.grading.rewards import Failure, Plugin, RewardSpec
from megatron_mm.processes import end_with_parent

if TYPE_CHECKING:  # what grades needs no pydantic
    from megatron_mm.config.schema import RewardConfig

# A pipe takes as much at once or not at all.
_MAX_REPLY_BYTES = 4096
_MAX_NOTE_CHARS = 300
_OUT_OF_MEMORY_CODE = 3
# How often a fork is looked at that has had its time by the clock.
_LOOK_AGAIN_SECONDS = 0.5
# What the parser has met once it reads five times as fast the next time, and forks know what the keeper knows.
_WARM_UP = [
    (r"\frac{x^2-1}{\sqrt{2}}+3i", "1/2"),
    (r"2\sin x+\log_2 8", r"3\cdot 2^{-x}"),
    (r"e^{2x}-\pi!", r"|x|+\ln 2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    ("x^2+y^2=1", "2x+3y=6"),
    (r"x \ne 3", r"\binom{5}{2}"),
    ("(x+1)(x-1)", "x^2-1"),
    (r"(1,2)\cup(3,4)", r"(1,2)\cup(3,5)"),
    ("x<1", r"\{x \mid x \ge 2\}"),
    # Definitions of units, which take half a second to read.
    (r"3\sqrt{2} cm", "5 km"),
    ("25 °C, 10 apples", "5 kg/m^3, three kWh"),
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one answer may take; all of it is ours.

    Attributes:
        cpu_seconds: processor time. It does not grow where the machine is busy, so a right answer is not taken for one
            that hangs; answers of people take a tenth of a second at most.
        wall_seconds: by the clock, for one that sleeps when they are over, which only a plug-in does. One that has
            something to compute is given as long as the machine makes it wait for a processor.
        memory_bytes: beyond what the keeper itself has.
        answer_chars: longer answers are not looked at: MATH's longest reference has 159 characters.
        response_chars: the same for whole responses, which plug-ins get; 16K tokens have about 64,000.
    """

    cpu_seconds: float = 1.5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    answer_chars: int = 2000
    response_chars: int = 1_000_000

    @classmethod
    def of_config(cls, config: "RewardConfig") -> Self:
        """As a run's config has them; lengths are not in it."""
        return cls(config.cpu_seconds, config.wall_seconds, config.memory_mib * 2**20)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an answer.

    Attributes:
        value: 1 or 0 for right or wrong, or the reward of a plug-in.
        failure: None where the answer was graded.
        error: what the user gave us that is wrong; only before the first answer.
        cpu_seconds: of the fork.
        seconds: by the clock.
        peak_bytes: the fork's largest resident size.
    """

    value: float = 0.0
    failure: Failure | None = None
    note: str = ""
    error: str = ""
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> "Verdict":
        """As it was sent."""
        fields = json.loads(line)
        return cls(**{**fields, "failure": fields["failure"] and Failure(fields["failure"])})


@dataclass(frozen=True, slots=True)
class Orders:
    """What a keeper is started with.

    Attributes:
        parent: process id of the one that starts it.
    """

    spec: RewardSpec
    limits: Limits
    parent: int

    def argument(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_argument(cls, argument: str) -> "Orders":
        """From the command line."""
        fields: dict[str, Any] = json.loads(argument)
        spec = {**fields["spec"], "tolerance": Tolerance(**fields["spec"]["tolerance"])}
        return cls(RewardSpec(**spec), Limits(**fields["limits"]), fields["parent"])


def main() -> None:
    """Grade until standard input ends."""
    orders = Orders.of_argument(sys.argv[1])
    end_with_parent(orders.parent)
    # Answers have no business with ours.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    try:
        judge = orders.spec.judge()
    except InputError as error:
        target.write(Verdict(error=str(error)).line())
        return
    if not orders.spec.is_plugin:
        for answer, reference in _WARM_UP:
            judge(answer, reference, "")
    # What is here stays: collecting it in forks would only copy its pages.
    gc.collect()
    gc.freeze()
    # The parser complains about every answer that it cannot read.
    os.dup2(nowhere, 2)
    target.write(Verdict().line())
    for line in source:
        target.write(grade_in_fork(judge, json.loads(line), orders.limits).line())


def grade_in_fork(judge: Plugin, task: list[str], limits: Limits) -> Verdict:
    """Grade one answer in a fork, which is gone afterwards whatever it does."""
    started = time.monotonic()
    end, child_end = os.pipe()
    keeper = os.getpid()
    child = os.fork()
    if child == 0:
        _grade(judge, task, limits, keeper, child_end)
    os.close(child_end)
    try:
        in_time = _is_done(end, child, limits.wall_seconds)
        reply = os.read(end, _MAX_REPLY_BYTES) if in_time else b""
    finally:
        os.close(end)
        os.kill(child, signal.SIGKILL)  # has no effect on one that has ended
    _, status, usage = os.wait4(child, 0)
    value, failure, note = _outcome(reply, status, in_time)
    spent = usage.ru_utime + usage.ru_stime
    return Verdict(value, failure, note, "", spent, time.monotonic() - started, usage.ru_maxrss * 1024)


def _is_done(pipe: int, child: int, wall_seconds: float) -> bool:
    """Wait until a fork has answered or ended; False for one that sleeps when its time by the clock is over."""
    seconds = wall_seconds
    # A pipe is also ready when its other end is closed.
    while not select.select([pipe], [], [], seconds)[0]:
        # "pid (name) state ...": S sleeps and T is stopped. What runs, or waits for a processor or a disk, is
        # ended by its processor time.
        state = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        if state in "ST":
            return False
        seconds = _LOOK_AGAIN_SECONDS
    return True


def _grade(judge: Plugin, task: list[str], limits: Limits, keeper: int, pipe: int) -> NoReturn:
    """What the fork does."""
    code = 1
    try:
        end_with_parent(keeper)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        allowed = pages * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        # Unlike a handler of Python's, the signal's default action also ends C code that does not come back.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        value = float(judge(*task))
        signal.setitimer(signal.ITIMER_PROF, 0)
        note = "" if math.isfinite(value) else f"the reward is {value}"
        os.write(pipe, json.dumps([value if not note else 0.0, note]).encode())
        code = 0
    except MemoryError:
        code = _OUT_OF_MEMORY_CODE
    except BaseException as error:  # noqa: BLE001 - nothing that is raised here may leave the fork
        os.write(pipe, json.dumps([0.0, f"{type(error).__name__}: {error}"[:_MAX_NOTE_CHARS]]).encode())
    finally:
        os._exit(code)


def _outcome(reply: bytes, status: int, in_time: bool) -> tuple[float, Failure | None, str]:
    """Value, failure and note of a fork that has ended."""
    if reply:
        value, note = json.loads(reply)
        return value, Failure.CRASH if note else None, note
    if not in_time or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF):
        return 0.0, Failure.TIMEOUT, "took too long"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _OUT_OF_MEMORY_CODE:
        return 0.0, Failure.MEMORY, "took too much memory"
    return 0.0, Failure.CRASH, f"ended with status {os.waitstatus_to_exitcode(status)}"


if __name__ == "__main__":
    main()
