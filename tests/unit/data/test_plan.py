"""The plan is a pure function of its inputs, holds its weights, and walks every part through."""

import numpy as np
import pytest

from megatron_mm.data.plan import WINDOW, Plan

PARTS = {"a": np.arange(0, 700), "b": np.arange(1000, 1050), "c": np.arange(2000, 2003)}
WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1.0}


def _plan(seed: int = 3, global_batch: int = 64) -> Plan:
    return Plan(PARTS, WEIGHTS, seed, global_batch)


def test_any_step_is_found_without_the_steps_before_it() -> None:
    plan = _plan()
    walked = [plan.batch(step) for step in range(150)]
    for step in (149, 0, 63, 64, 70):
        assert np.array_equal(_plan().batch(step), walked[step])
    assert not np.array_equal(_plan(seed=4).batch(0), walked[0])


def test_the_stream_does_not_depend_on_the_batch_size() -> None:
    small = np.concatenate([_plan(global_batch=48).batch(step) for step in range(200)])
    large = np.concatenate([_plan(global_batch=96).batch(step) for step in range(100)])
    assert np.array_equal(small, large)


def test_weights_hold_in_every_window() -> None:
    batches = np.concatenate([_plan(global_batch=WINDOW).batch(step) for step in range(3)])
    for window in batches.reshape(3, WINDOW):
        assert [np.isin(window, rows).sum() for rows in PARTS.values()] == [2048, 1024, 1024]


def test_every_sample_of_a_part_is_seen_once_an_epoch() -> None:
    rows = np.concatenate([_plan(global_batch=WINDOW).batch(step) for step in range(4)])
    counts = {row: int((rows == row).sum()) for part in PARTS.values() for row in part}
    for name, part in PARTS.items():
        seen = [counts[row] for row in part]
        assert max(seen) - min(seen) <= 1, name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_batch_out(ranks: int) -> None:
    batch = _plan().batch(5)
    shares = [batch[rank::ranks] for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
