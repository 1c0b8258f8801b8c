"""bf16 with fp32 master weights learns as fp32 does."""

from pathlib import Path

import numpy as np
import pytest

from tests.precision import losses, precision_config
from tests.ranks import run_on_ranks


@pytest.mark.slow
def test_bf16_stays_within_two_percent_of_fp32(digits: Path) -> None:
    configs = [precision_config(digits, precision) for precision in ("fp32", "bf16")]
    for of_rank in run_on_ranks(losses, 2, configs):
        fp32, bf16 = map(np.array, of_rank)
        assert fp32[-5:].mean() < 0.5 * fp32[0]
        assert (np.abs(bf16 - fp32) / fp32).max() < 0.02
        # They are not the same arithmetic.
        assert np.abs(bf16 - fp32).max() > 1e-5
