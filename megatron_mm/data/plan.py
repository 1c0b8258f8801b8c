"""Which samples make up which global batch: a pure function of (index, blend, seed, step).

The stream of samples is cut into windows of `WINDOW` places. Every window holds the same number of samples of each
part (its weight, rounded by largest remainder), in an order drawn from (seed, window). Each part is walked through
epoch by epoch, in an order drawn from (seed, part, epoch). So the samples of any step are found without walking
through the steps before it, and the ranks only share a batch out: they do not change it.
"""

from collections.abc import Mapping

import numpy as np

WINDOW = 4096


class Plan:
    """Global batches over rows of a data set.

    Args:
        parts: for each part its row numbers, int64 [n], n > 0.
        weights: for each part its share, any positive scale.
        seed: everything random is drawn from it.
        global_batch: samples of one step.
    """

    def __init__(self, parts: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int, global_batch: int):
        names = sorted(weights)
        self._rows = [parts[name] for name in names]
        self._counts = _apportion([weights[name] for name in names], WINDOW)
        self._seed = seed
        self._global_batch = global_batch
        self._window: tuple[int, np.ndarray] | None = None
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step` (counted from 0): int64 [global_batch]."""
        first = step * self._global_batch
        places = range(first, first + self._global_batch)
        return np.array([self._window_rows(place // WINDOW)[place % WINDOW] for place in places])

    def _window_rows(self, window: int) -> np.ndarray:
        if self._window is None or self._window[0] != window:
            rows = np.concatenate([self._part_rows(part, window) for part in range(len(self._rows))])
            self._window = (window, self._random(0, window).permutation(rows))
        return self._window[1]

    def _part_rows(self, part: int, window: int) -> np.ndarray:
        count, rows = self._counts[part], self._rows[part]
        positions = np.arange(window * count, (window + 1) * count)
        taken = []
        for epoch in range(positions[0] // len(rows), positions[-1] // len(rows) + 1) if count else ():
            inside = positions[positions // len(rows) == epoch] % len(rows)
            taken.append(self._epoch_rows(part, epoch)[inside])
        return np.concatenate(taken) if taken else rows[:0]

    def _epoch_rows(self, part: int, epoch: int) -> np.ndarray:
        if self._epochs.get(part, (None,))[0] != epoch:
            self._epochs[part] = (epoch, self._random(1 + part, epoch).permutation(self._rows[part]))
        return self._epochs[part][1]

    def _random(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream, number])


def _apportion(weights: list[float], places: int) -> list[int]:
    """Share `places` out by largest remainder."""
    exact = np.array(weights) / sum(weights) * places
    counts = np.floor(exact).astype(int)
    for part in np.argsort(counts - exact, kind="stable")[: places - counts.sum()]:
        counts[part] += 1
    return counts.tolist()
