"""The plan's memory of the fullest rank is within a tenth of what real steps allocate."""

import pytest

from tests.memory import compare

BAR = 0.1
# One of each number of ranks in the default set.
CASES = {
    "packed, recompute full, bf16": False,
    "TP 2 + SP, bf16": False,
    "padded, fp32": True,
    "padded, projector alone learns, bf16": True,
    "PP 2, bf16": True,
    "DP 2, distributed optimizer, bf16": True,
    "CP 2, bf16": True,
}


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=pytest.mark.slow if slow else ()) for layout, slow in CASES.items()]
)
def test_the_fullest_rank(layout: str) -> None:
    assert compare([layout])[layout].ratio == pytest.approx(1, abs=BAR)
