"""Directories as the world has them, each wrong in one way: one message names file, field or tensor, and the value."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.convert.importing import ImportOptions, ImportPlan, plan_import
from megatron_mm.generation.engine import engine_arguments
from megatron_mm.weights.export import write_directory
from megatron_mm.weights.names import Kind
from tests.foreign_code import plant
from tests.tiny import in_order, r4b_tensors, reference_models, tiny_config

WHOLE, LANGUAGE, VISION = "whole", "language", "vision"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
EVERYTHING = (slice(None),)
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """What is changed in which directory, and what the message has to say of it.

    Attributes:
        where: "whole", or which of two separate directories.
        said: parts of the one message.
    """

    where: str
    change: Change
    said: tuple[str, ...]


@pytest.fixture(scope="module")
def sound(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, and a ViT and a language model, that can be imported."""
    root = tmp_path_factory.mktemp("sound")
    config = tiny_config(model__language__vocab_size=390, model__language__num_kv_heads=4)
    siglip, qwen = reference_models(config)
    write_directory(
        root / WHOLE, config.model, tokenizer, in_order(config, r4b_tensors(config, siglip, qwen)), torch.float32
    )
    siglip.save_pretrained(root / VISION)
    qwen.save_pretrained(root / LANGUAGE)
    tokenizer.save(root / LANGUAGE)
    return root


def _plan(root: Path, is_whole: bool) -> ImportPlan:
    kinds: tuple[Kind, ...] = ("whole",) if is_whole else ("vision", "language")
    return plan_import(ImportOptions(root / "out", {kind: root / kind for kind in kinds}))


def _copied(sound: Path, root: Path) -> Path:
    return Path(shutil.copytree(sound, root / "copy"))


def field(name: str, value: Any) -> Change:
    """Set a field of config.json, in a section where there is a dot."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = section = json.loads(path.read_text(encoding="utf-8"))
        *outer, last = name.split(".")
        for part in outer:
            section = section[part]
        section[last] = value
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def rope(value: Any, name: str = "rope_parameters") -> Change:
    """Set the rotary embedding of a language model."""
    return field(name, value)


def cut(name: str) -> Change:
    """Leave half of a file."""

    def change(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return change


def written(name: str, content: str) -> Change:
    """Put another content into a file."""

    def change(directory: Path) -> None:
        (directory / name).write_text(content, encoding="utf-8")

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Change the tensors of a directory of one file."""

    def change(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        edit(found)
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})

    return change


def _adapter(directory: Path) -> None:
    save_file({"base_model.a.lora_A.weight": torch.zeros(2, 2)}, directory / "adapter_model.safetensors")


def _second_file(directory: Path) -> None:
    save_file({"more": torch.zeros(2, 2)}, directory / "consolidated.safetensors")


def _other_output(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].bfloat16()


