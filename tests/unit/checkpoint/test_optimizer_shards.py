"""Stretches of an array as boxes."""

import itertools
import math

import numpy as np
import pytest

from megatron_mm.checkpoint.optimizer_shards import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (2, 2, 3, 2)])
def test_every_stretch_is_cut_into_boxes_in_order(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    for start, end in itertools.combinations_with_replacement(range(array.size + 1), 2):
        cut = list(boxes(shape, start, end))
        found = [array[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel() for box in cut]
        assert [len(part) for part in found] == [math.prod(lengths) for _, lengths in cut]
        assert [number for part in found for number in part] == list(range(start, end))
        # Whole rows stay together, at each depth.
        assert len(cut) <= 2 * len(shape) - 1
