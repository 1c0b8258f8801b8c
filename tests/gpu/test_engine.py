"""An engine that sleeps and wakes has the trainer's weights; CUDA graphs change nothing but the time."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.engine import trainer_and_engine, without_graphs
from benchmarks.gpu.photos import prepare_photos
from benchmarks.gpu.setting import DRY, Setting
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Completion, Engine, Sampling
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.exchange import WeightExchange
from megatron_mm.rl.questions import Questions
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table
from tests.gpu.conftest import Measured
from tests.ranks import run_on_ranks

PLATFORMS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Log-probabilities in bf16 of the same kernels, launched one by one or as a graph. To be set when it is first measured.
GRAPH_TOLERANCE = 0.05
NUM_QUESTIONS, NUM_TOKENS = 4, 12
Answers = list[Completion]


def _answers(setting: Setting, has_graphs: bool) -> tuple[list[Answers], list[str]]:
    """Greedy answers when the weights have come, after a sleep with them, and after one without; and other weights."""
    platform = get_platform(setting.sizes.platform)
    config = setting.config("r4b/bpo", "graphs" if has_graphs else "eager", "model.language.head_dim=64")
    data = PreparedData(str(setting.data))
    table = model_table(config.model)
    with (
        nullcontext() if has_graphs else without_graphs(),
        trainer_and_engine(config, setting, platform) as (chunks, engine),
    ):
        questions = Questions(config, data, data.tokenizer())
        exchange = WeightExchange(chunks, table, engine, platform)
        exchange(compare_all=True)
        answers = [_asked(engine, questions)]
        engine.rest(keeps_weights=True)
        answers.append(_asked(engine, questions))
        parts = engine.parts(hf_shapes(table))
        different = [
            name
            for name, tensor in to_hf(chunks, table)
            for part in parts[name]
            if not torch.equal(part.read(), tensor[part.index].to(part.dtype))
        ]
        engine.rest(keeps_weights=False)
        exchange(compare_all=True)
        answers.append(_asked(engine, questions))
        return answers, different


def _asked(engine: Engine, questions: Questions) -> Answers:
    rows = [row for step in range(NUM_QUESTIONS) for row in questions.rows(step)][:NUM_QUESTIONS]
    images = [questions.ask(row).question.pictures for row in rows]
    responses = engine.sample([questions.prompt(row) for row in rows], images, [Sampling(NUM_TOKENS)] * len(rows))
    return [completion for (completion,) in responses]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_engine_answers_the_same_after_it_slept_and_with_graphs(
    tmp_path: Path, platform: str, measured: Measured
) -> None:
    setting = Setting(sizes=replace(DRY, platform=platform), work=tmp_path, results=tmp_path)
    prepare_photos(setting.data, setting.sizes)
    hides = platform == "cpu"
    ((graphs, different),) = run_on_ranks(_answers, 1, setting, True, hides_gpus=hides)
    assert not different
    first, after_sleep, after_sync = ([answer.ids for answer in answers] for answers in graphs)
    assert first == after_sleep == after_sync
    assert len({tuple(ids) for ids in first}) > 1
    ((eager, _),) = run_on_ranks(_answers, 1, setting, False, hides_gpus=hides)
    # Of the first token alone: what follows it may differ where two are almost as probable.
    differences = [abs(one.logprobs[0] - other.logprobs[0]) for one, other in zip(graphs[0], eager[0], strict=True)]
    measured("log-probability of first tokens, graphs against eager", max(differences), GRAPH_TOLERANCE)
