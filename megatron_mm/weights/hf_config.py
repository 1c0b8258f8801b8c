"""config.json of the directories that people have -> our model config; every field that we do not follow is refused."""

import json
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

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import ModelConfig

CONFIG = "config.json"
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
    "rope_scaling": (None,),
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
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters"),
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


class _Section:
    """One section of a config.json, with the faults that are found in it."""

    def __init__(self, name: str, given: Mapping[str, Any], faults: list[str]):
        self.name, self.given, self.faults = name, given, faults

    def check(self, fixed: Mapping[str, tuple[Any, ...]], read: Collection[str], ignored: Collection[str]) -> None:
        """Note every field with a value that we do not follow, and every unknown one."""
        for field, value in self.given.items():
            if field in ignored:
                continue
            if field in fixed:
                if value not in fixed[field]:
                    self.fault(field, f"only {' or '.join(map(repr, fixed[field]))} is supported")
            elif field not in read and field not in _IRRELEVANT:
                self.fault(field, "unknown; where it does not change the model, pass --ignore-field " + field)

    def fault(self, field: str, why: str) -> None:
        """Note that a field cannot be followed."""
        self.faults.append(f"  {self.name}{field}={self.given.get(field)!r}: {why}")


def read_whole(directory: Path, ignored: Collection[str] = ()) -> FoundModel:
    """The model of an R-4B, LlavaOnevision or LlavaNext directory.

    Args:
        ignored: fields that the user says do not matter.

    Raises:
        InputError: no config.json, or one that we do not follow, with every field and reason.
    """
    given = _read(directory)
    is_r4b = R4B in (given.get("architectures") or ())
    model_type = given.get("model_type")
    if not is_r4b and model_type not in ("llava_onevision", "llava_next"):
        raise InputError(
            f"{directory / CONFIG} is of a {model_type!r} model; supported are {R4B}, llava_onevision, llava_next, and "
            "a SigLIP with a Qwen3 as two directories (--vision, --language)"
        )
    faults: list[str] = []
    top = _Section("", given, faults)
    top.check(_WHOLE_FIXED, _WHOLE_READ, ignored)
    vision = _vision(_Section("vision_config.", given.get("vision_config") or {}, faults), ignored)
    text = given.get("text_config") or {}
    language = _language(_Section("text_config.", text, faults), ignored)
    if "tie_word_embeddings" not in text and "tie_word_embeddings" in given:
        language["tied_embeddings"] = given["tie_word_embeddings"]
    next_style = model_type == "llava_next" and not is_r4b
    defaults = (LlavaNextConfig if next_style else LlavaOnevisionConfig)().to_dict()
    value = {**defaults, **given}
    layer = value["vision_feature_layer"]
    num_layers = vision.get("num_layers", 0)
    if not isinstance(layer, int) or not -num_layers <= layer <= num_layers or layer == 0:
        top.fault("vision_feature_layer", "one layer of the ViT, -1 for the last")
    else:
        # hidden_states[k] comes after k layers; -1 is the last.
        vision["drop_last_layers"] = num_layers - layer if layer > 0 else -1 - layer
    if next_style and value["vision_feature_select_strategy"] != "full":
        top.fault("vision_feature_select_strategy", "a SigLIP has no class token to drop; only 'full' is supported")
    grids = _grids(top, value["image_grid_pinpoints"], vision.get("image_size", 0))
    if next_style:
        max_tiles = max((rows * columns for rows, columns in grids), default=1)  # never scaled down
    else:
        max_tiles = re.fullmatch(r"anyres_max_([1-9]\d*)", str(value["vision_aspect_ratio"]))
        max_tiles = int(max_tiles[1]) if max_tiles else top.fault("vision_aspect_ratio", "only anyres_max_N")
    _raise(directory, faults)
    tree = {
        "vision": vision,
        "projector": {"pre_norm": is_r4b},
        "language": language,
        "tile_grids": grids,
        "max_tiles": max_tiles,
        "multi_image": "square" if model_type == "llava_onevision" and not is_r4b else "anyres",
    }
    image_token = given.get("image_token_index", given.get("image_token_id", defaults["image_token_index"]))
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


