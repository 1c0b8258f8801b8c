"""Tiny models with random weights, on both sides: our config, and transformers' reference classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.weights.tables import model_table

IMAGE_TOKEN = 5


def tiny_config(**overrides: Any) -> RunConfig:
    """A config of the miniature model with short runs; overrides are given as a__b=value."""
    values = {"recipe": "tiny", "run_dir": "unused", "precision": "fp32", "train.steps": 4, "train.global_batch": 4}
    values |= {
        "data.num_workers": 0,
        "train.micro_batch": 1,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "model.language.vocab_size": 128,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config("mini/language", overrides=[f"{key}={value}" for key, value in values.items()])


def digits_config(digits: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    """`tiny_config` of a run on the prepared digits in which everything learns."""
    values = {
        "data__blend": "{digits/easy/thinking: 1, digits/hard/non_thinking: 1}",
        "model__language__vocab_size": 384,
        "train__trained": "[vision, projector, language, embeddings]",
        "train__micro_batch": 2,
        "telemetry__tensorboard": "false",
    }
    return tiny_config(data__path=digits, run_dir=run_dir, **{**values, **overrides})


def reference_models(
    config: RunConfig, seed: int = 0
) -> tuple[SiglipVisionModel, Qwen3ForCausalLM | Qwen3MoeForCausalLM]:
    """transformers' classes of the same shape, every parameter moved off its trivial initial value."""
    torch.manual_seed(seed)
    vision, language = config.model.vision, config.model.language
    no_pooling_head: dict[str, Any] = {"vision_use_head": False}
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_hidden_layers=vision.used_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
            **no_pooling_head,
        )
    )
    shared: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "max_position_embeddings": language.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "tie_word_embeddings": language.tied_embeddings,
        "rms_norm_eps": language.norm_eps,
    }
    if language.experts is None:
        qwen = Qwen3ForCausalLM(Qwen3Config(**shared))
    else:
        qwen = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                num_experts=language.experts.num_experts,
                num_experts_per_tok=language.experts.experts_per_token,
                moe_intermediate_size=language.experts.ffn_hidden_size,
                norm_topk_prob=True,
                **shared,
            )
        )
    for model in (siglip, qwen):
        model.float().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return siglip, qwen


def random_projector(config: RunConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """Projector and newline under R-4B's names."""
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = config.model.language.hidden_size, config.model.vision.hidden_size
    norm = {"pre_norm.weight": (narrow,), "pre_norm.bias": (narrow,)} if config.model.projector.pre_norm else {}
    shapes = {
        **norm,
        "linear_1.weight": (wide, narrow),
        "linear_1.bias": (wide,),
        "linear_2.weight": (wide, wide),
        "linear_2.bias": (wide,),
    }
    tensors = {
        f"model.multi_modal_projector.{name}": torch.randn(shape, generator=generator) * 0.2
        for name, shape in shapes.items()
    }
    return {**tensors, "model.image_newline": torch.randn(wide, generator=generator) * 0.2}


def r4b_tensors(config: RunConfig, siglip: torch.nn.Module, qwen: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The reference models' weights, with a random projector, under R-4B's names."""
    tensors = random_projector(config)
    for name, tensor in siglip.state_dict().items():
        name = name.removeprefix("vision_model.")
        if not name.startswith("post_layernorm"):
            tensors[f"model.vision_tower.vision_model.{name}"] = tensor.clone()
    for name, tensor in _saved(qwen.state_dict()):
        if name.startswith("model."):
            tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensor.clone()
        elif not config.model.language.tied_embeddings:
            tensors[name] = tensor.clone()
    return tensors


def in_order(config: RunConfig, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the order of export."""
    return ((name, tensors[name]) for rule in model_table(config.model) for name in rule.hf)


def _saved(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as transformers writes them: in memory it keeps the experts of a layer in two tensors."""
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{expert}.{part}.weight"), half
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), matrix
        else:
            yield name, tensor


def random_picture(shape: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Noise of `shape` (width, height)."""
    return Image.fromarray(random.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
