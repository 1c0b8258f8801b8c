"""A Hugging Face directory in R-4B's layout, which vLLM serves with its own RForConditionalGeneration."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from megatron_mm.chat import modes
from megatron_mm.chat.images import DOWNSCALE_ABOVE, PIXEL_MEAN, PIXEL_STD
from megatron_mm.chat.modes import TEMPLATE_NAMES, TRIGGERS, Mode
from megatron_mm.chat.tokenizer import IMAGE, PAD, TURN_END, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import ModelConfig
from megatron_mm.files import appearing_whole


def write_directory(
    directory: Path, model: ModelConfig, tokenizer: ChatTokenizer, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write weights, config, tokenizer, processor and chat template; the directory appears when it is complete.

    Args:
        directory: must not exist yet.
        model: of the weights.
        tokenizer: of the model.
        tensors: (name, tensor) as `weights.stream.to_hf` yields them.

    Raises:
        InputError: the directory exists, or R-4B's format cannot say what the model is.
    """
    check_format(model)
    with appearing_whole(directory) as partial:
        weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)  # safetensors makes it private
        (dtype,) = {tensor.dtype for tensor in weights.values()}
        _config(model, tokenizer, dtype).save_pretrained(partial)
        _generation_config(tokenizer).save_pretrained(partial)
        _processor(model, tokenizer).save_pretrained(partial)


def check_format(model: ModelConfig) -> None:
    """Raise `InputError` naming everything about the model that R-4B's format, as vLLM reads it, cannot say."""
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
    if model.language.experts is not None:
        faults.append("model.language.experts: written for dense language models only")
    if not model.projector.pre_norm:
        faults.append("model.projector.pre_norm=false: R-4B's projector has the norm")
    if faults:
        raise InputError("\n".join(["the model cannot be exported in R-4B's format:", *faults]))


def chat_template() -> str:
    """ChatML with the three modes of R-4B as `thinking_mode`: auto (default), long and short."""
    # The triggers as jinja string literals.
    triggers = {name: TRIGGERS[mode].replace("\n", "\\n") for mode, name in TEMPLATE_NAMES.items()}
    return (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message.role + '\\n' -}}"
        "{%- if message.content is string -%}{{- message.content -}}"
        "{%- else -%}{%- for part in message.content -%}"
        "{%- if part.type in ('image', 'image_url') -%}{{- '" + IMAGE + "\\n' -}}"
        "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|im_start|>assistant\\n' -}}"
        "{%- if thinking_mode is defined and thinking_mode == '" + TEMPLATE_NAMES[Mode.THINKING] + "' -%}"
        "{{- '" + triggers[TEMPLATE_NAMES[Mode.THINKING]] + "' -}}"
        "{%- elif thinking_mode is defined and thinking_mode == '" + TEMPLATE_NAMES[Mode.NON_THINKING] + "' -%}"
        "{{- '" + triggers[TEMPLATE_NAMES[Mode.NON_THINKING]] + "' -}}"
        "{%- else -%}{{- '" + modes.THINK + "' -}}{%- endif -%}"
        "{%- endif -%}"
    )


def _config(model: ModelConfig, tokenizer: ChatTokenizer, dtype: torch.dtype) -> LlavaOnevisionConfig:
    vision, language = model.vision, model.language
    # Read by SiglipVisionModel, though no field of the config.
    no_pooling_head: dict[str, Any] = {"vision_use_head": False}
    end, pad = tokenizer.control(TURN_END), tokenizer.control(PAD)
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
        text_config=Qwen3Config(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            max_position_embeddings=language.max_positions,
            rms_norm_eps=language.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
            tie_word_embeddings=language.tied_embeddings,
            eos_token_id=end,
            pad_token_id=pad,
        ),
        image_token_index=tokenizer.control(IMAGE),
        image_grid_pinpoints=_pinpoints(model),
        vision_feature_select_strategy="full",
        # The last layer there is: dropped ones are not written.
        vision_feature_layer=-1,
        vision_aspect_ratio=f"anyres_max_{model.max_tiles}",
        tie_word_embeddings=language.tied_embeddings,
    )
    config.architectures = ["RForConditionalGeneration"]
    config.dtype = dtype
    return config


def _generation_config(tokenizer: ChatTokenizer) -> GenerationConfig:
    end, pad = tokenizer.control(TURN_END), tokenizer.control(PAD)
    return GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)


def _processor(model: ModelConfig, tokenizer: ChatTokenizer) -> LlavaNextProcessor:
    side = model.vision.image_size
    images = LlavaNextImageProcessor(
        image_grid_pinpoints=_pinpoints(model),
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        do_center_crop=False,
        resample=3,  # bicubic, as chat/images.py
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer.hf,
        patch_size=model.vision.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=chat_template(),
    )


def _pinpoints(model: ModelConfig) -> list[list[int]]:
    """The grids as (height, width) in pixels."""
    side = model.vision.image_size
    return [[rows * side, columns * side] for rows, columns in model.tile_grids]
