"""Every FP8 recipe of the config is one of Megatron-Core's and Transformer Engine's, in every module that takes it."""

from typing import Any, get_args

import pytest
from megatron.core.fp8_utils import get_fp8_recipe

from megatron_mm.config.schema import Fp8Config
from megatron_mm.models.megatron_config import language_config, projector_config, vision_config
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from tests.gpu_contract.gpu_stand_in import TransformerEnginePlatform, seen_gpu
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu_contract

# Recipe of the config -> class of transformer_engine.common.recipe.
EXPECTED = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def test_all_recipes_are_here() -> None:
    assert {*EXPECTED, "none"} == set(get_args(Fp8Config.model_fields["recipe"].annotation))


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_is_built_for_each_module(recipe: str) -> None:
    ((kinds, num_modules),) = run_on_ranks(_built, 1, recipe)
    # Megatron-Core has a class of its own for delayed scaling, made of Transformer Engine's.
    assert [EXPECTED[recipe] in names for names in kinds] == [True] * 3
    assert num_modules > 30


def _built(recipe: str) -> tuple[list[list[str]], int]:
    """The classes of each module's recipe, and Transformer Engine's modules in a model that has it everywhere."""
    config = tiny_config(precision="bf16", fp8__recipe=recipe, fp8__modules="[vision, projector, language]")
    platform = TransformerEnginePlatform()
    with state.process_group(platform), state.model_parallel(config.parallel, seed=0) as groups, seen_gpu():
        kinds = []
        for make in (language_config, vision_config, projector_config):
            built: Any = make(config, platform)
            assert built.fp8
            kinds.append([kind.__name__ for kind in type(get_fp8_recipe(built)).__mro__])
        (chunk,) = build_model(config, platform, groups, image_token=5)
        return kinds, sum(hasattr(module, "fp8_meta") for module in chunk.modules())
