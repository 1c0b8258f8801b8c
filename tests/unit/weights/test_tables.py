"""The table at real sizes: every name and shape of the released layouts, and every parameter of our own model."""

from typing import Any

import torch
from transformers import LlavaOnevisionConfig, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from megatron_mm.config.load import load_model
from megatron_mm.config.schema import ModelConfig
from megatron_mm.convert.checkpoint_weights import skeleton_of
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.modeling_r4b import RForConditionalGeneration
from megatron_mm.weights.names import not_of_the_model, our_names
from megatron_mm.weights.stream import parameters_by_name
from megatron_mm.weights.tables import LANGUAGE, VISION, language_table, model_table, vision_table
from tests.ranks import run_on_ranks
from tests.released import QWEN3_4B, SO400M

Shapes = dict[str, tuple[int, ...]]


def _recipe(*overrides: str) -> ModelConfig:
    """R-4B's model, as the recipe has it."""
    return load_model({}, "r4b/base", (), overrides)[0]


def _shapes(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_qwen3_4b_is_mapped_whole() -> None:
    with torch.device("meta"):
        theirs = _shapes(Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)))
    theirs.pop("lm_head.weight")  # tied: not in the files
    ours = hf_shapes(language_table(_recipe("model.language.tied_embeddings=true").language))
    assert {f"{LANGUAGE}{name.removeprefix('model.')}": shape for name, shape in theirs.items()} == ours
    # The model card: 4.0 B parameters, 3.6 B without the embedding.
    assert _numel(ours) == 4_022_468_096
    assert round((_numel(ours) - 151936 * 2560) / 1e9, 1) == 3.6


def test_siglip2_so400m_is_mapped_whole() -> None:
    with torch.device("meta"):
        theirs = _shapes(SiglipVisionModel(SiglipVisionConfig(**SO400M)))
    names = our_names(theirs, "vision", "here")
    beside = {name for name in names if not_of_the_model(name, torch.float32, 27)}
    assert all("post_layernorm" in name or ".head." in name for name in beside)
    ours = hf_shapes(vision_table(_recipe("model.vision.drop_last_layers=0").vision))
    assert {name: theirs[names[name]] for name in names.keys() - beside} == ours
    # With the pooling head and the final norm, the released vision model has 428,225,600 parameters.
    assert _numel(theirs) == 428_225_600
    # One layer less for R-4B.
    assert not_of_the_model(f"{VISION}encoder.layers.26.mlp.fc1.bias", torch.float32, 26)
    assert not_of_the_model(f"{VISION}encoder.layers.25.mlp.fc1.bias", torch.float32, 26) is None


def test_r4b_is_mapped_whole() -> None:
    vision: dict[str, Any] = {**SO400M, "num_hidden_layers": 26, "vision_use_head": False}
    text = Qwen3Config(**{**QWEN3_4B, "tie_word_embeddings": False})
    config = LlavaOnevisionConfig(vision_config=SiglipVisionConfig(**vision), text_config=text)
    with torch.device("meta"):
        theirs = _shapes(RForConditionalGeneration(config))
    names = our_names(theirs, "whole", "here")
    ours = hf_shapes(model_table(_recipe()))
    assert {name: theirs[stored] for name, stored in names.items()} == ours
    # Listed as 4.82 B parameters.
    assert round(_numel(ours) / 1e9, 2) == 4.82


def _parameters(models: list[ModelConfig]) -> list[Shapes]:
    """Names and shapes of our own models in one piece. Runs on one rank."""
    found = []
    with state.process_group(get_platform("cpu")):
        for model in models:
            with skeleton_of(model, torch.bfloat16) as skeleton:
                parameters = parameters_by_name(skeleton).items()
                found.append({name: tuple(parameter.shape) for name, parameter in parameters})
    return found


def test_our_model_has_the_tables_parameters() -> None:
    experts = _recipe("model.language={preset: qwen3-30b-a3b, tied_embeddings: false}")
    tied, no_norm = _recipe("model.language.tied_embeddings=true"), _recipe("model.projector.pre_norm=false")
    models = [_recipe(), tied, no_norm, experts]
    for model, parameters in zip(models, run_on_ranks(_parameters, 1, models)[0], strict=True):
        assert parameters == {rule.megatron: rule.shard_shape(1) for rule in model_table(model)}
    # The model card of Qwen3-30B-A3B: 30.5 B parameters.
    assert round(_numel(hf_shapes(language_table(experts.language))) / 1e9, 1) == 30.5
