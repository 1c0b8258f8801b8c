"""The parts of a step's time: they add up, whatever stands within what, and cost nothing where none is measured."""

import re
import time
from pathlib import Path

import megatron.core
import pytest

from megatron_mm.train.timing import _MEGATRON_TIMERS, PARTS, StepTimer

PAUSE = 0.02


class _Device:
    """Counts how often it is waited for."""

    num_waits = 0

    def synchronize(self) -> None:
        self.num_waits += 1


def test_parts_within_parts_add_up_to_the_step() -> None:
    timer = StepTimer(_Device().synchronize)
    before = time.monotonic()
    timer.measure(True)
    began = time.monotonic()
    with timer.part("data"):
        time.sleep(PAUSE)
    timer("forward-backward", log_level=1).start(barrier=True)
    timer("forward-compute", log_level=2).start()
    time.sleep(2 * PAUSE)
    timer("forward-compute").stop()
    timer("forward-backward").stop()
    with timer.part("optimizer"):
        time.sleep(PAUSE)
        timer("params-all-gather", log_level=1).start()
        time.sleep(3 * PAUSE)
        timer("params-all-gather").stop()
    time.sleep(PAUSE)
    ended = time.monotonic()
    seconds = timer.take()
    after = time.monotonic()
    assert ended - began <= sum(seconds.values()) <= after - before
    least = {"data": 1, "forward": 2, "optimizer": 1, "communication": 3, "other": 1}
    assert all(seconds[part] >= pauses * PAUSE for part, pauses in least.items()), seconds
    # What is within a part is not charged to it as well.
    assert seconds["optimizer"] <= ended - began - (least["communication"] + 4) * PAUSE
    assert seconds["backward"] == 0
    assert set(timer.take().values()) == {0.0}


def test_a_step_that_is_not_measured_waits_for_nothing() -> None:
    device = _Device()
    timer = StepTimer(device.synchronize)
    for _ in range(3):
        timer.measure(False)
        with timer.part("data"):
            timer("forward-compute", log_level=2).start()
            timer("forward-compute").stop()
    assert device.num_waits == 0
    assert timer.take() == dict.fromkeys(PARTS, 0.0)
    timer.measure(True)
    with timer.part("data"):
        pass
    timer.take()
    # Around the step and around the part.
    assert device.num_waits == 4


def test_measured_steps_before_one_that_is_not_are_kept() -> None:
    timer = StepTimer(_Device().synchronize)
    timer.measure(True)
    with timer.part("data"):
        time.sleep(PAUSE)
    timer.measure(False)
    time.sleep(PAUSE)
    timer.measure(True)
    with timer.part("data"):
        time.sleep(PAUSE)
    seconds = timer.take()
    assert seconds["data"] >= 2 * PAUSE


def test_the_time_of_day_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StepTimer(_Device().synchronize)
    timer.measure(True)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with timer.part("data"):
        time.sleep(PAUSE)
    assert timer.take()["data"] >= PAUSE


def test_an_error_within_a_part_comes_through_and_leaves_no_part_open() -> None:
    timer = StepTimer(_Device().synchronize)
    timer.measure(True)

    def fails() -> None:
        with timer.part("data"):
            timer("forward-compute", log_level=2).start()
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        fails()
    time.sleep(PAUSE)
    seconds = timer.take()
    assert seconds["other"] >= PAUSE


def test_a_timer_that_ends_within_another_is_an_error_of_ours() -> None:
    timer = StepTimer(_Device().synchronize)
    timer.measure(True)
    timer("forward-compute", log_level=2).start()
    timer("all-grads-sync", log_level=1).start()
    with pytest.raises(AssertionError, match="forward ends within communication"):
        timer("forward-compute").stop()


def test_every_timer_of_megatron_core_has_its_part() -> None:
    sources = Path(megatron.core.__file__).parent.rglob("*.py")
    names = {name for path in sources for name in re.findall(r"timers\(\s*'([a-z0-9-]+)'", path.read_text())}
    assert names == _MEGATRON_TIMERS.keys()
