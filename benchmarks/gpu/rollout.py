"""Rollouts of R-4B at full size: tokens/s of decoding, with CUDA graphs and without, for prompts with real images."""

import time
from collections.abc import Iterator

from benchmarks.figure import Figure
from benchmarks.gpu.engine import trainer_and_engine, without_graphs
from benchmarks.gpu.photos import prepare_photos
from benchmarks.gpu.ratios import DECODING
from benchmarks.gpu.setting import Setting
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Engine, Sampling
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.questions import Questions
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table


def graphs(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of an engine as runs have it."""
    return _rollouts(setting, "rollout-graphs")


def eager(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of an engine that launches every kernel by itself."""
    with without_graphs():
        yield from _rollouts(setting, "rollout-eager")


def _rollouts(setting: Setting, name: str) -> Iterator[Figure]:
    platform, sizes = get_platform(setting.sizes.platform), setting.sizes
    prepare_photos(setting.data, sizes)
    config = setting.config("r4b/bpo", name)
    data = PreparedData(str(setting.data))
    began = time.monotonic()
    with trainer_and_engine(config, setting, platform) as (chunks, engine):
        table = model_table(config.model)
        parts = engine.parts(hf_shapes(table))

        def generate(num_sequences: int, num_tokens: int) -> tuple[float, int]:
            # A load empties the engine's caches, so the same prompts can be asked again.
            engine.load(to_hf(chunks, table), parts)
            platform.synchronize()
            return _generate(engine, questions, num_sequences, sizes.group_size, num_tokens)

        questions = Questions(config, data, data.tokenizer())
        generate(sizes.group_size, 2)
        yield Figure("start of model and engine, first answer", time.monotonic() - began, "s")
        for num_sequences in sizes.num_sequences:
            prefill, _ = generate(num_sequences, 1)
            taken, tokens = generate(num_sequences, sizes.response_tokens)
            label = f"{num_sequences} sequences"
            yield Figure(f"prompts and first token, {label}", prefill, "s")
            yield Figure(f"tokens/s of rollouts, {label}", tokens / taken, "tokens/s")
            yield Figure(f"{DECODING}, {label}", (tokens - num_sequences) / (taken - prefill), "tokens/s")


def _generate(
    engine: Engine, questions: Questions, num_sequences: int, group_size: int, num_tokens: int
) -> tuple[float, int]:
    """Return the seconds for responses to the first questions, and how many tokens they have."""
    num_questions = num_sequences // group_size
    rows = [row for step in range(num_questions) for row in questions.rows(step)][:num_questions]
    prompts = [questions.prompt(row) for row in rows]
    images = [questions.ask(row).question.pictures for row in rows]
    samplings = [Sampling(num_tokens, 1.0, count=group_size, seed=row) for row in rows]
    started = time.perf_counter()
    responses = engine.sample(prompts, images, samplings)
    return time.perf_counter() - started, sum(len(one.ids) for group in responses for one in group)
