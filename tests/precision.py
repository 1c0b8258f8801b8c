"""Fifty steps of the miniature task in fp32, and in bf16 with fp32 master weights."""

from pathlib import Path
from typing import Any

import torch

from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import MicroBatches
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import CrossEntropy, train_step
from tests.tiny import tiny_config

STEPS = 50
PARTS = ("easy/thinking", "hard/thinking", "hard/non_thinking", "caption/non_thinking")


def precision_config(digits: Path, precision: str) -> RunConfig:
    """Fifty steps of the miniature task from fresh weights, packed, pictures and all."""
    return tiny_config(
        data__path=digits,
        data__blend="{" + ", ".join(f"digits/{part}: 1" for part in PARTS) + "}",
        data__packed="true",
        model__language__vocab_size=384,
        train__steps=STEPS,
        train__global_batch=16,
        train__micro_batch=8,
        train__trained="[vision, projector, language, embeddings]",
        precision=precision,
    )


def losses(configs: list[RunConfig]) -> list[list[float]]:
    """The loss of each step of each config. Runs on every rank."""
    platform = get_platform("cpu")
    found = []
    with state.process_group(platform):
        for config in configs:
            assert config.data.path is not None
            tokenizer = PreparedData(config.data.path).tokenizer()
            with state.model_parallel(config.parallel, config.seed) as groups:
                chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
                trainee = build_trainee(config, chunks, groups)
                dtypes = {parameter.dtype for chunk in chunks for parameter in chunk.parameters()}
                assert dtypes == {torch.bfloat16 if config.precision == "bf16" else torch.float32}
                gradients = {parameter.main_grad.dtype for chunk in chunks for parameter in _trained(chunk)}
                assert gradients == {torch.float32}
                data = MicroBatches(config, tokenizer, state.data_rank(), state.data_ranks())
                steps = (
                    train_step(trainee, data.step(step), platform.device(), CrossEntropy(len(data.parts)))
                    for step in range(STEPS)
                )
                found.append([result.loss for result in steps])
    return found


def _trained(chunk: Any) -> list[Any]:
    """Parameters with a gradient buffer, an attribute that Megatron-Core adds."""
    return [parameter for parameter in chunk.parameters() if parameter.requires_grad]
