"""Which samples make up which global batch: a pure function of (index, blend, seed, step, and how packs are made).

The endless stream of samples is cut into windows. A window takes its share of each part of the blend, whose samples it
finds by walking through blocks of neighbouring rows in an order drawn from (seed, part, epoch). It mixes them, packs
them, and mixes the packs. Packs (or samples, where nothing is packed) of all windows behind each other are the units,
of which a step takes the next `global_batch`. So any step is found without the steps before it: only the number of
packs in the windows before has to be known, which is counted in seconds for tens of millions of samples.

Ranks share a global batch out, they do not change it: each gets as many units, of as equal estimated cost as can be.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from megatron_mm.chat.images import TileRules, cut
from megatron_mm.chat.render import Rendering
from megatron_mm.config.errors import InputError
from megatron_mm.config.flops import Flops, training_flops
from megatron_mm.config.layout import sample_multiple
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.index import Index, PartRange

T = TypeVar("T")
WINDOW = 65536
# Rows that lie behind each other in a shard and are met behind each other before they are mixed.
BLOCK = 256
# Lengths are planned as multiples of it, so that context parallelism up to 4, which pads samples, leaves the plan as it
# is. Costs half of it a sample on average.
MULTIPLE = 8
# Rows, and sizes of pictures, that are looked at together: memory stays bounded.
STRETCH, STRETCH_OF_SIZES = 2**21, 2**17
_UNBOUNDED = 2**31
# Of this file's way of choosing: part of the fingerprint.
ALGORITHM = 1


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan depends on besides the index.

    Attributes:
        blend: weight of each pattern of parts; empty for every sample once an epoch.
        max_tokens: longest sample, and length of a pack.
        max_tiles: of a pack; None for any number.
        multiple: what a sample's length counts as a multiple of.
    """

    blend: dict[str, float]
    seed: int
    global_batch: int
    rendering: Rendering
    packed: bool
    max_tokens: int
    max_tiles: int | None
    multiple: int
    rules: TileRules

    @classmethod
    def of_run(cls, config: RunConfig) -> "PlanSettings":
        """From a training config."""
        data = config.data
        return cls(
            data.blend,
            config.seed,
            config.train.global_batch,
            Rendering(data.rendering),
            data.packed,
            # A sample's last token is only ever a label.
            data.max_sequence_tokens if data.packed else data.max_sequence_tokens - 1,
            data.max_pack_tiles,
            math.lcm(MULTIPLE, sample_multiple(config)) if data.packed else 1,
            TileRules.of_model(config.model),
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of every sample, as this run renders it.

    Attributes:
        tokens: int32 [rows], inputs of the language model.
        tiles: int32 [rows].
        fits: bool [rows], whether the sample can be trained on.
    """

    tokens: np.ndarray
    tiles: np.ndarray
    fits: np.ndarray


@dataclass(frozen=True, slots=True)
class Units:
    """Packs, or single samples.

    Attributes:
        rows: int64 [samples], of all units behind each other.
        starts: int64 [units + 1], where each unit begins in `rows`.
    """

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, unit: int) -> np.ndarray:
        return self.rows[self.starts[unit] : self.starts[unit + 1]]

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums over each unit's samples: [samples] -> [units]."""
        return np.add.reduceat(values, self.starts[:-1])


class Plan:
    """Global batches over rows of an index.

    Args:
        index: of the data.
        split: "train" or "heldout".
        settings: what else the plan depends on.
        flops: what a unit's cost is reckoned with.

    Attributes:
        sizes: of every row.
        left_out: rows of the blend that are too long, have too many tiles, or cannot be rendered so.
        num_samples: rows of the blend without them; each is seen once an epoch.

    Raises:
        InputError: the blend names a part that is not there, or nothing is left.
    """

    def __init__(self, index: Index, split: str, settings: PlanSettings, flops: Flops):
        self._settings = settings
        self._flops = flops
        self.sizes = sample_sizes(index, settings)
        patterns = settings.blend or {"*": 1.0}
        total = sum(patterns.values())
        # By name, so that the order in which a blend is written does not matter.
        self._groups = []
        self.parts: list[PartRange] = []
        for number, pattern in enumerate(sorted(patterns)):
            matching = index.parts_like(pattern, split)
            self.parts += [part for part in matching if part not in self.parts]
            walk = [(part.first, part.count) for part in matching]
            self._groups.append(_Group(walk, settings.seed, number, patterns[pattern] / total))
        self.left_out = np.concatenate([group.rows_where(~self.sizes.fits) for group in self._groups])
        num_rows = sum(group.num_rows for group in self._groups)
        self.num_samples = num_rows - len(self.left_out)
        if not self.num_samples:
            raise InputError(
                f"none of the {num_rows} samples of {index.path.parent} has at most data.max_sequence_tokens="
                f"{settings.max_tokens} tokens and data.max_pack_tiles={settings.max_tiles} tiles"
            )
        self._window_rows = min(WINDOW, num_rows)
        # The number of units up to the end of each window that was looked at.
        self._ends: list[int] = []
        self._made: dict[int, Units] = {}

    def fingerprint(self, index: Index) -> str:
        """Changes with anything that changes the sequence of global batches."""
        settings = asdict(self._settings)
        # NumPy may draw otherwise in another version.
        drawn = _random(0, 0, 0).permutation(100).tolist()
        state = f"{ALGORITHM} {index.fingerprint} {sorted(settings.items())} {drawn}"
        return hashlib.blake2b(state.encode(), digest_size=8).hexdigest()

    def global_batch(self, step: int) -> Units:
        """Units of `step`, counted from 0; which of them a rank gets is told by `share`."""
        size = self._settings.global_batch
        first = step * size
        rows: list[np.ndarray] = []
        while len(rows) < size:
            window, place = self._find(first + len(rows))
            units = self.units(window)
            rows += [units[unit] for unit in range(place, min(place + size - len(rows), len(units)))]
        return _joined(rows)

    def costs(self, units: Units) -> np.ndarray:
        """Estimated floating-point operations of each unit: float64 [units]."""
        tokens = self.sizes.tokens[units.rows].astype(np.float64)
        squares, tiles = units.totals(tokens**2), units.totals(self.sizes.tiles[units.rows].astype(np.float64))
        return self._flops.token * units.totals(tokens) + self._flops.squared_token * squares + self._flops.tile * tiles

    def share(self, units: Units, rank: int, num_ranks: int) -> list[int]:
        """Numbers of the units that a data-parallel rank works on, dearest first."""
        return balanced(self.costs(units), num_ranks)[rank]

    def units(self, window: int) -> Units:
        """Units of a window."""
        return remembered(self._made, window, 3, self._make_units)

    def num_units(self, window: int) -> int:
        """How many units a window has."""
        return len(self.units(window))

    def epoch_windows(self) -> int:
        """Windows of one epoch, where there are no weights; otherwise as many as hold the number of its samples."""
        return math.ceil(sum(group.num_rows for group in self._groups) / self._window_rows)

    def _find(self, unit: int) -> tuple[int, int]:
        """Window of a unit, and its place there."""
        while not self._ends or self._ends[-1] <= unit:
            # Counted by as many threads as there are cores, further ahead the further away the unit is.
            first = len(self._ends)
            left = unit - (self._ends[-1] if self._ends else 0)
            each = self._ends[-1] / first if first else math.inf
            ahead = 1 + int(min(left / each, 4096)) if each else 1
            for count in self._counted(range(first, first + ahead)):
                self._ends.append((self._ends[-1] if self._ends else 0) + count)
        window = int(np.searchsorted(self._ends, unit, side="right"))
        return window, unit - (self._ends[window - 1] if window else 0)

    def _counted(self, windows: range) -> list[int]:
        if len(windows) == 1:
            return [self.num_units(windows[0])]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(lambda window: self._packed(self._rows(window))[1], windows))

    def _rows(self, window: int) -> np.ndarray:
        """Samples of a window that fit, mixed."""
        rows = np.concatenate([group.rows(*self._places(group, window)) for group in self._groups])
        rows = rows[self.sizes.fits[rows]]
        return _random(self._settings.seed, 0, window).permutation(rows)

    def _places(self, group: "_Group", window: int) -> tuple[int, int]:
        """Which stretch of a group's endless walk a window takes."""
        if len(self._groups) == 1:
            # Epochs end where windows do.
            windows = self.epoch_windows()
            epoch, part = divmod(window, windows)
            start = epoch * group.num_rows
            return start + group.num_rows * part // windows, start + group.num_rows * (part + 1) // windows
        each = group.share * self._window_rows
        return math.floor(each * window + 0.5), math.floor(each * (window + 1) + 0.5)

    def _packed(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Number of each sample's unit, and number of units."""
        settings = self._settings
        if not settings.packed:
            return np.arange(len(rows)), len(rows)
        # Numba takes a second to import, and vLLM 0.32's CPU build cannot start an engine in a process that has it: it
        # looks through all modules for kernels, and trips over llvmlite's library object.
        from megatron_mm.data.packing import best_fit

        lengths = -(-self.sizes.tokens[rows].astype(np.int64) // settings.multiple)
        tiles = self.sizes.tiles[rows].astype(np.int64)
        max_tiles = _UNBOUNDED if settings.max_tiles is None else settings.max_tiles
        return best_fit(lengths, tiles, settings.max_tokens // settings.multiple, max_tiles)

    def _make_units(self, window: int) -> Units:
        rows = self._rows(window)
        units, count = self._packed(rows)
        if self._settings.packed:
            # Best fit fills packs from long to short: mixed, as are the samples in each of them.
            units = _random(self._settings.seed, -1, window).permutation(count)[units]
        order = np.argsort(units, kind="stable")
        return Units(rows[order], np.searchsorted(units[order], np.arange(count + 1)))


class _Group:
    """Parts that are walked through together, epoch by epoch, block by block."""

    def __init__(self, ranges: Sequence[tuple[int, int]], seed: int, number: int, share: float):
        self.share = share
        self.num_rows = sum(count for _, count in ranges)
        self._ranges = ranges
        self._stream = (seed, 1 + number)
        firsts = [np.arange(first, first + count, BLOCK) for first, count in ranges]
        self._firsts = np.concatenate(firsts)
        ends = np.concatenate([np.minimum(first + BLOCK, sum(at)) for first, at in zip(firsts, ranges, strict=True)])
        self._lengths = ends - self._firsts
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows_where(self, chosen: np.ndarray) -> np.ndarray:
        """Rows of the group for which `chosen`, bool [all rows], is true."""
        return np.concatenate([first + np.flatnonzero(chosen[first : first + count]) for first, count in self._ranges])

    def rows(self, first: int, end: int) -> np.ndarray:
        """Rows of the places [first, end) of the walk: int64 [end - first]."""
        taken = [np.empty(0, np.int64)]
        for epoch in range(first // self.num_rows, math.ceil(end / self.num_rows)):
            start = epoch * self.num_rows
            taken.append(self._within(epoch, max(first - start, 0), min(end - start, self.num_rows)))
        return np.concatenate(taken)

    def _within(self, epoch: int, first: int, end: int) -> np.ndarray:
        order, ends = remembered(self._epochs, epoch, 2, self._make_epoch)
        begin, last = np.searchsorted(ends, [first, end - 1], side="right")
        blocks = order[begin : last + 1]
        lengths = self._lengths[blocks]
        starts = np.cumsum(lengths) - lengths
        rows = np.repeat(self._firsts[blocks] - starts, lengths) + np.arange(lengths.sum())
        skipped = first - (ends[begin] - lengths[0])
        return rows[skipped : skipped + end - first]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = _random(*self._stream, epoch).permutation(len(self._firsts))
        return order, np.cumsum(self._lengths[order])


def plan_of_run(index: Index, config: RunConfig, split: str = "train") -> Plan:
    """The plan of a training config.

    Raises:
        InputError: see Plan; or more than data.max_left_out of the samples do not fit.
    """
    plan = Plan(index, split, PlanSettings.of_run(config), training_flops(config.model, config.train.trained))
    share = len(plan.left_out) / (plan.num_samples + len(plan.left_out))
    if share > config.data.max_left_out:
        worst = int(plan.sizes.tokens[plan.left_out].max())
        raise InputError(
            f"{len(plan.left_out):,} of {plan.num_samples + len(plan.left_out):,} samples ({share:.1%}) of "
            f"{index.path.parent} cannot be used: they have up to {worst:,} tokens, more than "
            f"data.max_sequence_tokens={config.data.max_sequence_tokens}, or more tiles than data.max_pack_tiles="
            f"{config.data.max_pack_tiles}, or no reasoning for a cold start; raise these, or data.max_left_out="
            f"{config.data.max_left_out}"
        )
    return plan


def sample_sizes(index: Index, settings: PlanSettings) -> Sizes:
    """Tokens and tiles of every row: a function of its texts' tokens and its pictures' sizes."""
    features_of, tiles_of = _sizes_of_pictures(index, settings.rules)
    texts = index.cold_start_tokens if settings.rendering.wraps_answer else index.text_tokens
    tokens, tiles = (np.empty(len(index), np.int32) for _ in range(2))
    for first in range(0, len(index), STRETCH):
        rows = slice(first, min(first + STRETCH, len(index)))
        starts = index.picture_starts[first : rows.stop + 1].astype(np.int64)
        pictures = index.picture_size[starts[0] : starts[-1]]
        features, tiles[rows] = (_sums(of_size[pictures], starts - starts[0]) for of_size in (features_of, tiles_of))
        if settings.rules.multi_image == "square":
            counts = np.diff(starts)
            several = counts > 1
            features[several] = counts[several] * (settings.rules.patches_per_side**2 + 1)
            tiles[rows][several] = counts[several]
        tokens[rows] = texts[rows] + features - 1
    fits = (texts > 0) & (tokens <= settings.max_tokens // settings.multiple * settings.multiple)
    if settings.max_tiles is not None:
        fits &= tiles <= settings.max_tiles
    return Sizes(tokens, tiles, fits)


def _sizes_of_pictures(index: Index, rules: TileRules) -> tuple[np.ndarray, np.ndarray]:
    """Features and tiles of a picture of each size: two of int32 [sizes]."""
    sizes = index.picture_sizes
    features, tiles = (np.empty(len(sizes), np.int32) for _ in range(2))
    for first in range(0, len(sizes), STRETCH_OF_SIZES):
        some = slice(first, first + STRETCH_OF_SIZES)
        cuts = cut(sizes[some, 0], sizes[some, 1], rules)
        features[some], tiles[some] = cuts.num_features(rules), cuts.num_tiles
    return features, tiles


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of `values` between each two of `starts`, which may be equal."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[starts[1:]] - sums[starts[:-1]]


def balanced(costs: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Share units out: as many for each rank, and sums of costs as equal as a greedy choice makes them.

    The dearest `num_ranks` units go to one rank each, and so on; of each such set the dearest goes to the rank that has
    least so far. So the units that ranks work on at the same time are alike as well.

    Args:
        costs: float64 [units], a multiple of `num_ranks` of them.
        num_ranks: data-parallel ranks.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = np.zeros(num_ranks)
    for chosen in np.argsort(-costs, kind="stable").reshape(-1, num_ranks):
        for unit, rank in zip(chosen.tolist(), np.argsort(sums, kind="stable").tolist(), strict=True):
            shares[rank].append(unit)
            sums[rank] += costs[unit]
    return shares


def remembered(made: dict[int, T], key: int, size: int, make: Callable[[int], T]) -> T:
    """The value of a key, made where it is not among the latest `size`. Unlike functools' cache it can be pickled."""
    if key not in made:
        value = make(key)
        while len(made) >= size:
            del made[next(iter(made))]
        made[key] = value
    return made[key]


def _joined(rows: list[np.ndarray]) -> Units:
    starts = np.array([0, *itertools.accumulate(map(len, rows))])
    return Units(np.concatenate(rows), starts)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    # Entropy takes no negative numbers; streams count from -1.
    return np.random.default_rng([seed, stream + 1, number])