def _read_vision(directory: Path, ignored: Collection[str]) -> dict[str, Any]:
    given = _read(directory)
    faults: list[str] = []
    if given.get("model_type") == "siglip":
        section = _Section("vision_config.", given.get("vision_config") or {}, faults)
    else:
        section = _Section("", given, faults)
        if given.get("model_type") != "siglip_vision_model":
            section.fault("model_type", "supported are siglip (SigLIP and SigLIP2 of fixed size), siglip_vision_model")
    found = _vision(section, ignored)
    _raise(directory, faults)
    return found


def _read_language(directory: Path, ignored: Collection[str]) -> dict[str, Any]:
    faults: list[str] = []
    found = _language(_Section("", _read(directory), faults), ignored)
    _raise(directory, faults)
    return found


def _vision(section: _Section, ignored: Collection[str]) -> dict[str, Any]:
    section.check(_VISION_FIXED, _VISION_READ, ignored)
    value = SiglipVisionConfig().to_dict() | dict(section.given)
    return {
        "num_layers": value["num_hidden_layers"],
        "hidden_size": value["hidden_size"],
        "num_heads": value["num_attention_heads"],
        "ffn_hidden_size": value["intermediate_size"],
        "image_size": value["image_size"],
        "patch_size": value["patch_size"],
        "norm_eps": value["layer_norm_eps"],
    }


def _language(section: _Section, ignored: Collection[str]) -> dict[str, Any]:
    model_type = section.given.get("model_type")
    if model_type not in _LANGUAGES:
        section.fault("model_type", f"supported are {', '.join(_LANGUAGES)}")
        return {}
    with_experts = model_type == "qwen3_moe"
    fixed = _LANGUAGE_FIXED | (_EXPERTS_FIXED if with_experts else {})
    section.check(fixed, {*_LANGUAGE_READ, *(_EXPERTS_READ if with_experts else ())}, ignored)
    value = _LANGUAGES[model_type]().to_dict() | dict(section.given)
    if with_experts and value["norm_topk_prob"] is not True:
        section.fault("norm_topk_prob", "only True is supported")
    rope = value.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        section.fault("rope_parameters", "only rope_type default is supported")
    if set(value.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        section.fault("layer_types", "only full_attention is supported")
    # Versions before 5 write it at the top; where both are there, they were made from one another.
    theta = section.given.get("rope_theta", rope.get("rope_theta"))
    found = {
        "num_layers": value["num_hidden_layers"],
        "hidden_size": value["hidden_size"],
        "num_heads": value["num_attention_heads"],
        "num_kv_heads": value["num_key_value_heads"],
        "head_dim": value.get("head_dim") or value["hidden_size"] // value["num_attention_heads"],
        "ffn_hidden_size": value["intermediate_size"],
        "vocab_size": value["vocab_size"],
        "max_positions": value["max_position_embeddings"],
        "rope_theta": theta,
        "norm_eps": value["rms_norm_eps"],
        "tied_embeddings": bool(value.get("tie_word_embeddings")),
    }
    if with_experts:
        found["experts"] = {
            "num_experts": section.given.get("num_experts", value.get("num_local_experts")),
            "experts_per_token": value["num_experts_per_tok"],
            "ffn_hidden_size": value["moe_intermediate_size"],
        }
    return found


def _model(directory: Path, tree: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(map(str, fault['loc']))}={fault['input']!r}: {fault['msg']}" for fault in error.errors()
        ]
        _raise(directory, faults)
        raise


def _grids(top: _Section, pinpoints: Any, tile: int) -> list[tuple[int, int]]:
    """(rows, columns) of tiles from (height, width) in pixels."""
    if not isinstance(pinpoints, list) or not pinpoints or not tile:
        top.fault("image_grid_pinpoints", "a list of (height, width) in pixels")
        return []
    grids = [(height // tile, width // tile) for height, width in pinpoints]
    if [[rows * tile, columns * tile] for rows, columns in grids] != [list(pinpoint) for pinpoint in pinpoints]:
        top.fault("image_grid_pinpoints", f"heights and widths that vision_config.image_size={tile} divides")
    return grids


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no model in {directory} ({CONFIG} is missing)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f"{path} holds no fields")
    return given


def _raise(directory: Path, faults: list[str]) -> None:
    if faults:
        raise InputError("\n".join([f"{directory / CONFIG} describes a model that is not supported:", *faults]))
