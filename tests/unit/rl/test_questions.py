"""What a question is asked with."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Rendering, render_sample
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.sources.base import RawSample
from megatron_mm.rl.questions import Questions
from tests.datasets import turn, write_dataset
from tests.tiny import digits_config

OWN, RECIPES = "Count with care.", "Answer in a box."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> PreparedData:
    """Two questions, one of them with a system text of its own."""
    content, directory = turn("How many?", "7", "Three and four."), tmp_path_factory.mktemp("data")
    told = replace(content, system=OWN)
    write_dataset(directory, tokenizer, {"sums": [RawSample("plain", content), RawSample("told", told)]})
    return PreparedData(str(directory))


def _asked(data: PreparedData, system: str) -> list[str]:
    rl = f"{{algorithm: bpo, stages: [{{steps: 4, max_response_tokens: 8, group_size: 2}}], system_prompt: {system}}}"
    config = digits_config(Path(data.path), Path("unused"), data__blend="{}", rl=rl)
    questions = Questions(config, data, data.tokenizer())
    return [data.tokenizer().decode(questions.prompt(row).ids.tolist()) for row in range(2)]


def test_a_sample_is_asked_with_the_text_that_it_is_learned_with(data: PreparedData) -> None:
    learned = []
    for row in range(2):
        stored = data.read(row)
        content = stored.content.content(decode_with_pillow(stored.pictures, stored.name))
        rules = TileRules.of_model(digits_config(Path("unused"), Path("unused")).model)
        ids = render_sample(content, Rendering.PRETRAIN, data.tokenizer(), rules).ids
        learned.append(data.tokenizer().decode(ids.tolist()))
    asked = _asked(data, "null")
    assert sum(OWN in text for text in asked) == 1
    assert [text.startswith(start) for text, start in zip(learned, asked, strict=True)] == [True, True]


def test_the_recipes_system_text_replaces_a_samples_own(data: PreparedData) -> None:
    for text in _asked(data, RECIPES):
        assert OWN not in text
        assert text.count(RECIPES) == 1
