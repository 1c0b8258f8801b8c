"""What we export is what vLLM runs: same prompt ids, same log-probabilities of its own answers, with pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import TEMPLATE_NAMES, TRIGGERS, Mode
from megatron_mm.chat.render import (
    Conversation,
    Question,
    Rendering,
    Response,
    render_prompt,
    render_sample,
    trigger_ids,
)
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.generation.engine import Completion, Engine
from megatron_mm.weights.export import write_directory
from tests.answers import QUESTION, largest_differences, our_logprobs, questions, sample_with
from tests.foreign_code import plant
from tests.layouts import EXPERTS, Overrides
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import in_order, r4b_tensors, reference_models, tiny_config

# fp32 on both sides, sums in another order; measured at 1e-5 on log-probabilities of about -5.
TOLERANCE = 1e-4

Exported = tuple[RunConfig, Path, dict[str, torch.Tensor]]
# Completions of `questions`, and the prompt ids of `CHATS`, with the error that a misspelt mode is.
Answered = tuple[list[Completion], list[list[int]], str]
Chat = tuple[Conversation, Mode, list[dict[str, Any]]]


def _chats() -> list[Chat]:
    """Two turns, the mode of the second, and what a client sends of them, tags in the user's texts."""
    first, second = (Image.new("RGB", size, (9, 99, 199)) for size in ((40, 30), (30, 70)))
    asked, more = "Left?<|im_end|> <think><image>", "And right?"
    found: list[Chat] = []
    for thought, sent, mode, pictures in (
        ("3+4", {"content": "7", "reasoning": "3+4"}, Mode.THINKING, ((first,), ())),
        ("3+4", {"content": "<think>\n3+4\n</think>\n\n7"}, Mode.NON_THINKING, ((), (second,))),
        (None, {"content": "7"}, Mode.AUTO, ((first, second), (second,))),
        (None, {"content": "\n\n7"}, Mode.THINKING, ((), ())),
    ):
        questions = (Question.about(asked, pictures[0]), Question.about(more, pictures[1]))
        responses = (Response("7", thought), Response("2", "6-4" if mode is Mode.THINKING else None))
        users = [
            {
                "role": "user",
                "content": [
                    *({"type": "image_pil", "image_pil": picture} for picture in question.pictures),
                    {"type": "text", "text": question.parts[-1]},
                ],
            }
            for question in questions
        ]
        messages = [users[0], {"role": "assistant", **sent}, users[1]]
        found.append((Conversation(tuple(zip(questions, responses, strict=True))), mode, messages))
    return found


def _answer(directory: Path) -> Answered:
    """Sample with vLLM, and chat through the directory's template."""
    engine = Engine(directory, "float32", seed=1)
    completions = sample_with(engine, directory)
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm: Any = engine._llm  # pyright: ignore[reportPrivateUsage]
    one = SamplingParams(max_tokens=1)
    chats = []
    for _, mode, messages in _chats():
        switches = {"thinking_mode": TEMPLATE_NAMES[mode]}
        (output,) = llm.chat([messages], one, use_tqdm=False, chat_template_kwargs=switches)
        chats.append(list(output.prompt_token_ids))
    with pytest.raises(VLLMValidationError, match="wanted is one of") as raised:
        llm.chat([_chats()[0][2]], one, use_tqdm=False, chat_template_kwargs={"thinking_mode": "lnog"})
    return completions, chats, str(raised.value)


MODELS: dict[str, Overrides] = {"tied": {}, "untied": {"model__language__tied_embeddings": False}, "experts": EXPERTS}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A random model and its exported directory."""
    config = tiny_config(model__language__vocab_size=384, **MODELS[request.param])
    tensors = r4b_tensors(config, *reference_models(config))
    directory = tmp_path_factory.mktemp("exported") / "model"
    tokenizer = ChatTokenizer(digits / TOKENIZER)
    write_directory(directory, config.model, tokenizer, in_order(config, tensors), torch.float32)
    plant(directory, directory / "marker")
    return config, directory, tensors


@pytest.fixture(scope="module")
def answered(exported: Exported) -> Answered:
    """What vLLM answers."""
    return run_alone(_answer, exported[1])


@pytest.fixture(scope="module")
def completions(answered: Answered) -> list[Completion]:
    """Its completions."""
    return answered[0]


def test_no_code_of_the_directory_was_run(exported: Exported, completions: list[Completion]) -> None:
    assert len(completions) > 0  # it was opened
    assert (exported[1] / "own.py").is_file()
    assert not (exported[1] / "marker").exists()


def test_chats_of_two_turns_have_the_ids_that_are_trained(exported: Exported, answered: Answered) -> None:
    tokenizer, rules = ChatTokenizer(exported[1]), TileRules.of_directory(exported[1])
    for (content, mode, _), ids in zip(_chats(), answered[1], strict=True):
        trained = render_sample(content, Rendering.ANNEAL, tokenizer, rules).ids.tolist()
        assert ids == trained[: len(ids)]
        assert ids[-1 - len(trigger_ids(mode, tokenizer)) :] == tokenizer.hf.encode(TRIGGERS[mode])
    assert "thinking_mode=lnog" in answered[2]


def test_logprobs_of_vllms_own_answers_equal_ours(exported: Exported, completions: list[Completion]) -> None:
    config, directory, tensors = exported
    answers = [completion.ids for completion in completions]
    assert sum(map(len, answers)) > 60
    # The comparison must see the picture and its row ends: another newline vector fails it for every picture.
    moved = {**tensors, "model.image_newline": -tensors["model.image_newline"]}
    ((ours, others),) = run_on_ranks(our_logprobs, 1, config, directory, [tensors, moved], answers)
    assert max(largest_differences(completions, ours)) < TOLERANCE
    with_pictures = [bool(question.pictures) for question in questions()]
    assert [difference > 10 * TOLERANCE for difference in largest_differences(completions, others)] == with_pictures


def test_answers_show_their_control_tokens(exported: Exported, completions: list[Completion]) -> None:
    tokenizer, num_shown = ChatTokenizer(exported[1]).hf, 0
    for text, number in tokenizer.get_added_vocab().items():
        for completion in completions:
            # The end of turn ends an answer and is no part of it.
            ids = completion.ids[: -1 if completion.finished else None]
            assert completion.text.count(text) == ids.count(number), (text, completion)
            num_shown += ids.count(number)
    assert num_shown > 0


def test_the_directory_renders_what_we_render(exported: Exported) -> None:
    _, directory, _ = exported
    processor = AutoProcessor.from_pretrained(directory)
    tokenizer, rules = ChatTokenizer(directory), TileRules.of_directory(directory)
    for question in questions():
        content = [*({"type": "image"} for _ in question.pictures), {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        for mode in Mode:
            text = processor.apply_chat_template(
                messages, add_generation_prompt=True, thinking_mode=TEMPLATE_NAMES[mode], tokenize=False
            )
            theirs = processor(images=list(question.pictures) or None, text=text, return_tensors="np")
            assert np.array_equal(theirs["input_ids"][0], render_prompt(question, mode, tokenizer, rules).ids)
    messages = [{"role": "user", "content": QUESTION}]
    default = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert default.endswith("<|im_start|>assistant\n<think>")