def _quantised(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"] = found["model.norm.weight"].to(torch.int8)


ROPE_ONLY = "only rope_type default is supported"
# The cases of ../shared/cases/weights that are refused, in their order.
KNOWN: dict[str, Case] = {
    "yarn as type": Case(LANGUAGE, rope({"type": "yarn", "factor": 4.0, "rope_theta": 1e6}), ("yarn", ROPE_ONLY)),
    "linear as type": Case(LANGUAGE, rope({"type": "linear", "factor": 4.0, "rope_theta": 1e6}), ("linear", ROPE_ONLY)),
    "two thetas": Case(
        LANGUAGE, field("rope_theta", 5e6), ("rope_theta=5000000.0", "rope_parameters.rope_theta=1000000")
    ),
    "tokenizer.json cut": Case(LANGUAGE, cut("tokenizer.json"), ("language/tokenizer.json is not JSON",)),
    "tokenizer_config.json cut": Case(LANGUAGE, cut("tokenizer_config.json"), ("tokenizer_config.json is not JSON",)),
    "heads do not divide": Case(VISION, field("num_attention_heads", 5), ("num_attention_heads=5: does not divide",)),
    "397.0": Case(LANGUAGE, field("vocab_size", 397.0), ("vocab_size=397.0: not a whole number",)),
    "three numbers": Case(
        WHOLE, field("image_grid_pinpoints", [[32, 32, 32]]), ("image_grid_pinpoints", "[32, 32, 32]")
    ),
    "strings": Case(WHOLE, field("image_grid_pinpoints", ["32x32"]), ("image_grid_pinpoints", "holds '32x32'")),
    "text_config a name": Case(WHOLE, field("text_config", "qwen3"), ("text_config='qwen3': not an object",)),
    "pinpoints of 0": Case(WHOLE, field("image_grid_pinpoints", [[0, 32]]), ("image_grid_pinpoints", "holds [0, 32]")),
    "adapter": Case(LANGUAGE, _adapter, ("language holds an adapter (adapter_model.safetensors)", "merge it")),
}
# More of the same kinds.
MORE: dict[str, Case] = {
    "dynamic as rope_type": Case(LANGUAGE, rope({"rope_type": "dynamic", "factor": 2.0}), ("dynamic", ROPE_ONLY)),
    "llama3 as type in rope_scaling": Case(
        LANGUAGE, rope({"type": "llama3", "factor": 8.0}, "rope_scaling"), ("rope_scaling={'type': 'llama3'", ROPE_ONLY)
    ),
    "two kinds": Case(LANGUAGE, rope({"rope_type": "default", "type": "yarn", "rope_theta": 1e6}), ("yarn", ROPE_ONLY)),
    "a part of the dimensions": Case(
        WHOLE,
        field("text_config.rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("text_config.rope_parameters=", "only partial_rotary_factor 1"),
    ),
    "a factor without a kind": Case(LANGUAGE, rope({"factor": 4.0, "rope_theta": 1e6}), ("rope_parameters=", "factor")),
    "RoPE a name": Case(LANGUAGE, rope("yarn"), ("rope_parameters='yarn': not an object",)),
    "theta a text": Case(LANGUAGE, rope({"rope_theta": "1e6"}), ("rope_parameters.rope_theta='1e6': not a number",)),
    "two thetas in a section": Case(
        WHOLE,
        field("text_config.rope_theta", 5e6),
        ("text_config.rope_theta=5000000.0", "text_config.rope_parameters.rope_theta=1000000.0 differ"),
    ),
    "pointer for tokenizer.json": Case(
        LANGUAGE, written("tokenizer.json", LFS), ("language/tokenizer.json is a Git LFS pointer",)
    ),
    "pointer for config.json": Case(VISION, written("config.json", LFS), ("vision/config.json is a Git LFS pointer",)),
    "pointer for the weights": Case(
        VISION, written("model.safetensors", LFS), ("vision/model.safetensors is a Git LFS pointer",)
    ),
    "pointer for the index": Case(
        LANGUAGE, written("model.safetensors.index.json", LFS), ("model.safetensors.index.json is a Git LFS pointer",)
    ),
    "tokenizer.json of another kind": Case(
        LANGUAGE, written("tokenizer.json", '{"model": {}}'), ("the tokenizer in", "cannot be read")
    ),
    "tokenizer.json a list": Case(LANGUAGE, written("tokenizer.json", "[]"), ("tokenizer.json holds list",)),
    "config.json nested too deep": Case(
        VISION, written("config.json", "[" * 10**5), ("vision/config.json is not JSON",)
    ),
    "weights cut": Case(VISION, cut("model.safetensors"), ("vision/model.safetensors is cut off or damaged",)),
    "true for a layer": Case(WHOLE, field("vision_feature_layer", True), ("vision_feature_layer=True: one layer",)),
    "a text for a number": Case(VISION, field("hidden_size", "48"), ("hidden_size='48': not a whole number",)),
    "null for a number": Case(LANGUAGE, field("head_dim", None), ("head_dim=None: not a whole number",)),
    "NaN for a number": Case(
        LANGUAGE, field("rms_norm_eps", float("nan")), ("rms_norm_eps=nan: not a number above 0",)
    ),
    "a text for a truth": Case(
        LANGUAGE, field("tie_word_embeddings", "false"), ("tie_word_embeddings='false': neither true nor false",)
    ),
    "a list for a type": Case(LANGUAGE, field("model_type", ["qwen3"]), ("model_type=['qwen3']: supported are",)),
    "a text for a list": Case(
        WHOLE, field("architectures", "RForConditionalGeneration"), ("architectures='RForConditionalGeneration'",)
    ),
    "no section": Case(WHOLE, field("vision_config", None), ("vision_config=None: not an object",)),
    "heads of keys": Case(LANGUAGE, field("num_key_value_heads", 3), ("num_key_value_heads=3: does not divide",)),
    "an odd head": Case(LANGUAGE, field("head_dim", 7), ("head_dim=7: odd",)),
    "more layers than any model": Case(
        LANGUAGE, field("num_hidden_layers", 10**9), ("num_hidden_layers=1000000000: not",)
    ),
    "a wrong width": Case(LANGUAGE, field("hidden_size", 10**6), ("do not fit the model:", "embed_tokens.weight is")),
    "flat pinpoints": Case(WHOLE, field("image_grid_pinpoints", [32, 32]), ("image_grid_pinpoints", "holds 32")),
    "negative pinpoints": Case(WHOLE, field("image_grid_pinpoints", [[-32, 32]]), ("image_grid_pinpoints", "-32")),
    "pinpoints of true": Case(WHOLE, field("image_grid_pinpoints", [[True, 32]]), ("image_grid_pinpoints", "True")),
    "no pinpoints": Case(WHOLE, field("image_grid_pinpoints", None), ("image_grid_pinpoints=None: not a list",)),
    "a second file": Case(VISION, _second_file, ("holds consolidated.safetensors, model.safetensors, and no",)),
    "an output layer of another type": Case(
        LANGUAGE, tensors(_other_output), ("(lm_head.weight) of bfloat16", "it repeats is float32; pass --dtype")
    ),
    "a quantised weight": Case(LANGUAGE, tensors(_quantised), ("model.norm.weight in", "is torch.int8")),
}


@pytest.mark.parametrize("name", [*KNOWN, *MORE])
def test_a_fault_is_refused_with_one_message(name: str, sound: Path, tmp_path: Path) -> None:
    case = (KNOWN | MORE)[name]
    root = _copied(sound, tmp_path)
    case.change(root / case.where)
    with pytest.raises(InputError) as raised:
        _plan(root, is_whole=case.where == WHOLE)
    for part in case.said:
        assert part in str(raised.value)


def test_two_thetas_that_agree_null_and_other_spellings_are_plain_rope(sound: Path, tmp_path: Path) -> None:
    root = _copied(sound, tmp_path)
    theta = 10000.0
    for value in ({"type": "default", "rope_theta": theta}, {"rope_theta": theta, "mrope_section": [1, 1, 2]}, None):
        rope(value)(root / LANGUAGE)
        assert _plan(root, is_whole=False).model.language.rope_theta == theta, value
    field("rope_theta", 5e6)(root / LANGUAGE)
    assert _plan(root, is_whole=False).model.language.rope_theta == 5e6
    rope({"rope_theta": 5e6})(root / LANGUAGE)
    assert _plan(root, is_whole=False).model.language.rope_theta == 5e6


def _with_buffers(found: dict[str, torch.Tensor]) -> None:
    found["position_ids"] = torch.arange(8)[None]
    found["model.layers.0.self_attn.mask"] = torch.ones(4, 4, dtype=torch.bool)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def test_buffers_are_left_out_whatever_their_type(sound: Path, tmp_path: Path) -> None:
    root = _copied(sound, tmp_path)
    tensors(_with_buffers)(root / LANGUAGE)
    tensors(lambda found: found.update({"embeddings.position_ids": torch.arange(4)[None]}))(root / VISION)
    notes = _plan(root, is_whole=False).source.notes
    assert "left out position_ids: a buffer that old versions saved" in notes
    assert "left out embeddings.position_ids: a buffer that old versions saved" in notes
    assert "left out model.layers.0.self_attn.mask: a buffer, by its type" in notes
    assert "left out model.layers.0.self_attn.rotary_emb.inv_freq: a buffer that old versions saved" in notes


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("inf"), None), (3.4e38, torch.bfloat16)])
def test_values_that_are_no_numbers_are_named_when_they_are_read(
    value: float, dtype: torch.dtype | None, sound: Path, tmp_path: Path
) -> None:
    root = _copied(sound, tmp_path)

    def spoil(found: dict[str, torch.Tensor]) -> None:
        found["model.norm.weight"][[1, 5]] = value

    tensors(spoil)(root / LANGUAGE)
    options = ImportOptions(root / "out", {"vision": root / VISION, "language": root / LANGUAGE}, dtype=dtype)
    source = plan_import(options).source
    with pytest.raises(InputError) as raised:
        source.tensors["model.language_model.norm.weight"][EVERYTHING]
    reason = "NaN or infinite" if dtype is None else "too large for torch.bfloat16"
    file = root / LANGUAGE / "model.safetensors"
    assert f"{file}: model.norm.weight has 2 of 128 values that are {reason}" in str(raised.value)
    assert source.tensors["model.language_model.embed_tokens.weight"][EVERYTHING].isfinite().all()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "Qwen2Tokenizer", "OwnTokenizer"])
