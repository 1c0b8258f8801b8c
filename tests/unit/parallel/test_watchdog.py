"""Who is said to hang where."""

import os

import pytest

from megatron_mm.parallel.watchdog import Beat, diagnose, watch
from tests.ranks import run_alone


def _beat(count: int, step: int, place: str) -> Beat:
    return Beat(count, step, place, "n1", 100)


def test_a_rank_that_beats_no_more_is_named_with_its_last_place() -> None:
    before = {0: _beat(5, 7, "forward"), 1: _beat(5, 6, "checkpoint"), 2: _beat(4, 7, "forward")}
    now = {0: _beat(9, 7, "forward"), 1: _beat(5, 6, "checkpoint"), 2: _beat(8, 7, "forward")}
    assert diagnose(before, now, 3) == "rank 1 does not answer, process 100 on n1; it was in checkpoint of step 6"


def test_ranks_that_live_are_told_apart_by_where_they_are() -> None:
    before = {rank: _beat(1, 7, "forward") for rank in range(4)}
    now = {rank: _beat(3, 7, "data" if rank == 2 else "forward") for rank in range(4)}
    assert diagnose(before, now, 4) == "rank 2 in data of step 7; rank 0, 1, 3 in forward of step 7"
    now = {rank: _beat(3, 7, "forward") for rank in range(4)}
    assert diagnose(before, now, 4) == "all ranks are in forward of step 7"


def test_a_rank_that_never_answered_is_named() -> None:
    before, now = {0: _beat(1, 0, "start")}, {0: _beat(3, 0, "start")}
    assert diagnose(before, now, 2) == "rank 1 has never answered"


def _hang() -> None:
    with watch(0.4) as watchdog:
        watchdog.at(3, "data")
        os.read(os.pipe()[0], 1)


def test_a_process_that_hangs_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="exit code 1"):
        run_alone(_hang)
    told = capfd.readouterr().err
    assert "no progress for 0.4 s: the run is in data of step 3" in told
    assert "_hang" in told  # the stack of the thread that hangs
