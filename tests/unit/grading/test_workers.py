"""Nothing that an answer does stops the run, reaches another answer or stays behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RewardConfig
from megatron_mm.grading.keeper import Limits
from megatron_mm.grading.rewards import Failure, Grade, RewardSpec, Submission
from megatron_mm.grading.workers import Graders
from tests import runs
from tests.graders import install_plugin, keepers_of
from tests.hostile import fuzzed, hostile

# Less than what real answers get, or the hostile ones would take minutes here.
LIMITS = Limits(cpu_seconds=0.3)
# Takes minutes, whatever it is compared with.
HANGS = "99999999!"
MISDEEDS = """
import ctypes, os, signal, sys, time

def pay(response, reference, question):
    started = time.process_time()
    if response == "hang":
        while True: pass
    if response == "sleep": time.sleep(1000)
    if response == "block":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGALRM})
        9 ** 9 ** 9
    if response == "segfault": ctypes.string_at(0)
    if response == "exit": os._exit(0)
    if response == "leave": sys.exit(0)
    if response == "abort": os.abort()
    if response == "bomb":
        hoard = []
        while True: hoard.append(bytearray(2 ** 24))
    if response == "some memory": bytearray(2 ** 26)
    if response == "some work":
        while time.process_time() < started + 0.8: pass
    if response == "some time": time.sleep(1)
    if response == "swallowed bomb":
        try: bytearray(2 ** 40)
        except MemoryError: return 0.25
    if response == "deep":
        deeper = lambda: deeper()
        deeper()
    if response == "raise": raise ValueError("no such answer" * 1000)
    if response == "nan": return float("nan")
    if response == "text": return "much"
    if response == "print": print("noise" * 10000, flush=True); os.write(1, b"noise"); os.write(2, b"noise")
    if response == "read": return float(len(sys.stdin.read()))
    if response == "remember":
        pay.seen = getattr(pay, "seen", 0) + 1
        return float(pay.seen)
    if response == "modules": return float(any(name in sys.modules for name in ("torch", "transformers", "vllm")))
    if response == "kill keeper":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    if response == "kill keeper once" and not os.path.exists(reference):
        open(reference, "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    return 0.5
"""


def _asked(answer: str, reference: str = r"\frac{3}{7}x+2") -> Submission:
    return Submission(f"<think>\n\n</think>\n\n{answer}", reference)


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(RewardSpec(format="think"), 2, LIMITS) as pool:
        yield pool


@pytest.fixture
def misdeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graders]:
    """Graders whose plug-in does what the response says."""
    install_plugin(tmp_path, monkeypatch, MISDEEDS)
    limits = Limits(cpu_seconds=0.3, wall_seconds=3.0, memory_bytes=128 * 2**20)
    with Graders(RewardSpec(name="planted"), 2, limits) as pool:
        yield pool


def test_a_run_says_what_an_answer_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch, MISDEEDS)
    tasks = [Submission(f"some {what}", "") for what in ("memory", "work", "time")]
    with Graders.of_config(RewardConfig(name="planted")) as pool:
        assert _failures(pool.grade(tasks)) == [None] * 3
    strict = {"memory_mib": 32, "cpu_seconds": 0.4, "wall_seconds": 0.5}
    for task, name in zip(tasks, strict, strict=True):
        with Graders.of_config(RewardConfig(**{"name": "planted", name: strict[name]})) as pool:
            (failure,) = _failures(pool.grade([task]))
        assert failure == (Failure.MEMORY if name == "memory_mib" else Failure.TIMEOUT), name
    assert Limits.of_config(RewardConfig()) == Limits()


def test_time_by_the_clock_ends_only_what_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch, MISDEEDS)
    with Graders(RewardSpec(name="planted"), 1, Limits(cpu_seconds=5.0, wall_seconds=0.2)) as pool:
        grades = pool.grade([Submission(f"some {what}", "") for what in ("work", "time")])
    assert _failures(grades) == [None, Failure.TIMEOUT]


def _failures(grades: list[Grade]) -> list[Failure | None]:
    return [grade.failure for grade in grades]


def test_order_is_kept_and_right_is_right(graders: Graders) -> None:
    answers = [(str(number), str(number + number % 2)) for number in range(40)]
    answers += [
        ("1/2", r"\frac{1}{2}"),
        (HANGS, "3"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\sqrt{6}", r"2\sqrt{2}"),
    ]
    grades = graders.grade([_asked(*one) for one in answers])
    assert [grade.reward for grade in grades[:40]] == [1.0, 0.0] * 20
    assert [grade.reward for grade in grades[40:]] == [1.0, 0.0, 1.0, 0.0]
    assert _failures(grades) == [None] * 41 + [Failure.TIMEOUT, None, None]
    assert all(grade.format_right for grade in grades)
    assert graders.grade([]) == []


def test_a_wrong_format_is_paid_nothing(graders: Graders) -> None:
    (grade,) = graders.grade([Submission("7", "7")])
    assert grade == Grade(0.0, False, False)


def test_hostile_and_fuzzed_strings(graders: Graders) -> None:
    graders.tally.failures.clear()
    strings = [*hostile(), *fuzzed(1000, seed=0)]
    grades = graders.grade([_asked(string) for string in strings])
    assert len(grades) == len(strings)
    assert [string for string, grade in zip(strings, grades, strict=True) if grade.reward] == []
    assert {grade.failure for grade in grades} <= {
        None,
        Failure.TIMEOUT,
        Failure.MEMORY,
        Failure.TOO_LONG,
        Failure.CRASH,
    }
    # Million-character strings, and powers that take longer than anything.
    assert graders.tally.failures[Failure.TOO_LONG] >= 17
    assert graders.tally.failures[Failure.TIMEOUT] >= 10
    assert graders.tally.failures.total() == sum(grade.failure is not None for grade in grades)
    assert graders.tally.slowest_cpu_seconds < LIMITS.cpu_seconds + 0.2
    assert graders.tally.peak_bytes < LIMITS.memory_bytes + 200 * 2**20
    assert graders.tally.num_lost_keepers == 0
    assert graders.grade([_asked("0.5", "1/2")])[0].reward == 1.0


def test_a_long_response_with_a_short_answer_is_graded(graders: Graders) -> None:
    thought = "wait, " * 200_000
    (grade,) = graders.grade([Submission(f"<think>\n{thought}\n</think>\n\n0.5", "1/2")])
    assert grade == Grade(1.0, True, True)


def test_a_long_answer_is_not_looked_at(graders: Graders) -> None:
    compared = graders.tally.num_compared
    grades = graders.grade([_asked("0" * (LIMITS.answer_chars + 1), "0"), _asked("7" * 10_000, "7" * 10_000)])
    assert _failures(grades) == [Failure.TOO_LONG] * 2
    assert [grade.reward for grade in grades] == [0.0, 0.0]
    assert graders.tally.num_compared == compared


def test_weighted_pays_the_format_of_an_answer_that_fails() -> None:
    with Graders(RewardSpec(name="weighted"), 1, LIMITS) as pool:
        bodies = [HANGS, "0.5", "0.6"]
        tagged = [Submission(f"<think>a</think><answer>{body}</answer>", "1/2") for body in bodies]
        loose = [Submission(f"<answer>{body}</answer>", "1/2") for body in bodies]
        grades = pool.grade([*tagged, *loose])
    assert [grade.reward for grade in grades] == [0.5, 1.0, 0.5, 0.0, 0.5, 0.0]
    assert _failures(grades) == [Failure.TIMEOUT, None, None] * 2


@pytest.mark.parametrize(
    ("response", "reward", "failure", "note"),
    [
        ("fine", 0.5, None, ""),
        ("hang", 0.0, Failure.TIMEOUT, "too long"),
        ("block", 0.0, Failure.TIMEOUT, "too long"),
        ("sleep", 0.0, Failure.TIMEOUT, "too long"),
        ("segfault", 0.0, Failure.CRASH, "status -11"),
        ("exit", 0.0, Failure.CRASH, "status 0"),
        ("leave", 0.0, Failure.CRASH, "SystemExit"),
        ("abort", 0.0, Failure.CRASH, "status -6"),
        ("bomb", 0.0, Failure.MEMORY, "memory"),
        ("swallowed bomb", 0.25, None, ""),
        ("deep", 0.0, Failure.CRASH, "RecursionError"),
        ("raise", 0.0, Failure.CRASH, "ValueError: no such answer"),
        ("nan", 0.0, Failure.CRASH, "nan"),
        ("text", 0.0, Failure.CRASH, "ValueError"),
        ("print", 0.5, None, ""),
        ("read", 0.0, None, ""),
        ("modules", 0.0, None, ""),
        ("fine" * 250_001, 0.0, Failure.TOO_LONG, ""),
        ("kill keeper", 0.0, Failure.CRASH, "killed"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_misdeeds(misdeeds: Graders, response: str, reward: float, failure: Failure | None, note: str) -> None:
    grades = misdeeds.grade([Submission(text, "") for text in ("fine", response, "fine", "fine")])
    assert [grade.reward for grade in grades] == [0.5, reward, 0.5, 0.5]
    assert _failures(grades) == [None, failure, None, None]
    assert note in grades[1].note
    assert len(grades[1].note) <= 300
    assert misdeeds.tally.failures.total() == (failure is not None)
    assert misdeeds.tally.slowest_cpu_seconds < 0.5


def test_answers_do_not_know_of_each_other(misdeeds: Graders) -> None:
    grades = misdeeds.grade([Submission("remember", "")] * 5)
    assert [grade.reward for grade in grades] == [1.0] * 5


def test_an_answer_whose_keeper_was_killed_is_tried_again(misdeeds: Graders, tmp_path: Path) -> None:
    grades = misdeeds.grade([Submission("kill keeper once", str(tmp_path / "done")), Submission("fine", "")])
    assert [grade.reward for grade in grades] == [0.5, 0.5]
    assert misdeeds.tally.num_lost_keepers == 1
    assert not misdeeds.tally.failures


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_keepers_killed_from_outside_are_started_again(graders: Graders, number: int) -> None:
    # The second time, one has answered and the other one may still be starting.
    for _ in range(2):
        lost, killed = graders.tally.num_lost_keepers, keepers_of(os.getpid())
        for keeper in killed:
            os.kill(keeper, number)
        runs.wait_until(lambda killed=killed: not {*killed} & {*keepers_of(os.getpid())}, seconds=20)
        assert graders.grade([_asked("0.5", "1/2")] * 4) == [Grade(1.0, True, True)] * 4
        assert graders.tally.num_lost_keepers == lost + 2
    busy = threading.Timer(0.2, lambda: [os.kill(keeper, number) for keeper in keepers_of(os.getpid())])
    busy.start()
    grades = graders.grade([_asked(HANGS, "3")] * 2 + [_asked("0.5", "1/2")] * 4)
    busy.join()
    assert [grade.reward for grade in grades] == [0.0] * 2 + [1.0] * 4


def test_keepers_that_cannot_begin_are_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pint.py").write_text("raise OSError('disk is gone')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="disk is gone"):
        Graders(RewardSpec(), 2)


def test_a_plugin_that_cannot_be_loaded_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, monkeypatch, "import no_such_module")
    before = keepers_of(os.getpid())
    with pytest.raises(InputError, match="no_such_module"):
        Graders(RewardSpec(name="planted"), 2)
    assert sorted(keepers_of(os.getpid())) == sorted(before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_nothing_is_left_behind() -> None:
    before = keepers_of(os.getpid())
    files = set(os.listdir("/proc/self/fd"))
    with Graders(RewardSpec(format="think"), 2, LIMITS) as pool:
        assert len(keepers_of(os.getpid())) == len(before) + 2
        interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            pool.grade([_asked(HANGS, "3")] * 20)
        # At once: they are in the middle of something that nobody waits for any more.
        runs.wait_until(lambda: sorted(keepers_of(os.getpid())) == sorted(before), seconds=20)
    assert set(os.listdir("/proc/self/fd")) == files


def test_processes_die_with_the_parent() -> None:
    program = (
        "from megatron_mm.grading.keeper import Limits\n"
        "from tests.unit.grading.test_workers import HANGS, Graders, RewardSpec, _asked\n"
        "pool = Graders(RewardSpec(format='think'), 2, Limits(cpu_seconds=100, wall_seconds=100))\n"
        "print('begun', flush=True)\n"
        "pool.grade([_asked(HANGS, '3')] * 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        runs.wait_until(lambda: len(keepers_of(parent.pid)) == 4, seconds=20)  # two keepers with a fork each
        parent.kill()
    runs.wait_until(lambda: not keepers_of(parent.pid), seconds=20)
