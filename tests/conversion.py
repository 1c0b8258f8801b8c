"""Weights through every layout and back, on ranks, against the files that transformers wrote."""

from pathlib import Path
from typing import Any

import torch

from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.checkpoint.store import load_weights, model_state, write
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.export import write_directory
from megatron_mm.weights.source import open_source
from megatron_mm.weights.stream import from_hf, to_hf
from megatron_mm.weights.tables import model_table
from tests.layouts import EP2, EXPERTS, PP2, SP, TP2, Overrides
from tests.onevision import reference_model
from tests.tiny import in_order, r4b_tensors, reference_models, tiny_config

# Small enough that the miniature model needs many of them.
BUCKET_BYTES = 100_000
TP4: Overrides = {"parallel__tensor": 4}
INTERLEAVED: Overrides = {**PP2, "parallel__virtual_pipeline": 2}
VISION_DATA: Overrides = {"model__vision__parallel": "data"}
# Every one on four ranks; what a layout leaves of them is data-parallel.
LAYOUTS: dict[str, Overrides] = {
    "one piece": {},
    "TP 2": TP2,
    "TP 4": TP4,
    "PP 2": PP2,
    "PP 2 uneven": {**PP2, "parallel__pipeline_layers": "[0, 4]"},
    "TP 2 x PP 2": {**TP2, **PP2},
    "TP 2 x PP 2 interleaved": {**TP2, **INTERLEAVED},
    "TP 4, vision data-parallel": {**TP4, **VISION_DATA},
    "TP 2 x PP 2, vision data-parallel": {**TP2, **PP2, **VISION_DATA},
}
EXPERT_LAYOUTS: dict[str, Overrides] = {
    "experts": {},
    "experts, EP 2": EP2,
    "experts, TP 2 + SP, EP 4": {**SP, "parallel__expert": 4},
    "experts, PP 2, EP 2": {**PP2, **EP2},
}
# What people have: R-4B and LLaVA-OneVision, with vocabularies that no layout divides.
R4B: Overrides = {"model__language__vocab_size": 390, "model__language__num_kv_heads": 4}
ONEVISION: Overrides = {**R4B, "model__projector__pre_norm": "false", "model__multi_image": "square"}
UNTIED: Overrides = {"model__language__tied_embeddings": "false"}
MODELS: dict[str, Overrides] = {
    "R-4B, tied, fp32": {**R4B, "precision": "fp32"},
    "R-4B, untied, bf16": {**R4B, **UNTIED, "precision": "bf16"},
    "LLaVA-OneVision, tied, fp32": {**ONEVISION, "precision": "fp32"},
    "LLaVA-OneVision, untied, bf16": {**ONEVISION, **UNTIED, "precision": "bf16"},
}
EXPERT_MODEL: Overrides = {**R4B, **EXPERTS, "precision": "bf16"}


def conversion_config(**overrides: object) -> RunConfig:
    """A model whose heads four ranks can share."""
    return tiny_config(**overrides)


def save_with_transformers(directory: Path, config: RunConfig, tokenizer: ChatTokenizer) -> None:
    """The directory that transformers' save_pretrained writes, with the tokenizer.

    Of a model with experts, which transformers' classes hold in another form, ours of the same tensors.
    """
    if config.model.language.experts is not None:
        tensors = r4b_tensors(config, *reference_models(config))
        dtype = DTYPES[config.precision]
        stream = ((name, tensor.to(dtype)) for name, tensor in in_order(config, tensors))
        write_directory(directory, config.model, tokenizer, stream, dtype, shard_bytes=10**6)
        return
    model: Any = reference_model(config, tokenizer.control(IMAGE)).to(dtype=DTYPES[config.precision])  # pyright: ignore
    model.save_pretrained(directory, max_shard_size="1MB")
    tokenizer.save(directory)


def _differing(chunks: list[VisionLanguageModel], config: RunConfig, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names that a live model streams otherwise than expected."""
    seen = {}
    for name, tensor in to_hf(chunks, model_table(config.model), BUCKET_BYTES):
        seen[name] = tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    return sorted({name for name, same in seen.items() if not same} | (expected.keys() ^ seen.keys()))


@torch.no_grad()
def through_every_layout(directory: Path, configs: dict[str, RunConfig], checkpoints: Path) -> dict[str, list[str]]:
    """Read a directory into every layout, save each, load each into every other. Runs on every rank.

    Returns:
        What went wrong: the way, and the tensors that came out otherwise.
    """
    platform = get_platform("cpu")
    wrong = {}
    source = open_source({"whole": directory}, next(iter(configs.values())).model).tensors
    expected = {name: tensor[(slice(None),)].clone() for name, tensor in source.items()}
    with state.process_group(platform):
        for name, config in configs.items():
            with state.model_parallel(config.parallel, 0) as groups:
                chunks = build_model(config, platform, groups, image_token=5)
                from_hf(chunks, model_table(config.model), source)
                wrong[f"files -> {name}"] = _differing(chunks, config, expected)
                write(checkpoints / name, 0, {"progress": {"step": 0}, "model": model_state(chunks)})
        for name, config in configs.items():
            with state.model_parallel(config.parallel, 0) as groups:
                chunks = build_model(config, platform, groups, image_token=5)
                for other in configs:
                    for chunk in chunks:
                        for parameter in chunk.parameters():
                            parameter.fill_(torch.nan)
                    load_weights(checkpoints / other, chunks)
                    wrong[f"{other} -> {name}"] = _differing(chunks, config, expected)
    return {way: names for way, names in wrong.items() if names}
