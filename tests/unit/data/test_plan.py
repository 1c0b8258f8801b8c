"""The plan is a pure function of its inputs, holds its weights, sees every sample once an epoch, packs and balances."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mm.config.errors import InputError
from megatron_mm.data import plan as plan_module
from megatron_mm.data.index import Index
from megatron_mm.data.packing import best_fit
from megatron_mm.data.plan import Plan, balanced, plan_of_run
from tests.datasets import plan_for, stage_like_lengths, synthetic_index
from tests.tiny import tiny_config

PARTS = {"a/thinking": [20] * 700, "b/thinking": [20] * 50, "c/document": [20] * 3}
WEIGHTS = "{a/*: 2, b/thinking: 1, c/*: 1}"
PACKED = {"data__packed": "true", "data__max_sequence_tokens": 256, "model__language__max_positions": 256}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return synthetic_index(tmp_path_factory.mktemp("index"), PARTS)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """3,000 samples of 4 to 250 tokens."""
    return synthetic_index(tmp_path_factory.mktemp("varied"), {"v/thinking": stage_like_lengths(3000, 250)})


def _plan(index: Index, **overrides: object) -> Plan:
    return plan_for(index, tiny_config(**{"train__global_batch": 64, "data__blend": WEIGHTS, **overrides}))


def _rows(plan: Plan, step: int) -> list[int]:
    return plan.global_batch(step).rows.tolist()


@pytest.mark.parametrize("packed", [{}, PACKED], ids=["padded", "packed"])
def test_any_step_is_found_without_the_steps_before_it(index: Index, packed: dict[str, object]) -> None:
    plan = _plan(index, **packed)
    walked = [_rows(plan, step) for step in range(60)]
    for step in (59, 0, 12, 11, 40):
        assert _rows(_plan(index, **packed), step) == walked[step]
    assert _rows(_plan(index, seed=4, **packed), 0) != walked[0]


def test_the_stream_does_not_depend_on_the_batch_size(varied: Index) -> None:
    overrides = {"data__blend": "{}", **PACKED}
    small = [row for step in range(20) for row in _rows(_plan(varied, train__global_batch=8, **overrides), step)]
    large = [row for step in range(10) for row in _rows(_plan(varied, train__global_batch=16, **overrides), step)]
    assert small == large


def test_weights_hold(index: Index) -> None:
    plan = _plan(index, train__global_batch=753)
    rows = np.concatenate([plan.global_batch(step).rows for step in range(8)])
    names = Counter(index.part_of(row) for row in rows.tolist())
    total = 8 * 753
    assert names["a/thinking"] == pytest.approx(total / 2, abs=1)
    assert names["b/thinking"] == pytest.approx(total / 4, abs=1)
    assert names["c/document"] == pytest.approx(total / 4, abs=1)


def test_every_sample_of_a_weighted_part_is_seen_once_an_epoch(index: Index) -> None:
    plan = _plan(index, train__global_batch=753)
    counts = Counter(row for step in range(8) for row in _rows(plan, step))
    for part in index.ranges("train"):
        seen = [counts[row] for row in range(part.first, part.first + part.count)]
        assert max(seen) - min(seen) <= 1, part


@pytest.mark.parametrize("packed", [{}, PACKED], ids=["padded", "packed"])
def test_without_weights_epochs_end_where_windows_do(
    varied: Index, packed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 700)
    plan = _plan(varied, data__blend="{}", **packed)
    windows = plan.epoch_windows()
    assert windows == 5
    orders, firsts = [], []
    for epoch in range(2):
        firsts.append(set(plan.units(epoch * windows).rows.tolist()))
        units = [plan.units(window) for window in range(epoch * windows, (epoch + 1) * windows)]
        rows = np.concatenate([some.rows for some in units])
        assert sorted(rows.tolist()) == list(range(len(varied)))
        orders.append(rows.tolist())
    assert orders[0] != orders[1]
    # Another epoch's first window has other samples, not only another order.
    assert len(firsts[0] & firsts[1]) < 0.8 * len(firsts[0])
    # The steps take all units of all windows in their order.
    size, total = 64, sum(plan.num_units(window) for window in range(windows))
    stepped = [row for step in range(total // size) for row in _rows(plan, step)]
    assert stepped == orders[0][: len(stepped)]


def test_neighbouring_rows_are_mixed(varied: Index) -> None:
    rows = np.array(_rows(_plan(varied, data__blend="{}"), 0))
    assert np.abs(np.diff(rows)).mean() > 500


def test_packs_keep_their_budgets_and_are_nearly_full(tmp_path: Path) -> None:
    index = synthetic_index(tmp_path, {"v/thinking": stage_like_lengths(4000, 200)}, num_pictures=1)
    plan = _plan(index, data__blend="{}", data__max_pack_tiles=40, **PACKED)
    for window in range(plan.epoch_windows()):
        units = plan.units(window)
        lengths = -(-plan.sizes.tokens[units.rows] // 8) * 8
        assert units.totals(lengths).max() <= 256
        assert units.totals(plan.sizes.tiles[units.rows]).max() <= 40
        assert plan.sizes.tokens[units.rows].sum() / len(units) / 256 > 0.9


def test_a_larger_budget_never_needs_more_packs() -> None:
    lengths = np.array(stage_like_lengths(2000, 100))
    none = np.zeros_like(lengths)
    counts = [best_fit(lengths, none, capacity, 1)[1] for capacity in (100, 150, 250, 500)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= lengths.sum() / 500 * 1.01 + 1


@given(
    samples=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=80),
    max_tiles=st.integers(5, 9),
)
@settings(deadline=None)
def test_best_fit_packs_every_sample_within_both_budgets(samples: list[tuple[int, int]], max_tiles: int) -> None:
    lengths, tiles = (np.array(values) for values in zip(*samples, strict=True))
    packs, count = best_fit(lengths, tiles, 40, max_tiles)
    assert set(packs.tolist()) == set(range(count))
    assert np.bincount(packs, lengths).max() <= 40
    assert np.bincount(packs, tiles).max() <= max_tiles
    # No two packs could have been one.
    if tiles.max() == 0:
        rooms = np.sort(np.bincount(packs, lengths))
        assert count < 2 or rooms[0] + rooms[1] > 40


def test_ranks_share_a_batch_out_evenly(varied: Index) -> None:
    plan = _plan(varied, data__blend="{}", train__global_batch=48, **PACKED)
    units = plan.global_batch(3)
    costs = plan.costs(units)
    for ranks in (1, 2, 3, 4, 8):
        shares = [plan.share(units, rank, ranks) for rank in range(ranks)]
        assert sorted(unit for share in shares for unit in share) == list(range(48))
        assert {len(share) for share in shares} == {48 // ranks}
        sums = [costs[share].sum() for share in shares]
        assert max(sums) / np.mean(sums) < 1.03


def test_balance_beats_chance_where_units_differ() -> None:
    costs = np.random.default_rng(0).exponential(size=256)
    sums = np.array([costs[share].sum() for share in balanced(costs, 16)])
    chance = costs.reshape(16, 16).sum(1)
    assert sums.max() / sums.mean() < 1.1 < 1.3 < chance.max() / chance.mean()


def test_costs_grow_with_tokens_tiles_and_squares(tmp_path: Path) -> None:
    text = synthetic_index(tmp_path / "text", {"t/document": [100, 50, 50]})
    plan = _plan(text, data__blend="{}", train__global_batch=3)
    costs = {int(row): cost for row, cost in zip(_rows(plan, 0), plan.costs(plan.global_batch(0)), strict=True)}
    assert costs[0] > costs[1] + costs[2]  # attention's square
    pictures = synthetic_index(tmp_path / "pictures", {"p/document": [50]}, num_pictures=2)
    plan = _plan(pictures, data__blend="{}", train__global_batch=1)
    assert plan.costs(plan.global_batch(0))[0] > costs[1]


def test_samples_that_do_not_fit_are_left_out_and_counted(tmp_path: Path) -> None:
    index = synthetic_index(tmp_path, {"a/document": [30] * 98 + [257, 258]})
    config = {"data__max_sequence_tokens": 257, "model__language__max_positions": 512, "data__blend": "{}"}
    plan = _plan(index, **config)
    assert plan.left_out.tolist() == [99]
    assert plan.num_samples == 99
    seen = {row for step in range(5) for row in _rows(plan, step)}
    assert seen == set(range(99))
    assert plan_of_run(index, tiny_config(train__global_batch=4, **config)).num_samples == 99
    with pytest.raises(InputError, match=r"2 of 100 samples \(2\.0%\) .* have up to 257 tokens"):
        plan_of_run(index, tiny_config(train__global_batch=4, **config | {"data__max_sequence_tokens": 256}))
    with pytest.raises(InputError, match="none of the 100 samples"):
        _plan(index, **config | {"data__rendering": "cold_start"})


def test_numba_is_imported_for_packing_alone() -> None:
    """vLLM's engine cannot be started beside it."""
    code = "import sys, megatron_mm.data.loader, megatron_mm.evaluate.heldout; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_part_is_named(index: Index) -> None:
    with pytest.raises(InputError, match=r"'d/\*'.*it holds a/thinking, b/thinking, c/document"):
        _plan(index, data__blend="{d/*: 1}")


def test_whatever_changes_the_sequence_changes_the_fingerprint(index: Index, varied: Index) -> None:
    base = _plan(index).fingerprint(index)
    assert _plan(index).fingerprint(index) == base
    changes: list[dict[str, object]] = [
        {"seed": 5},
        {"data__blend": "{}"},
        {"train__global_batch": 32},
        {"data__max_sequence_tokens": 128},
        {"data__max_pack_tiles": 3},
        PACKED,
    ]
    found = {_plan(index, **change).fingerprint(index) for change in changes}
    found.add(_plan(varied, data__blend="{}").fingerprint(varied))
    assert len(found | {base}) == len(changes) + 2
