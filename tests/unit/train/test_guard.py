"""Which updates are skipped, and when a run gives up."""

import math

import pytest

from megatron_mm.config.schema import GuardConfig
from megatron_mm.rl.job import ReinforceJob
from megatron_mm.train.guard import Guard


def _settled(**settings: float) -> Guard:
    """A guard that has seen a window of losses around 2 and norms around 1."""
    guard = Guard(GuardConfig(spike_window=20, max_skips=3, **settings))  # pyright: ignore[reportArgumentType]
    for number in range(20):
        assert guard.judge(2 + 0.1 * (-1) ** number, 1 + 0.05 * (-1) ** number) is None
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step(value: float) -> None:
    guard = Guard(GuardConfig(spike_sigma=0))
    assert guard.judge(value, 1.0) == f"the loss is {value}"
    assert guard.judge(1.0, value) == f"the gradient norm is {value}"
    assert guard.num_skipped == 2


def test_spikes_are_told_by_mean_and_deviation() -> None:
    # Mean 2 and deviation 0.1 of the losses, 1 and 0.05 of the norms; six deviations away is the bound.
    assert _settled().judge(2.59, 1.29) is None
    assert "loss 2.61 is a spike" in str(_settled().judge(2.61, 1.0))
    assert "gradient norm 1.31 is a spike" in str(_settled().judge(2.0, 1.31))
    assert _settled().judge(0.1, 0.01) is None  # falling is no spike
    assert _settled(spike_sigma=0).judge(100.0, 100.0) is None


def test_losses_that_are_nearly_nothing_do_not_spike() -> None:
    learned = [0.0002, 0.0001] * 10
    guard = Guard(GuardConfig(spike_window=20, max_skips=1))
    assert [guard.judge(loss, 1.0) for loss in (*learned, 0.0155, 0.0998)] == [None] * 22
    assert "loss 0.31 is a spike" in str(guard.judge(0.31, 1.0))
    asked = Guard(GuardConfig(spike_window=20, spike_rise=0.01))
    assert [asked.judge(loss, 1.0) for loss in (*learned, 0.0099)] == [None] * 21
    assert "loss 0.0155 is a spike" in str(asked.judge(0.0155, 1.0))
    # The rise is a loss's: a norm has no unit.
    assert asked.judge(0.0001, 1.001) is not None


def test_kinds_of_runs_differ_in_what_a_spike_is_and_the_config_has_the_last_word() -> None:
    for asked, skipped in ((None, False), (6.0, True)):
        guard = Guard(GuardConfig(spike_window=2, spike_sigma=asked), ReinforceJob.spike_sigma)
        assert [guard.judge(loss, loss) is None for loss in (0.1, 0.1, 5.0)] == [True, True, not skipped]
        assert guard.judge(math.nan, 1.0) is not None


def test_spikes_are_told_once_half_a_window_is_known() -> None:
    guard = Guard(GuardConfig(spike_window=20))
    for _ in range(9):
        assert guard.judge(2.0, 1.0) is None
    assert guard.judge(50.0, 1.0) is None
    guard = Guard(GuardConfig(spike_window=20))
    for _ in range(10):
        assert guard.judge(2.0, 1.0) is None
    assert guard.judge(50.0, 1.0) is not None


def test_a_skipped_step_is_not_remembered_and_some_in_a_row_give_up() -> None:
    guard = _settled()
    for number in range(3):
        assert guard.is_steady == (number == 0)
        assert not guard.gives_up
        assert guard.judge(100.0, 1.0) is not None
    assert guard.gives_up
    assert guard.num_skipped == 3
    other = _settled()
    for loss in (100.0, 100.0, 2.0, 100.0, 100.0):
        other.judge(loss, 1.0)
    assert not other.gives_up
    assert other.num_skipped == 4


@pytest.mark.parametrize("window", [20, 128, 1000])
def test_gradients_that_stay_large_are_no_spike_any_more(window: int) -> None:
    guard = Guard(GuardConfig(spike_window=window, max_skips=1))
    for number in range(window):
        guard.judge(2.0, 1 + 0.05 * (-1) ** number)
    skipped = []
    for _ in range(window // 4):
        skipped.append(guard.judge(2.0, 5.0) is not None)
        # Nothing tells against the weights: checkpoints go on, and there is nothing to roll back for.
        assert guard.is_steady
        assert not guard.gives_up
    assert skipped[0]
    assert not skipped[-1]
    assert sum(skipped) <= 1 + window // 36  # (window - n) / n is the square of the deviations of n equal outliers
    assert guard.num_skipped == sum(skipped)
    # Larger still is a spike again, and so is a loss.
    assert guard.judge(2.0, 1e3) is not None
    assert guard.judge(2.5, 5.0) is not None
    assert guard.gives_up


def test_a_resumed_guard_judges_as_the_one_before() -> None:
    guard = _settled()
    guard.judge(100.0, 1.0)
    resumed = Guard(GuardConfig(spike_window=20, max_skips=3))
    resumed.load(guard.state())
    losses = [2.3, 2.7, 100.0, 2.2, 2.65, 3.0, 3.0, 3.0]
    assert [guard.judge(loss, 1.0) for loss in losses] == [resumed.judge(loss, 1.0) for loss in losses]
    assert guard.state() == resumed.state()


def test_a_roll_back_forgets_the_row_but_not_the_counts() -> None:
    guard = _settled()
    state = guard.state()
    for _ in range(3):
        guard.judge(math.nan, 1.0)
    guard.roll_back(state)
    assert not guard.gives_up
    assert (guard.num_skipped, guard.num_rollbacks) == (3, 1)
    assert guard.state() == {**state, "num_skipped": 3, "num_rollbacks": 1}
