"""A trainer's model and an engine of the same shape in one process, as reinforcement learning has them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.gpu.setting import Setting
from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation import engine as engine_module
from megatron_mm.generation.engine import Colocation, Engine, engine_arguments
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.weights.export import write_description
from megatron_mm.weights.stream import dtype_name


@contextmanager
def trainer_and_engine(
    config: RunConfig, setting: Setting, platform: Platform
) -> Iterator[tuple[list[VisionLanguageModel], Engine]]:
    """Make the model with random weights, and an engine that waits for them."""
    assert config.rl is not None
    tokenizer = PreparedData(str(setting.data)).tokenizer()
    directory, dtype = config.run_dir / "engine", DTYPES[config.precision]
    write_description(directory, config.model, tokenizer, dtype)
    with state.process_group(platform), state.model_parallel(config.parallel, config.seed) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        engine = Engine(
            directory,
            dtype_name(dtype),
            max(setting.sizes.num_sequences),
            config.seed,
            has_own_memory=platform.has_own_memory,
            colocation=Colocation(1, config.data.max_sequence_tokens, setting.sizes.cache_bytes),
        )
        yield chunks, engine


@contextmanager
def without_graphs() -> Iterator[None]:
    """Make engines within that launch every kernel by itself."""

    def eager(*arguments: Any, **keywords: Any) -> Mapping[str, Any]:
        made = engine_arguments(*arguments, **keywords)
        made.pop("compilation_config", None)
        return made | {"enforce_eager": True}

    with mock.patch.object(engine_module, "engine_arguments", eager):
        yield


def num_parameters(chunks: list[VisionLanguageModel]) -> int:
    """Return how many numbers a model has."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
