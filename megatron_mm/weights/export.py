"""A Hugging Face directory: R-4B's, which vLLM has natively, or LLaVA-OneVision's, which transformers has as well."""

import copy
from collections.abc import Iterable
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from megatron_mm.chat.images import DOWNSCALE_ABOVE, PIXEL_MEAN, PIXEL_STD
from megatron_mm.chat.template import chat_template
from megatron_mm.chat.tokenizer import IMAGE, PAD, TURN_END, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import LanguageConfig, ModelConfig
from megatron_mm.files import appearing_whole
from megatron_mm.weights.files import write_shards
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.modeling_r4b import PRE_NORM_EPS
from megatron_mm.weights.tables import VISION, model_table


class Format(StrEnum):
    """Which model a directory is of, for those who read it."""

    R4B = "r4b"
    ONEVISION = "llava_onevision"


SHARD_BYTES = 2**30
VIDEO = "<video>"
_ARCHITECTURES = {Format.R4B: "RForConditionalGeneration", Format.ONEVISION: "LlavaOnevisionForConditionalGeneration"}


def write_directory(
    directory: Path,
    model: ModelConfig,
    tokenizer: ChatTokenizer,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    form: Format = Format.R4B,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, config, tokenizer, processor and chat template; the directory appears when it is complete.

    Args:
        directory: must not exist yet.
        model: of the weights.
        tokenizer: of the model.
        tensors: (name, tensor) as `weights.stream.to_hf` yields them, in the order of `weights.tables.model_table`.
        dtype: of the tensors.
        form: whom it is for.
        shard_bytes: largest size of a file; as much is in memory.

    Raises:
        InputError: the directory exists, the format cannot say what the model is, or what was written cannot be read
            back.
    """
    check_format(model, form)
    shapes = list(hf_shapes(model_table(model)).items())
    if form is Format.ONEVISION:
        # transformers' ViT has a final norm behind the features that are taken, and complains where it is missing.
        filler = _unused_norm(model, dtype)
        tensors = chain(tensors, filler.items())
        shapes += [(name, tuple(tensor.shape)) for name, tensor in filler.items()]
    hf = tokenizer.hf if form is Format.R4B else _with_video_token(tokenizer, model.language.vocab_size)
    with appearing_whole(directory) as partial:
        write_shards(partial, tensors, shapes, dtype, shard_bytes)
        _describe(partial, model, tokenizer, dtype, form, hf)


def write_description(directory: Path, model: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype) -> None:
    """What `write_directory` writes in R-4B's format but for the weights, which an engine takes from a trainer.

    Raises:
        InputError: the directory exists, or the format cannot say what the model is.
    """
    check_format(model, Format.R4B)
    with appearing_whole(directory) as partial:
        _describe(partial, model, tokenizer, dtype, Format.R4B, tokenizer.hf)


def _describe(
    directory: Path,
    model: ModelConfig,
    tokenizer: ChatTokenizer,
    dtype: torch.dtype,
    form: Format,
    hf: PreTrainedTokenizerFast,
) -> None:
    _config(model, tokenizer, dtype, form, hf.get_added_vocab().get(VIDEO)).save_pretrained(directory)
    _generation_config(tokenizer).save_pretrained(directory)
    _processor(model, hf, form).save_pretrained(directory)


def check_format(model: ModelConfig, form: Format) -> None:
    """Raise `InputError` naming everything about the model that a format, as its readers take it, cannot say."""
    faults = _faults_for_r4b(model) if form is Format.R4B else _faults_for_onevision(model)
    if faults:
        raise InputError("\n".join([f"the model cannot be exported as {form}:", *faults]))


def _faults_for_r4b(model: ModelConfig) -> list[str]:
    faults = []
    limit = DOWNSCALE_ABOVE**2 * model.max_tiles
    large = [list(grid) for grid in model.tile_grids if grid[0] * grid[1] > limit]
    if large:
        faults.append(
            f"model.tile_grids {large} are scaled down at model.max_tiles={model.max_tiles}, which vLLM's placeholder "
            f"count does not know; use grids of at most {int(limit)} tiles"
        )
    if model.multi_image != "anyres":
        faults.append(f"model.multi_image={model.multi_image}: vLLM cuts every picture by the grids; use anyres")
    if not model.projector.pre_norm:
        faults.append("model.projector.pre_norm=false: R-4B's projector has the norm; llava_onevision's has not")
    elif model.projector.norm_eps != PRE_NORM_EPS:
        faults.append(f"model.projector.norm_eps={model.projector.norm_eps}: vLLM's is {PRE_NORM_EPS}")
    return faults


def _faults_for_onevision(model: ModelConfig) -> list[str]:
    faults = []
    if model.projector.pre_norm:
        faults.append("model.projector.pre_norm=true: LLaVA-OneVision's projector has no norm; r4b's has")
    if model.multi_image != "square":
        faults.append(
            f"model.multi_image={model.multi_image}: LLaVA-OneVision's processor gives each of several pictures one "
            "square tile; use square"
        )
    return faults


def _with_video_token(tokenizer: ChatTokenizer, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with a place for videos, which nothing teaches, but without which vLLM does not start."""
    if len(tokenizer) >= vocab_size:
        raise InputError(
            f"the tokenizer's {len(tokenizer)} tokens fill model.language.vocab_size={vocab_size}: no id is left for "
            f"{VIDEO}, which LLaVA-OneVision's readers want; resize the embedding, or export as r4b"
        )
    hf = copy.deepcopy(tokenizer.hf)
    hf.add_tokens([AddedToken(VIDEO, special=True, normalized=False)], special_tokens=True)
    return hf


def _unused_norm(model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    width = model.vision.hidden_size
    return {
        f"{VISION}post_layernorm.weight": torch.ones(width, dtype=dtype),
        f"{VISION}post_layernorm.bias": torch.zeros(width, dtype=dtype),
    }


def _config(
    model: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype, form: Format, video_token: int | None
) -> LlavaOnevisionConfig:
    vision, language = model.vision, model.language
    # Read by SiglipVisionModel, though no field of the config.
    no_pooling_head: dict[str, Any] = {"vision_use_head": False}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_hidden_layers=vision.used_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
            **no_pooling_head,
        ),
        text_config=_text_config(language, tokenizer),
        image_token_index=tokenizer.control(IMAGE),
        image_grid_pinpoints=_pinpoints(model),
        vision_feature_select_strategy="full",
        # The last layer there is: dropped ones are not written.
        vision_feature_layer=-1,
        vision_aspect_ratio=f"anyres_max_{model.max_tiles}",
        tie_word_embeddings=language.tied_embeddings,
    )
    if video_token is not None:
        config.video_token_index = video_token
    config.architectures = [_ARCHITECTURES[form]]
    config.dtype = dtype
    return config


