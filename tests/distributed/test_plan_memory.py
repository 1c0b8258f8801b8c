"""The plan's memory of the fullest rank is within a tenth of what real steps allocate."""

import pytest

from tests.memory import compare

BAR = 0.1
LAYOUTS = {
    1: ["padded, fp32", "packed, recompute full, bf16", "padded, projector alone learns, bf16"],
    2: ["TP 2 + SP, bf16", "PP 2, bf16", "DP 2, distributed optimizer, bf16"],
}


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_the_fullest_rank(num_ranks: int) -> None:
    ratios = {name: found.ratio for name, found in compare(LAYOUTS[num_ranks]).items()}
    assert ratios == {name: pytest.approx(1, abs=BAR) for name in ratios}
