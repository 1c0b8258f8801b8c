"""Directories as a model's weights: the spellings that there are, and everything that does not fit, by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.vision import fitted_positions
from megatron_mm.weights.hf_config import read_whole
from megatron_mm.weights.names import Kind, our_names
from megatron_mm.weights.source import Source, open_source
from megatron_mm.weights.stream import shard_of
from megatron_mm.weights.tables import EMBEDDING, LANGUAGE, OUTPUT, PROJECTOR, VISION, model_table
from tests.layouts import EXPERTS, Overrides
from tests.tiny import r4b_tensors, reference_models, tiny_config

Tensors = dict[str, torch.Tensor]
NORM = f"{LANGUAGE}norm.weight"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """A tied miniature model."""
    return tiny_config()


@pytest.fixture(scope="module")
def tensors(config: RunConfig) -> Tensors:
    """Its weights under R-4B's names."""
    return r4b_tensors(config, *reference_models(config))


def _saved(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def _equal(source: Source, tensors: Tensors) -> bool:
    assert source.tensors.keys() == tensors.keys()
    return all(torch.equal(source.tensors[name][(slice(None),)], tensor) for name, tensor in tensors.items())


SPELLINGS: dict[str, Callable[[str], str]] = {
    "R-4B": lambda name: name,
    "transformers 4.52": lambda name: name.replace("vision_tower.vision_model", "vision_tower"),
    "transformers 5": lambda name: name.replace("model.language_model", "language_model.model")
    .replace("model.vision_tower.vision_model", "vision_tower")
    .replace("model.multi_modal", "multi_modal")
    .replace("model.image_newline", "image_newline"),
    "before 4.52": lambda name: name.replace("model.language_model", "language_model.model")
    .replace("model.vision_tower", "vision_tower")
    .replace("model.multi_modal", "multi_modal")
    .replace("model.image_newline", "image_newline")
    .replace("lm_head", "language_model.lm_head"),
    "our own class in transformers 5": lambda name: name.replace(LANGUAGE, f"{LANGUAGE}model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling: str, tmp_path: Path) -> None:
    untied = tiny_config(model__language__tied_embeddings=False)
    tensors = r4b_tensors(untied, *reference_models(untied))
    renamed = {SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}
    assert _equal(open_source({"whole": _saved(tmp_path / "model", renamed)}, untied.model), tensors)


def test_a_llava_next_that_transformers_has_saved(tmp_path: Path) -> None:
    siglip, qwen = reference_models(tiny_config())
    config = LlavaNextConfig(
        vision_config=siglip.config,
        text_config=qwen.config,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    theirs = LlavaNextForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "model")
    model = read_whole(tmp_path / "model").model
    assert (model.vision.used_layers, model.tile_grids, model.projector.pre_norm) == (1, ((1, 2), (2, 1)), False)
    source = open_source({"whole": tmp_path / "model"}, model)
    tensors = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    names = our_names(tensors, "whole", "here")
    assert _equal(source, {name: tensors[names[name]] for rule in model_table(model) for name in rule.hf})


@pytest.mark.parametrize("overrides", [{}, EXPERTS], ids=["dense", "experts"])
def test_separate_directories_get_a_projector_from_the_seed(overrides: Overrides, tmp_path: Path) -> None:
    config = tiny_config(**overrides)
    siglip, qwen = reference_models(config)
    siglip.save_pretrained(tmp_path / "vision")
    qwen.save_pretrained(tmp_path / "language")
    directories: dict[Kind, Path] = {"vision": tmp_path / "vision", "language": tmp_path / "language"}
    one, same, other = (open_source(directories, config.model, seed=seed) for seed in (1, 1, 2))
    projector = {name for name in one.tensors if name.startswith(PROJECTOR) or "newline" in name}
    of_files = {name: t for name, t in r4b_tensors(config, siglip, qwen).items() if name not in projector}
    assert all(torch.equal(one.tensors[name][(slice(None),)], tensor) for name, tensor in of_files.items())
    for name in projector:
        tensor = one.tensors[name][(slice(None),)]
        assert torch.equal(tensor, same.tensors[name][(slice(None),)])
        drawn = not name.endswith("bias") and "pre_norm" not in name
        assert torch.equal(tensor, other.tensors[name][(slice(None),)]) != drawn
    assert "drew projector and image_newline from seed 1" in one.notes
    assert any("post_layernorm.weight: the ViT's final norm" in note for note in one.notes)


def test_everything_that_does_not_fit_is_named(config: RunConfig, tensors: Tensors, tmp_path: Path) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if name != NORM}
    wrong |= {"model.more": torch.zeros(2), f"{PROJECTOR}linear_1.bias": torch.zeros(3)}
    directory = _saved(tmp_path / "model", wrong)
    with pytest.raises(InputError) as raised:
        open_source({"whole": directory}, config.model)
    assert str(raised.value).splitlines() == [
        f"{directory} do not fit the model:",
        f"it lacks {NORM} [128]",
        "the model has no model.more",
        f"{PROJECTOR}linear_1.bias is [3]; the model's is [128]",
    ]


def test_the_same_tensor_twice_is_refused(config: RunConfig, tensors: Tensors, tmp_path: Path) -> None:
    twice = {**tensors, "image_newline": tensors["model.image_newline"].clone()}
    with pytest.raises(InputError, match=r"holds .*image_newline and .*image_newline, which are the same tensor"):
        open_source({"whole": _saved(tmp_path / "model", twice)}, config.model)


def test_types_are_kept_or_changed_on_request_only(config: RunConfig, tensors: Tensors, tmp_path: Path) -> None:
    mixed = _saved(tmp_path / "mixed", {**tensors, NORM: tensors[NORM].bfloat16()})
    with pytest.raises(InputError, match=r"tensors of several types .*pass --dtype bfloat16, which rounds"):
        open_source({"whole": mixed}, config.model)
    source = open_source({"whole": mixed}, config.model, dtype=torch.bfloat16)
    assert source.notes == ("converted float32 to bfloat16",)
    assert _equal(source, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    half = _saved(tmp_path / "half", {name: tensor.half() for name, tensor in tensors.items()})
    with pytest.raises(InputError, match="we train in float32 or bfloat16, so pass --dtype"):
        open_source({"whole": half}, config.model)


def test_an_output_layer_beside_a_tied_embedding(config: RunConfig, tensors: Tensors, tmp_path: Path) -> None:
    copy = tensors[EMBEDDING].clone()
    equal = open_source({"whole": _saved(tmp_path / "equal", {**tensors, OUTPUT: copy})}, config.model)
    assert equal.notes == (f"left out {OUTPUT}: it repeats {EMBEDDING}",)
    different = _saved(tmp_path / "different", {**tensors, OUTPUT: copy + 1})
    with pytest.raises(InputError, match="differs from the embedding, though the config ties them"):
        open_source({"whole": different}, config.model)
    untied = tiny_config(model__language__tied_embeddings=False).model
    kept = open_source({"whole": different}, untied, untie=True)
    assert torch.equal(kept.tensors[OUTPUT][(slice(None),)], copy + 1)
    made = open_source({"whole": _saved(tmp_path / "tied", tensors)}, untied, untie=True)
    assert torch.equal(made.tensors[OUTPUT][(slice(None),)], tensors[EMBEDDING])


def test_dropped_layers_are_left_out_and_positions_interpolated(tensors: Tensors, tmp_path: Path) -> None:
    directory = _saved(tmp_path / "model", tensors)
    shorter = tiny_config(model__vision__drop_last_layers=1, model__vision__image_size=48).model
    source = open_source({"whole": directory}, shorter)
    assert not [name for name in source.tensors if name.startswith(f"{VISION}encoder.layers.1.")]
    assert len(source.notes) == 16
    assert all("a ViT layer that is dropped (model.vision.drop_last_layers)" in note for note in source.notes)
    (rule,) = (rule for rule in model_table(shorter) if rule.megatron == "vision.position_embedding.weight")
    table = tensors[rule.hf[0]]
    assert torch.equal(shard_of(rule, source.tensors, 0, 1), fitted_positions(table, 36, "here"))