def _text_config(language: LanguageConfig, tokenizer: ChatTokenizer) -> Qwen3Config | Qwen3MoeConfig:
    shared: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "max_position_embeddings": language.max_positions,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "tie_word_embeddings": language.tied_embeddings,
        "eos_token_id": tokenizer.control(TURN_END),
        "pad_token_id": tokenizer.control(PAD),
    }
    if language.experts is None:
        return Qwen3Config(**shared)
    return Qwen3MoeConfig(
        **shared,
        num_experts=language.experts.num_experts,
        num_experts_per_tok=language.experts.experts_per_token,
        moe_intermediate_size=language.experts.ffn_hidden_size,
        norm_topk_prob=True,
    )


def _generation_config(tokenizer: ChatTokenizer) -> GenerationConfig:
    end, pad = tokenizer.control(TURN_END), tokenizer.control(PAD)
    return GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)


def _processor(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, form: Format
) -> LlavaNextProcessor | LlavaOnevisionProcessor:
    side = model.vision.image_size
    size = {"height": side, "width": side}
    images: dict[str, Any] = {
        "image_grid_pinpoints": _pinpoints(model),
        "size": size,
        "resample": 3,  # bicubic, as chat/images.py
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vision_feature_select_strategy": "full",
        "image_token": IMAGE,
        "chat_template": chat_template(tokenizer.get_added_vocab()),
    }
    if form is Format.R4B:
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessor(crop_size=size, do_center_crop=False, **images),
            patch_size=model.vision.patch_size,
            num_additional_image_tokens=0,
            **shared,
        )
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**images),
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=model.vision.patches_per_tile,
        vision_aspect_ratio=f"anyres_max_{model.max_tiles}",
        **shared,
    )


def _pinpoints(model: ModelConfig) -> list[list[int]]:
    """The grids as (height, width) in pixels."""
    side = model.vision.image_size
    return [[rows * side, columns * side] for rows, columns in model.tile_grids]
