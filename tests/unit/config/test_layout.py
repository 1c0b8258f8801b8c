"""Layouts that a model or a batch does not admit are refused before a rank is started."""

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import (
    check_layout,
    layout_faults,
    pipeline_split,
    sample_multiple,
    sequence_multiple,
    vision_as_layers,
)
from megatron_mm.config.load import load_config


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "expected"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.language.num_heads=4"),
        (["parallel.tensor=4"], 4, "parallel.tensor=4 does not divide model.language.num_kv_heads=2"),
        (["parallel.pipeline=5"], 5, "is more chunks than model.language.num_layers=4"),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=4"], 2, "is more chunks than model.language.num_layers=4"),
        (["parallel.virtual_pipeline=2"], 1, "parallel.virtual_pipeline=2 needs parallel.pipeline of 2 or more"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch=64"],
            2,
            "interleaves micro-batches in groups of parallel.pipeline=2; train.global_batch=64 makes 1 a rank",
        ),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[1, 2, 1]"], 2, "names 3 chunks"),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layers=[1, 2]"],
            2,
            "sums to 3, not to model.language.num_layers=4",
        ),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[4, 0]"], 2, "only the first chunk, which holds the ViT"),
        (["model.vision.parallel=data"], 1, "model.vision.parallel=data needs parallel.tensor of 2 or more"),
        (
            ["parallel.tensor=2", "model.vision.ffn_hidden_size=171"],
            2,
            "does not divide model.vision.ffn_hidden_size=171; model.vision.parallel=data does not cut it",
        ),
        (["parallel.tensor=2"], 3, "3 ranks cannot be shared out over parallel.tensor=2 x parallel.pipeline=1"),
        (["parallel.context=2"], 3, "x parallel.context=2; start a multiple of 2 ranks"),
        (["train.global_batch=10"], 2, "train.global_batch=10 is not a multiple of train.micro_batch=32 x 2"),
        (["parallel.sequence=true"], 2, "parallel.sequence=true needs parallel.tensor of 2 or more"),
    ],
)
def test_each_misfit_is_named(overrides: list[str], num_ranks: int, expected: str) -> None:
    config = load_config("mini/stage3", overrides=overrides)
    with pytest.raises(InputError) as caught:
        check_layout(config, num_ranks)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "num_ranks"),
    [
        ([], 1),
        ([], 2),
        (["parallel.tensor=2"], 2),
        (["parallel.pipeline=2"], 2),
        (["parallel.pipeline=3"], 3),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[0, 4]"], 2),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"], 8),
        (["parallel.tensor=2", "model.vision.parallel=data", "model.vision.ffn_hidden_size=171"], 2),
    ],
)
def test_what_fits_is_let_through(overrides: list[str], num_ranks: int) -> None:
    assert layout_faults(load_config("mini/stage3", overrides=overrides), num_ranks) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (4,)),
        (["parallel.pipeline=2"], (2, 2)),
        (["parallel.pipeline=3"], (1, 2, 1)),
        (["parallel.pipeline=2", "parallel.vision_as_layers=2"], (1, 3)),
        (["parallel.pipeline=2", "parallel.vision_as_layers=9"], (0, 4)),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], (1, 1, 1, 1)),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[3, 1]"], (3, 1)),
    ],
)
def test_layers_are_shared_out_with_the_vit_counted(overrides: list[str], expected: tuple[int, ...]) -> None:
    assert pipeline_split(load_config("mini/stage3", overrides=overrides)) == expected


def test_r4b_counts_its_vit_as_four_layers() -> None:
    stage = ["run_dir=x", "train={steps: 1, global_batch: 1, micro_batch: 1}", "optim={lr: 1}", "parallel.pipeline=4"]
    config = load_config("r4b/base", overrides=stage)
    # 0.41 billion parameters against 0.10 billion a layer.
    assert vision_as_layers(config.model) == 4
    assert pipeline_split(config) == (6, 10, 10, 10)


@pytest.mark.parametrize(
    ("overrides", "sample", "sequence"),
    [
        ([], 1, 1),
        (["parallel.tensor=2"], 1, 1),
        (["parallel.tensor=4", "parallel.sequence=true"], 1, 4),
        (["parallel.context=2"], 4, 4),
        (["parallel.context=3", "parallel.tensor=4", "parallel.sequence=true"], 6, 12),
    ],
)
def test_lengths_that_ranks_can_share(overrides: list[str], sample: int, sequence: int) -> None:
    config = load_config("mini/stage3", overrides=overrides)
    assert (sample_multiple(config), sequence_multiple(config)) == (sample, sequence)
