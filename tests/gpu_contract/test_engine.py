"""What vLLM makes of an engine's arguments on a GPU, and a place in its model for every weight, row by row."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.generation.engine import Colocation, engine_arguments
from megatron_mm.generation.weights import find_parts, uncovered
from megatron_mm.weights.export import write_description
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.tables import model_table
from tests.gpu_contract.vllm_stand_in import engine_config, engine_model, gpu_platform
from tests.ranks import run_alone
from tests.tiny import tiny_config

pytestmark = pytest.mark.gpu_contract

CACHE_BYTES = 20 * 2**30
MAX_TOKENS = 512


def _r4b(*overrides: str) -> RunConfig:
    return load_config("r4b/bpo", [], ["data.path=unused", "init_from=unused", "run_dir=unused", *overrides])


# Name -> config, and the number of its Hugging Face tensors and parameters where they are known from the release.
MODELS = {
    "mini": tiny_config(model__language__vocab_size=384),
    "mini, untied": tiny_config(model__language__vocab_size=384, model__language__tied_embeddings="false"),
    "r4b": _r4b(),
    "r4b, untied": _r4b("model.language.tied_embeddings=false"),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What vLLM made of an engine's arguments, and of the table of weights.

    Attributes:
        settings: of its config.
        unsent: rows of its parameters that none of our tensors, or several, are for.
        unsent_without: the same if the keys of a layer were not sent.
        misshapen: parts that have another shape than what they are written with.
        num_values: of its parameters.
        num_sent: of our tensors' elements, a tied table once.
    """

    settings: dict[str, Any]
    unsent: list[str]
    unsent_without: list[str]
    misshapen: list[str]
    num_values: int
    num_sent: int


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A model's engine, once for all tests of it."""
    folder = tmp_path_factory.mktemp("engine")
    config = MODELS[request.param]
    write_description(folder / "model", config.model, ChatTokenizer(digits / TOKENIZER), torch.bfloat16)
    return run_alone(_found, config, folder)


def _found(config: RunConfig, folder: Path) -> Found:
    colocation = Colocation(1, max_tokens=MAX_TOKENS, cache_bytes=CACHE_BYTES)
    arguments = engine_arguments(
        folder / "model", "bfloat16", max_sequences=256, has_own_memory=True, colocation=colocation
    )
    with gpu_platform():
        made = engine_config(arguments)
        model = engine_model(made, folder)
    shapes = hf_shapes(model_table(config.model))
    parts = find_parts(model, shapes)
    keys = next(name for name in parts if name.endswith("self_attn.k_proj.weight"))
    misshapen = []
    for name, of_tensor in parts.items():
        for part in of_tensor:
            written = torch.empty(shapes[name], device="meta")[part.index].shape
            if part.parameter[part.rows].shape != written or part.is_packed or part.dtype != torch.bfloat16:
                misshapen.append(f"{name}: {part.parameter[part.rows].shape} and {written}, {part.dtype}")
    scheduler, compilation = made.scheduler_config, made.compilation_config
    return Found(
        settings={
            "mode": int(compilation.mode),
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "chunked": scheduler.enable_chunked_prefill,
            "sequences": scheduler.max_num_seqs,
            "sleeps": made.model_config.enable_sleep_mode,
            "own allocator": made.model_config.enable_cumem_allocator,
            "tokens": made.model_config.max_model_len,
            "logprobs": made.model_config.logprobs_mode,
            "cache": made.cache_config.kv_cache_memory_bytes,
            "executor": made.parallel_config.distributed_executor_backend,
            "loads": str(made.load_config.load_format),
        },
        unsent=uncovered(model, chain.from_iterable(parts.values())),
        unsent_without=uncovered(model, chain.from_iterable(of for name, of in parts.items() if name != keys)),
        misshapen=misshapen,
        num_values=sum(parameter.numel() for parameter in model.parameters()),
        num_sent=sum(torch.Size(shape).numel() for shape in shapes.values()),
    )


def test_the_engine_decodes_with_graphs_and_sleeps(found: Found) -> None:
    assert found.settings == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "chunked": True,
        "sequences": 256,
        "sleeps": True,
        "own allocator": True,
        "tokens": MAX_TOKENS,
        "logprobs": "processed_logprobs",
        "cache": CACHE_BYTES,
        "executor": "external_launcher",
        "loads": "dummy",
    }


def test_every_row_has_its_place(found: Found) -> None:
    assert found.unsent == []
    assert found.misshapen == []
    # What is padded is less than a block of the vocabulary, in one or two tables.
    assert 0 <= found.num_values - found.num_sent < 2 * 64 * 4096
    # The check sees a third of a parameter that nothing is sent for.
    assert len(found.unsent_without) == 1
    assert "qkv_proj.weight" in found.unsent_without[0]
