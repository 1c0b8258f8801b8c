"""Layouts that a model or a batch does not admit are refused before a rank is started."""

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import (
    check_layout,
    layout_faults,
    pipeline_split,
    sample_multiple,
    sequence_multiple,
    tile_multiple,
    vision_as_layers,
)
from megatron_mm.config.load import load_config

EXPERTS = "model.language.experts={num_experts: 8, experts_per_token: 2, ffn_hidden_size: 64}"
# What a base recipe leaves to the stage.
STAGE = ("run_dir=x", "train={steps: 1, global_batch: 2, micro_batch: 1}", "optim={lr: 1}")


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
        (["parallel.expert=2"], 2, "parallel.expert=2 needs model.language.experts"),
        ([EXPERTS, "parallel.expert=3"], 3, "parallel.expert=3 does not divide model.language.experts.num_experts=8"),
        ([EXPERTS, "parallel.expert=4", "parallel.pipeline=2"], 4, "x parallel.pipeline=2; start a multiple of 8"),
        ([EXPERTS, "parallel.tensor=2"], 2, "model.language.experts needs parallel.sequence=true"),
        ([EXPERTS, "fp8.recipe=delayed"], 1, "experts get any number of tokens, which FP8 cannot align"),
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
    config = load_config("r4b/base", overrides=[*STAGE, "parallel.pipeline=4"])
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


FP8 = ["precision=bf16", "fp8.recipe=tensorwise"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["fp8.recipe=mxfp8", "fp8.modules=[vision]"], "model.vision.ffn_hidden_size over its ranks is 4304"),
        (["fp8.modules=[vision]", "parallel.tensor=2"], "model.vision.ffn_hidden_size over its ranks is 2152"),
        (["model.language.ffn_hidden_size=9720"], "model.language.ffn_hidden_size over parallel.tensor is 9720"),
    ],
)
def test_matrices_that_fp8_cannot_align_are_named(overrides: list[str], expected: str) -> None:
    faults = layout_faults(load_config("r4b/base", overrides=[*STAGE, *FP8, *overrides]), 2)
    assert any(expected in fault and "out of fp8.modules" in fault for fault in faults), faults


@pytest.mark.parametrize(
    "overrides",
    [["fp8.modules=[vision, projector, language]"], ["parallel.tensor=2"], ["fp8.recipe=mxfp8"]],
)
def test_r4b_fits_fp8(overrides: list[str]) -> None:
    assert layout_faults(load_config("r4b/base", overrides=[*STAGE, *FP8, *overrides]), 2) == []


@pytest.mark.parametrize(
    ("overrides", "tokens", "tiles"),
    [
        ([], 16, 1),
        (["fp8.recipe=mxfp8"], 32, 1),
        (["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"], 64, 1),
        (["parallel.tensor=2", "parallel.sequence=true", "fp8.recipe=blockwise"], 256, 1),
        # 729 patches are odd.
        (["fp8.modules=[vision]"], 1, 16),
        (["fp8.modules=[projector]", "model.vision.patch_size=16"], 1, 1),
        (["fp8.modules=[vision]", "parallel.tensor=2", "model.vision.parallel=data"], 1, 32),
    ],
)
def test_what_fp8_pads_to(overrides: list[str], tokens: int, tiles: int) -> None:
    config = load_config("r4b/base", overrides=[*STAGE, *FP8, *overrides])
    assert (sequence_multiple(config), tile_multiple(config)) == (tokens, tiles)


def test_fp8_wants_bf16() -> None:
    with pytest.raises(InputError, match=r"fp8\.recipe=delayed needs precision=bf16, not fp32"):
        load_config("mini/stage3", overrides=["fp8.recipe=delayed", "precision=fp32"])
