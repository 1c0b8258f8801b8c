"""Layouts that a model or a batch does not admit are refused before a rank is started."""

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import check_layout, layout_faults
from megatron_mm.config.load import load_config


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "expected"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.language.num_heads=4"),
        (["parallel.tensor=4"], 4, "parallel.tensor=4 does not divide model.language.num_kv_heads=2"),
        (["parallel.pipeline=3"], 3, "parallel.pipeline=3 does not divide model.language.num_layers=4"),
        (["parallel.tensor=2"], 3, "3 ranks cannot be shared out over parallel.tensor=2 x parallel.pipeline=1"),
        (["train.global_batch=10"], 2, "train.global_batch=10 is not a multiple of train.micro_batch=32 x 2"),
        (["parallel.sequence=true"], 2, "parallel.sequence=true needs parallel.tensor of 2 or more"),
    ],
)
def test_each_misfit_is_named(overrides: list[str], num_ranks: int, expected: str) -> None:
    config = load_config("mini/stage3", overrides=overrides)
    with pytest.raises(InputError) as caught:
        check_layout(config, num_ranks)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("tensor", "pipeline", "num_ranks"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4), (1, 1, 2)])
def test_what_fits_is_let_through(tensor: int, pipeline: int, num_ranks: int) -> None:
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    assert layout_faults(load_config("mini/stage3", overrides=overrides), num_ranks) == []
