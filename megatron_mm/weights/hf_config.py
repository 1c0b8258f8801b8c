"""config.json of the directories that people have -> our model config; every field that we do not follow is refused."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import (
    GenerationConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from megatron_mm.chat.images import grids_of_pinpoints
from megatron_mm.config.errors import InputError
from megatron_mm.config.json_files import read_json_object
from megatron_mm.config.schema import ModelConfig
from megatron_mm.weights.hf_fields import Section, rope_theta

CONFIG = "config.json"
# More than any model has; what is made of the config takes time and memory for each of them.
_MOST_LAYERS, _MOST_EXPERTS = 1024, 4096
R4B = "RForConditionalGeneration"
_LANGUAGES = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
# Fields that say nothing about the numbers that the model computes.
_IRRELEVANT = {
    *PreTrainedConfig().to_dict(),
    *GenerationConfig().to_dict(),
    *("model_type", "torch_dtype", "use_cache", "_attn_implementation_autoset", "auto_map"),
    *("initializer_range", "initializer_factor", "bos_token_id", "eos_token_id", "pad_token_id"),
}
# Fields that must have one of these values; absent, transformers' own default has.
_VISION_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "attention_dropout": (0, 0.0),
    "model_type": ("siglip_vision_model",),
}
_LANGUAGE_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
}
_EXPERTS_FIXED: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "norm_topk_prob": (True,),
}
_WHOLE_FIXED: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("full",),
    "use_image_newline_parameter": (True,),
}
_VISION_READ = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("layer_norm_eps", "vision_use_head", "projection_dim"),
}
_LANGUAGE_READ = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_parameters", "rope_scaling"),
    *("tie_word_embeddings", "layer_types", "sliding_window", "max_window_layers"),
}
_EXPERTS_READ = {
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("router_aux_loss_coef", "output_router_logits"),
}
_WHOLE_READ = {
    *("vision_config", "text_config", "image_token_index", "image_token_id", "image_grid_pinpoints"),
    *("vision_aspect_ratio", "vision_feature_layer", "tie_word_embeddings", "video_token_index", "video_token_id"),
    *("image_seq_length", "ignore_index"),
}


@dataclass(frozen=True, slots=True)
class FoundModel:
    """What a directory's config says.

    Attributes:
        model: our config of it.
        image_token: id of the placeholder; None where the directory is of a language model alone.
    """

    model: ModelConfig
    image_token: int | None


def read_whole(directory: Path, ignored: Collection[str] = ()) -> FoundModel:
    """The model of an R-4B, LlavaOnevision or LlavaNext directory.

    Args:
        ignored: fields that the user says do not matter.

    Raises:
        InputError: no config.json, or one that we do not follow, with every field and reason.
    """
    given = _read(directory)
    is_r4b = _is_r4b(directory, given)
    model_type = given.get("model_type")
    if not is_r4b and model_type not in ("llava_onevision", "llava_next"):
        raise InputError(
            f"{directory / CONFIG} is of a {model_type!r} model; supported are {R4B}, llava_onevision, llava_next, and "
            "a SigLIP with a Qwen3 as two directories (--vision, --language)"
        )
    faults: list[str] = []
    next_style = model_type == "llava_next" and not is_r4b
    top = Section("", given, (LlavaNextConfig if next_style else LlavaOnevisionConfig)().to_dict(), faults)
    sections = [top.section(field) for field in ("vision_config", "text_config")]
    _raise(directory, faults)
    top.check(_WHOLE_FIXED, _WHOLE_READ, _IRRELEVANT, ignored)
    vision = _vision("vision_config.", sections[0], faults, ignored)
    language = _language("text_config.", sections[1], faults, ignored)
    if "tie_word_embeddings" not in sections[1] and "tie_word_embeddings" in given:
        language["tied_embeddings"] = top.truth("tie_word_embeddings")
    vision["drop_last_layers"] = _dropped_layers(top, vision["num_layers"])
    if next_style and top.value("vision_feature_select_strategy") != "full":
        top.fault("vision_feature_select_strategy", "a SigLIP has no class token to drop; only 'full' is supported")
    grids = _grids(top, vision["image_size"])
    if next_style:
        max_tiles = max((rows * columns for rows, columns in grids), default=1)  # never scaled down
    else:
        max_tiles = re.fullmatch(r"anyres_max_([1-9]\d{0,8})", str(top.value("vision_aspect_ratio")))
        max_tiles = int(max_tiles[1]) if max_tiles else top.fault("vision_aspect_ratio", "only anyres_max_N")
    image_token = _image_token(top)
    _raise(directory, faults)
    tree = {
        "vision": vision,
        "projector": {"pre_norm": is_r4b},
        "language": language,
        "tile_grids": grids,
        "max_tiles": max_tiles,
        "multi_image": "square" if model_type == "llava_onevision" and not is_r4b else "anyres",
    }
    return FoundModel(_model(directory, tree), image_token)


def read_parts(vision: Path, language: Path, ignored: Collection[str] = ()) -> FoundModel:
    """The model that a SigLIP (or SigLIP2 of fixed resolution) and a Qwen3 directory make, with R-4B's projector.

    Raises:
        InputError: as `read_whole`.
    """
    tree = {"vision": _read_vision(vision, ignored), "language": _read_language(language, ignored)}
    return FoundModel(_model(language, tree), None)


# What a model may have otherwise than the weights' config says, without any tensor meaning something else.
_BRIDGED = {
    "vision": {"preset", "drop_last_layers", "image_size", "init_std", "parallel"},
    "projector": {"init_std"},
    "language": {"preset", "tied_embeddings", "max_positions", "init_std"},
}


def check_bridged(found: ModelConfig, wanted: ModelConfig, *, fresh_projector: bool) -> None:
    """Compare the weights' own config with the model that they are wanted for.

    Args:
        fresh_projector: whether the projector is drawn, so that the weights say nothing about it.

    Raises:
        InputError: they differ in what conversion cannot bridge, with every field and both values.
    """
    faults = []
    sections = [("vision", found.vision, wanted.vision), ("language", found.language, wanted.language)]
    if not fresh_projector:
        sections.append(("projector", found.projector, wanted.projector))
    for name, theirs, ours in sections:
        faults += [
            f"  model.{name}.{field}: {getattr(ours, field)}; the weights have {getattr(theirs, field)}"
            for field in type(ours).model_fields
            if field not in _BRIDGED[name] and getattr(ours, field) != getattr(theirs, field)
        ]
    if wanted.language.tied_embeddings and not found.language.tied_embeddings:
        faults.append("  model.language.tied_embeddings: true; the weights have an output layer of their own")
    if faults:
        raise InputError("\n".join(["the weights are of another model than is asked for:", *faults]))


def _is_r4b(directory: Path, given: Mapping[str, Any]) -> bool:
    """Whether the architecture is R-4B's, whatever the type of its config and whatever code it names."""
    architectures = given.get("architectures") or []
    if not isinstance(architectures, list):
        _raise(directory, [f"  architectures={architectures!r}: not a list of names"])
    return R4B in architectures


