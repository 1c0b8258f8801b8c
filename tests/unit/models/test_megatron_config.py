"""What our config becomes in Megatron-Core's, where no CPU run can show it."""

import pytest
import torch

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.megatron_config import language_config, projector_config, vision_config
from megatron_mm.models.vlm import padded_tiles
from megatron_mm.parallel.platform.cpu import CpuPlatform

STAGE = ("run_dir=x", "train={steps: 1, global_batch: 2, micro_batch: 1}", "optim={lr: 1}", "precision=bf16")


def _config(*overrides: str) -> RunConfig:
    return load_config("r4b/base", overrides=[*STAGE, *overrides])


@pytest.mark.parametrize(
    ("recipe", "format_"),
    [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")],
)
def test_fp8_is_for_the_modules_named(recipe: str, format_: str) -> None:
    config, platform = _config(f"fp8.recipe={recipe}"), CpuPlatform()
    language = language_config(config, platform)
    assert (language.fp8, language.fp8_recipe) == (format_, recipe)
    assert not language.disable_parameter_transpose_cache
    assert vision_config(config, platform).fp8 is None
    assert projector_config(config, platform).fp8 is None


def test_a_module_in_fp8_beside_a_language_model_in_bf16_keeps_no_old_weights() -> None:
    config, platform = _config("fp8.recipe=tensorwise", "fp8.modules=[vision]"), CpuPlatform()
    assert language_config(config, platform).fp8 is None
    vision = vision_config(config, platform)
    assert vision.fp8 == "hybrid"
    assert vision.disable_parameter_transpose_cache


def test_the_pipeline_is_cut_where_the_config_says() -> None:
    config = _config("parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layers: [3, 11, 11, 11]}")
    language = language_config(config, CpuPlatform())
    layout = language.pipeline_model_parallel_layout
    assert layout is not None
    assert [[len(chunk) for chunk in stage] for stage in layout.layout] == [[4, 11], [11, 12]]  # pyright: ignore
    assert language.virtual_pipeline_model_parallel_size == 2
    # Anything else mixes up messages between two stages.
    assert language.overlap_p2p_comm
    assert not language.batch_p2p_comm


@pytest.mark.parametrize(("num_tiles", "multiple", "expected"), [(3, 1, 3), (3, 4, 4), (8, 4, 8), (1, 16, 16)])
def test_blank_tiles_fill_up(num_tiles: int, multiple: int, expected: int) -> None:
    tiles = torch.randn(num_tiles, 3, 4, 4)
    padded = padded_tiles(tiles, multiple)
    assert padded.shape == (expected, 3, 4, 4)
    assert torch.equal(padded[:num_tiles], tiles)
    assert not padded[num_tiles:].any()
