"""The engine computes with the trainer's weights, whatever the layouts, and what did not arrive is named."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mm.chat.render import Prompt
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.generation.engine import Colocation, Engine, Sampling
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.exchange import StaleWeightsError, WeightExchange, bit_sum
from megatron_mm.weights.export import write_description
from megatron_mm.weights.tables import LANGUAGE, VISION, model_table
from tests.answers import questions, rendered
from tests.layouts import PP2, TP2, Overrides
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config

Tensors = Iterable[tuple[str, Tensor]]
LAYOUTS: dict[int, tuple[Overrides, ...]] = {2: ({}, TP2, PP2), 4: (TP2, {**TP2, **PP2})}


def _config(**overrides: object) -> RunConfig:
    return tiny_config(model__language__vocab_size=384, **overrides)


@pytest.fixture(scope="module")
def description(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine starts from: everything but weights."""
    directory = tmp_path_factory.mktemp("described") / "model"
    write_description(directory, _config().model, ChatTokenizer(digits / TOKENIZER), torch.float32)
    return directory


def _move(chunks: list[VisionLanguageModel], seed: int) -> None:
    """Change every weight, as an update would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1 + 0.1 * torch.rand(()).item())
                parameter.add_(0.01)


def _exchange_in(configs: list[RunConfig], directory: Path, ranks: int) -> tuple[list[list[list[int]]], list[set[str]]]:
    """Exchanges in every layout with one engine, compared in full. Runs on every rank.

    Returns:
        what the engine then answers, and the cut parameters that were gathered.
    """
    platform, tokenizer, answers, gathered = get_platform("cpu"), ChatTokenizer(directory), [], []
    pictures = [question.pictures for question in questions()]
    with state.process_group(platform):
        engine = Engine(directory, "float32", colocation=Colocation(ranks))
        for config in configs:
            with state.model_parallel(config.parallel, 0) as groups:
                chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
                exchange = WeightExchange(chunks, model_table(config.model), engine, platform)
                for seed in range(2):
                    _move(chunks, seed)
                    report = exchange(compare_all=True)
                    assert report.num_bytes > 10**6
                    exchange()
                said = engine.generate(rendered(directory), pictures, max_tokens=4)
                answers.append([completion.ids for completion in said])
                gathered.append(_cut(config) - exchange.own)
    return answers, gathered


def _cut(config: RunConfig) -> set[str]:
    return {rule.megatron for rule in model_table(config.model) if rule.axis is not None}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_hands_its_weights_over(description: Path, num_ranks: int, ranks: int) -> None:
    configs = [_config(**layout) for layout in LAYOUTS[num_ranks]]
    (first, gathered), *others = run_on_ranks(_exchange_in, num_ranks, configs, description, ranks)
    assert all(other == (first, gathered) for other in others)  # all engines have the same weights
    assert all(ids for ids in first[0])
    for config, names in zip(configs, gathered, strict=True):
        if config.parallel.tensor == 1:
            assert not names
        elif config.parallel.tensor == ranks:  # cut in the same way, but for the projector, which vLLM does not cut
            assert names == {name for name in _cut(config) if name.startswith("projector.")}
        else:
            assert names == _cut(config)


def _generators() -> tuple[Any, ...]:
    """State of the random generators that all of this process shares."""
    of_numpy: Any = np.random.get_state()
    return random.getstate(), of_numpy[1].tolist(), torch.get_rng_state().tolist()


def _answers_after_rests(config: RunConfig, directory: Path) -> list[list[list[int]]]:
    """Answers of an engine that was awake, that rested with its weights, and that got others. Runs on every rank."""
    platform, tokenizer, answers, woken = get_platform("cpu"), ChatTokenizer(directory), [], []
    prompts, pictures = rendered(directory), [question.pictures for question in questions()]
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        generators = _generators()
        engine = Engine(directory, "float32", seed=5, colocation=Colocation(1))
        assert _generators() == generators
        exchange, wake_up = WeightExchange(chunks, model_table(config.model), engine, platform), engine._llm.wake_up
        engine._llm.wake_up = lambda tags=None: woken.append(tags) or wake_up(tags)
        with pytest.raises(RuntimeError, match="load some first"):
            engine.generate(prompts, pictures, max_tokens=4)
        _move(chunks, 0)
        exchange()
        assert woken == [["weights"]]  # a new engine gives all back, and the cache takes no memory before a prompt
        answers.append([one.ids for one in engine.generate(prompts, pictures, max_tokens=4)])
        assert woken[1:] == [["kv_cache"]]
        engine.rest(keeps_weights=True)
        answers.append([one.ids for one in engine.generate(prompts, pictures, max_tokens=4)])
        assert woken[2:] == [["weights", "kv_cache"]]
        engine.rest(keeps_weights=False)
        with pytest.raises(RuntimeError, match="load some first"):
            engine.generate(prompts, pictures, max_tokens=4)
        exchange()
        assert woken[3:] == [["weights"]]
        # Nothing was asked in between, and nothing is when it rests already.
        engine.rest(keeps_weights=True)
        assert woken[4:] == [["kv_cache"]]
        engine.rest(keeps_weights=True)
        answers.append([one.ids for one in engine.generate(prompts, pictures, max_tokens=4)])
        assert woken[5:] == [["weights", "kv_cache"]]
        exchange()
        _assert_flat_logprobs_are_the_usual_ones(engine, prompts, pictures, exchange)
    return answers


def _assert_flat_logprobs_are_the_usual_ones(
    engine: Engine, prompts: list[Prompt], pictures: list[Any], exchange: WeightExchange
) -> None:
    generate, asked = engine._llm.generate, list[Any]()
    engine._llm.generate = lambda *arguments, **keywords: asked.append(arguments) or generate(*arguments, **keywords)
    ours = engine.sample(prompts[:3], pictures[:3], [Sampling(8, 1.0, count=2, seed=3)] * 3)
    exchange()  # empties the caches, by which the sums would be made in another order
    requests, parameters = asked[0]
    for one in parameters:
        one.flat_logprobs = False
    for completions, output in zip(ours, generate(requests, parameters, use_tqdm=False), strict=True):
        for completion, usual in zip(completions, output.outputs, strict=True):
            assert completion.ids == list(usual.token_ids)
            assert len(completion.ids) == 8
            assert usual.logprobs is not None
            values = [(step or {})[token].logprob for step, token in zip(usual.logprobs, usual.token_ids, strict=True)]
            assert completion.logprobs == values


def test_an_engine_that_rested_answers_as_before(description: Path) -> None:
    ((first, *others),) = run_on_ranks(_answers_after_rests, 1, _config(), description)
    assert all(other == first for other in others)


def _without(name: str) -> Callable[[Tensors, dict[str, Tensor]], Tensors]:
    return lambda tensors, _: ((key, value) for key, value in tensors if key != name)


def _swapped(one: str, other: str) -> Callable[[Tensors, dict[str, Tensor]], Tensors]:
    names = {one: other, other: one}
    return lambda tensors, _: ((names.get(key, key), value) for key, value in tensors)


def _late(name: str) -> Callable[[Tensors, dict[str, Tensor]], Tensors]:
    return lambda tensors, before: ((key, before[key] if key == name else value) for key, value in tensors)


def _as_bf16(name: str) -> Callable[[Tensors, dict[str, Tensor]], Tensors]:
    return lambda tensors, _: ((key, value.bfloat16() if key == name else value) for key, value in tensors)


UP, TABLE = f"{LANGUAGE}layers.2.mlp.up_proj.weight", f"{LANGUAGE}embed_tokens.weight"
KEYS = f"{VISION}encoder.layers.0.self_attn.k_proj.weight"
FAULTS = {
    "a matrix is not sent": (_without(UP), UP),
    "a norm is not sent": (_without(f"{LANGUAGE}norm.weight"), f"{LANGUAGE}norm.weight"),
    "the newline is not sent": (_without("model.image_newline"), "model.image_newline"),
    "two are swapped": (_swapped(UP, f"{LANGUAGE}layers.1.mlp.up_proj.weight"), UP),
    "queries for keys": (_swapped(KEYS, KEYS.replace("k_proj", "q_proj")), KEYS),
    "one is sent late": (_late(KEYS), KEYS),
    "one has another dtype": (_as_bf16(UP), UP),
    "the tied output is left as it was": (None, f"{TABLE} as the output matrix"),
}


def _caught(config: RunConfig, directory: Path) -> dict[str, list[str]]:
    """What is said of each fault, by sums and by comparing everything. Runs on every rank."""
    platform, tokenizer, said = get_platform("cpu"), ChatTokenizer(directory), {}
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        engine = Engine(directory, "float32", colocation=Colocation(1))
        exchange = WeightExchange(chunks, model_table(config.model), engine, platform)
        load, before = engine.load, {}

        def remember(tensors: Tensors) -> Tensors:
            for name, tensor in tensors:
                before[name] = tensor.clone()
                yield name, tensor

        for number, (fault, (plant, _)) in enumerate(FAULTS.items()):
            said[fault] = []
            for compare_all in (False, True):
                engine.load = lambda tensors, parts: load(remember(tensors), parts)
                exchange()  # whole, before each fault
                _move(chunks, number)
                if plant is None:
                    engine.load = lambda tensors, parts: load(tensors, {**parts, TABLE: parts[TABLE][:1]})
                else:
                    engine.load = lambda tensors, parts, plant=plant: load(plant(tensors, before), parts)
                with pytest.raises(StaleWeightsError) as error:
                    exchange(compare_all=compare_all)
                said[fault].append(str(error.value))
    return said


def test_what_did_not_arrive_is_named(description: Path) -> None:
    for said in run_on_ranks(_caught, 2, _config(**TP2), description):
        for fault, (_, name) in FAULTS.items():
            for message in said[fault]:
                assert name in message, (fault, message)
            count = 2 if "swapped" in fault or "queries" in fault else 1
            assert f"weights in {count} tensors" in said[fault][0], said[fault]


def test_the_sum_of_bits_sees_what_a_plain_sum_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    turned = values.flip(0)
    torch.testing.assert_close(values.double().sum(), turned.double().sum())
    sums = {int(bit_sum(one)) for one in (values, turned, values.T, -values, values.bfloat16())}
    assert len(sums) == 5
    assert bit_sum(torch.tensor([-0.0])) == bit_sum(torch.tensor([0.0]))
    large = torch.randn(2**19 + 7, generator=generator)  # several rows of 2^16 words, and a part of one
    for one in (large, large[: 2**18], large.bfloat16(), values):
        assert len({int(bit_sum(one, words)) for words in (2**16, 2**17, 3 * 2**16, 2**23)}) == 1
    # Elements and rows of 8 exchanged, at any distance: also at the same place of two rows that are summed apart.
    for rows in (large[:, None], large[: 2**19].view(-1, 8)):
        for place in (-1, *(2**power for power in range(len(rows).bit_length() - 1))):
            moved = rows.clone()
            moved[[0, place]] = moved[[place, 0]]
            assert bit_sum(rows) != bit_sum(moved), (rows.shape, place)
            assert bit_sum(rows, 2**23) != bit_sum(moved, 2**23), (rows.shape, place)