def _dropped_layers(top: Section, num_layers: int) -> int:
    """Layers behind the one that features are taken from: hidden_states[k] comes after k layers, -1 is the last."""
    layer = top.value("vision_feature_layer")
    if not isinstance(layer, int) or isinstance(layer, bool) or not -num_layers <= layer <= num_layers or layer == 0:
        top.fault("vision_feature_layer", f"one layer of the ViT's {num_layers}, -1 for the last")
        return 0
    return num_layers - layer if layer > 0 else -1 - layer


def _grids(top: Section, tile: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of tiles."""
    try:
        return grids_of_pinpoints(top.value("image_grid_pinpoints"), tile)
    except ValueError as error:
        top.fault("image_grid_pinpoints", str(error))
        return ()


def _image_token(top: Section) -> int:
    names = [name for name in ("image_token_index", "image_token_id") if name in top.given] or ["image_token_index"]
    found = [top.integer(name, least=0) for name in names]
    if len(set(found)) > 1:
        top.fault(names[0], f"and {names[1]}={found[1]} differ; remove the wrong one")
    return found[0]


def _read_vision(directory: Path, ignored: Collection[str]) -> dict[str, Any]:
    given = _read(directory)
    faults: list[str] = []
    section = Section("", given, {}, faults)
    name = ""
    if given.get("model_type") == "siglip":
        name, given = "vision_config.", section.section("vision_config")
    elif given.get("model_type") != "siglip_vision_model":
        section.fault("model_type", "supported are siglip (SigLIP and SigLIP2 of fixed size), siglip_vision_model")
    _raise(directory, faults)
    found = _vision(name, given, faults, ignored)
    _raise(directory, faults)
    return found


def _read_language(directory: Path, ignored: Collection[str]) -> dict[str, Any]:
    faults: list[str] = []
    found = _language("", _read(directory), faults, ignored)
    _raise(directory, faults)
    return found


def _vision(name: str, given: Mapping[str, Any], faults: list[str], ignored: Collection[str]) -> dict[str, Any]:
    section = Section(name, given, SiglipVisionConfig().to_dict(), faults)
    section.check(_VISION_FIXED, _VISION_READ, _IRRELEVANT, ignored)
    found = {
        "num_layers": section.integer("num_hidden_layers", _MOST_LAYERS),
        "hidden_size": section.integer("hidden_size"),
        "num_heads": section.integer("num_attention_heads"),
        "ffn_hidden_size": section.integer("intermediate_size"),
        "image_size": section.integer("image_size"),
        "patch_size": section.integer("patch_size"),
        "norm_eps": section.number("layer_norm_eps"),
    }
    if not faults:
        section.divides("num_attention_heads", "hidden_size")
        if found["patch_size"] > found["image_size"]:
            section.fault("patch_size", f"larger than image_size={found['image_size']}")
    return found


def _language(name: str, given: Mapping[str, Any], faults: list[str], ignored: Collection[str]) -> dict[str, Any]:
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in _LANGUAGES:
        Section(name, given, {}, faults).fault("model_type", f"supported are {', '.join(_LANGUAGES)}")
        return {}
    section = Section(name, given, _LANGUAGES[model_type]().to_dict(), faults)
    with_experts = model_type == "qwen3_moe"
    fixed = _LANGUAGE_FIXED | (_EXPERTS_FIXED if with_experts else {})
    read = {*_LANGUAGE_READ, *(_EXPERTS_READ if with_experts else ())}
    section.check(fixed, read, _IRRELEVANT, ignored)
    if with_experts and section.value("norm_topk_prob") is not True and "norm_topk_prob" not in given:
        section.fault("norm_topk_prob", "only True is supported")
    layer_types = section.value("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list) and set(map(str, layer_types)) == {"full_attention"}
    ):
        section.fault("layer_types", "only full_attention is supported")
    # transformers takes as many as there are heads where it is null.
    kv_heads = "num_attention_heads" if section.value("num_key_value_heads") is None else "num_key_value_heads"
    found: dict[str, Any] = {
        "num_layers": section.integer("num_hidden_layers", _MOST_LAYERS),
        "hidden_size": section.integer("hidden_size"),
        "num_heads": section.integer("num_attention_heads"),
        "num_kv_heads": section.integer(kv_heads),
        "head_dim": section.integer("head_dim"),
        "ffn_hidden_size": section.integer("intermediate_size"),
        "vocab_size": section.integer("vocab_size"),
        "max_positions": section.integer("max_position_embeddings"),
        "rope_theta": rope_theta(section, ignored),
        "norm_eps": section.number("rms_norm_eps"),
        "tied_embeddings": section.truth("tie_word_embeddings"),
    }
    if with_experts:
        found["experts"] = _experts(section)
    if not faults:
        section.divides(kv_heads, "num_attention_heads")
        if found["head_dim"] % 2:
            section.fault("head_dim", "odd; rotary position embeddings turn pairs of it")
    return found


def _experts(section: Section) -> dict[str, Any]:
    names = [name for name in ("num_experts", "num_local_experts") if name in section.given] or ["num_experts"]
    found = [section.integer(name, _MOST_EXPERTS, least=2) for name in names]
    if len(set(found)) > 1:
        section.fault(names[0], f"and {names[1]}={found[1]} differ; remove the wrong one")
    return {
        "num_experts": found[0],
        "experts_per_token": section.integer("num_experts_per_tok", most=found[0]),
        "ffn_hidden_size": section.integer("moe_intermediate_size"),
    }


def _model(directory: Path, tree: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        # Every field has been judged under its name in the file; this is for what our own sections forbid beyond that.
        faults = [f"  {'.'.join(map(str, fault['loc'])) or 'model'}: {fault['msg']}" for fault in error.errors()]
        _raise(directory, faults)
        raise


def _read(directory: Path) -> dict[str, Any]:
    try:
        return read_json_object(directory / CONFIG)
    except FileNotFoundError:
        raise InputError(f"no model in {directory} ({CONFIG} is missing)") from None


def _raise(directory: Path, faults: list[str]) -> None:
    if faults:
        raise InputError("\n".join([f"{directory / CONFIG} describes a model that is not supported:", *faults]))