def test_no_code_of_a_directory_is_run_and_nobody_is_asked(
    is_whole: bool, tokenizer_class: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, marker = _copied(sound, tmp_path), tmp_path / "marker"
    for kind in (WHOLE, LANGUAGE, VISION):
        plant(root / kind, marker)
    for kind in (WHOLE, LANGUAGE):
        settings = json.loads((root / kind / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"] = tokenizer_class
        (root / kind / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    # As the released R-4B does.
    field("model_type", "own")(root / WHOLE)
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    plan = _plan(root, is_whole)
    plan.tokenizer.save(root / "saved")
    assert "own." not in (root / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="model_type='own'"):
        TileRules.of_directory(root / WHOLE)
    assert answers.tell() == 0
    assert not marker.exists()


def test_vllm_is_told_to_run_no_code() -> None:
    assert engine_arguments(Path("model"), "float32")["trust_remote_code"] is False


def test_a_directory_for_evaluation_is_judged_like_one_for_import(sound: Path, tmp_path: Path) -> None:
    root = _copied(sound, tmp_path)
    for name, value in (("vision_config", "siglip"), ("image_grid_pinpoints", [32, 32]), ("vision_aspect_ratio", None)):
        directory = Path(shutil.copytree(root / WHOLE, root / name))
        field(name, value)(directory)
        with pytest.raises(InputError, match=r"config\.json is not of a model that `megatron-mm export` wrote"):
            TileRules.of_directory(directory)
