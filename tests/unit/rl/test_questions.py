"""What a question is asked with."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.reader import SampleReader
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


def _texts(data: PreparedData, system: str) -> list[tuple[str, str]]:
    """Of each question, the prompt and the sample that a run trains on."""
    rl = f"{{algorithm: bpo, stages: [{{steps: 4, max_response_tokens: 8, group_size: 2}}], system_prompt: {system}}}"
    config = digits_config(Path(data.path), Path("unused"), data__blend="{}", rl=rl)
    tokenizer = data.tokenizer()
    questions = Questions(config, data, tokenizer)
    reader = SampleReader(data, questions.plan.sizes, config, tokenizer, decode_with_pillow)
    pairs = [(questions.prompt(row), reader.read(row)[1]) for row in range(2)]
    return [(tokenizer.decode(prompt.ids.tolist()), tokenizer.decode(sample.ids.tolist())) for prompt, sample in pairs]


def test_a_sample_is_asked_with_the_text_that_it_is_learned_with(data: PreparedData) -> None:
    texts = _texts(data, "null")
    assert sum(OWN in asked for asked, _ in texts) == 1
    for asked, learned in texts:
        assert learned.startswith(asked)


def test_the_recipes_system_text_replaces_a_samples_own(data: PreparedData) -> None:
    for asked, _ in _texts(data, RECIPES):
        assert OWN not in asked
        assert asked.count(RECIPES) == 1
