"""The process that writes a checkpoint: what it does before it writes, and what becomes of one that hangs."""

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_mm.checkpoint.background import BackgroundWrite
from megatron_mm.checkpoint.snapshot import Failed, Written
from tests.runs import wait_until

STALL_SECONDS = 1.0


class _Snapshot:
    """Writes what it is told to."""

    def __init__(self, write: Callable[[], Written | Failed]):
        self.write = write


def _start(write: Callable[[], Written | Failed]) -> BackgroundWrite:
    snapshot: Any = _Snapshot(write)
    return BackgroundWrite(snapshot, STALL_SECONDS)


def _wait_for_a_lock() -> Failed:
    """That another thread of the parent held at the fork, and that nobody will give back."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return Failed("woke up")


def _spin() -> Failed:
    while True:
        pass


@pytest.mark.parametrize("hang", [_wait_for_a_lock, _spin])
def test_a_write_that_hangs_is_given_up_and_shows_where(
    hang: Callable[[], Failed], capfd: pytest.CaptureFixture[str]
) -> None:
    write = _start(hang)
    wait_until(write.is_done, seconds=60)
    assert write.outcome() == Failed(
        "the process that wrote stood still for 1 s (checkpoint.stall_seconds) and was killed; its stacks are in "
        "this rank's log"
    )
    assert f"in {hang.__name__}" in capfd.readouterr().err
    _, status = os.waitpid(write.process_id, 0)
    assert os.WTERMSIG(status) == 9


def _seldom() -> Written:
    """Like a disk that is slow: long waits, and hardly any work."""
    for _ in range(15):
        time.sleep(STALL_SECONDS / 10)
    return Written([], {})


def _much_work() -> Written:
    with open("/dev/null", "wb") as file:
        begin = time.process_time()
        while time.process_time() - begin < 1.5 * STALL_SECONDS:
            file.write(bytes(100_000))
    return Written([], {})


@pytest.mark.parametrize("write", [_seldom, _much_work])
def test_a_slow_write_is_waited_for(write: Callable[[], Written]) -> None:
    assert _start(write).outcome() == Written([], {})


def test_the_process_never_collects_what_is_its_parents() -> None:
    collected: list[int] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            collected.append(os.getpid())

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        write = _start(lambda: Failed(str(collected.count(os.getpid()))))
        assert write.outcome() == Failed("0")
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert gc.isenabled()
