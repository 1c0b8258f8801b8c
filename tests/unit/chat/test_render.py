"""Ids, masks and modes of rendered conversations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode, begins_thought, split_response
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, Sample, render_prompt, render_sample
from megatron_mm.chat.tokenizer import CONTROL_TOKENS, IMAGE, TURN_END, ChatTokenizer
from megatron_mm.config.errors import InputError

RULES = TileRules(((1, 1), (1, 2), (2, 1)), 32, 4)
PICTURE = Image.new("RGB", (32, 32), (9, 99, 199))
# Any text a user may write, control tokens among it.
TEXTS = st.lists(st.sampled_from([*CONTROL_TOKENS, "\n", "\n\n", " ", "7", "left", "é", "<", "think>"]), max_size=8)


def _sample(question: Question, response: Response, tokenizer: ChatTokenizer) -> Sample:
    return render_sample(Conversation.of(question, response), Rendering.PRETRAIN, tokenizer, RULES)


def _trained_text(sample: Sample, tokenizer: ChatTokenizer) -> str:
    return tokenizer.decode(sample.ids[sample.trained].tolist())


def test_thinking_trains_everything_after_the_think_token(tokenizer: ChatTokenizer) -> None:
    sample = _sample(Question.about("Why?", (PICTURE,)), Response("7", "3+4=7"), tokenizer)
    text = tokenizer.decode(sample.ids.tolist())
    placeholders = IMAGE * (16 + 4 * 5)
    assert text == (
        f"<|im_start|>user\n{placeholders}\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n3+4=7\n</think>\n\n7<|im_end|>"
    )
    assert _trained_text(sample, tokenizer) == "\n3+4=7\n</think>\n\n7<|im_end|>"


def test_non_thinking_trains_what_follows_the_empty_thought(tokenizer: ChatTokenizer) -> None:
    sample = _sample(Question.about("Why?", (PICTURE,)), Response("7"), tokenizer)
    assert tokenizer.decode(sample.ids.tolist()).endswith("assistant\n<think>\n\n</think>\n\n7<|im_end|>")
    assert _trained_text(sample, tokenizer) == "\n\n7<|im_end|>"


@pytest.mark.parametrize("mode", list(Mode))
def test_a_prompt_is_the_beginning_of_its_sample(tokenizer: ChatTokenizer, mode: Mode) -> None:
    question = Question.about("Which digit is top left?", (PICTURE, PICTURE))
    prompt = render_prompt(question, mode, tokenizer, RULES)
    assert tokenizer.decode(prompt.ids.tolist()).endswith("assistant\n" + modes.TRIGGERS[mode])
    response = Response("7", None if mode is Mode.NON_THINKING else "look")
    sample = _sample(question, response, tokenizer)
    assert np.array_equal(sample.ids[: len(prompt.ids)], prompt.ids)
    assert np.array_equal(sample.tiles, prompt.tiles)
    assert (prompt.collapsed_ids == tokenizer.control(IMAGE)).sum() == 2
    assert len(prompt.ids) - len(prompt.collapsed_ids) == 2 * (prompt.tilings[0].num_features - 1)


@given(question=TEXTS.map("".join), reasoning=TEXTS.map("".join), answer=TEXTS.map("".join))
@settings(deadline=None)
def test_no_text_becomes_a_control_token_and_one_token_decides_the_mode(
    tokenizer: ChatTokenizer, question: str, reasoning: str, answer: str
) -> None:
    if not answer.strip():
        return
    think, image, end = (tokenizer.control(token) for token in (modes.THINK, IMAGE, TURN_END))
    (newline,), (blank_line,) = tokenizer.text("\n"), tokenizer.text("\n\n")
    for thought, decision in ((reasoning.strip() or None, newline), (None, blank_line)):
        if thought is None and decision == newline:
            continue
        sample = _sample(Question.about(question), Response(answer, thought), tokenizer)
        ids = sample.ids.tolist()
        assert ids.count(think) == 1
        assert ids.count(image) == 0
        assert ids.count(end) == 2
        assert ids[ids.index(think) + 1] == decision
        # The text survives whole, and the trained part ends with the end of turn.
        assert tokenizer.decode(ids).endswith(f"{modes.AFTER_THINK}{answer.strip()}{TURN_END}")
        assert sample.trained[-1]
        assert not sample.trained[: ids.index(think) + 1].any()
        if thought is None:
            assert _trained_text(sample, tokenizer) == f"{modes.AFTER_THINK}{answer.strip()}{TURN_END}"


def test_an_empty_answer_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError, match="has an empty answer"):
        _sample(Question.about("Why?"), Response(" "), tokenizer)
    with pytest.raises(InputError, match="has an empty reasoning"):
        _sample(Question.about("Why?"), Response("7", " "), tokenizer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\n3+4=7\n</think>\n\n7", ("3+4=7", "7")),
        ("<think>\n\n</think>\n\n7", (None, "7")),
        ("<think>\n3+4=", ("3+4=", "")),
        ("<think>", (None, "")),
        ("<think>\na</think>b</think>c", ("a</think>b", "c")),
        ("<think>\na\n</think><answer> 7 </answer>", ("a", "7")),
        (
            "<think>\n\n</think>\n\n<answer>7</answer> or <answer>8</answer>",
            (None, "<answer>7</answer> or <answer>8</answer>"),
        ),
        ("<think>\n\n</think>\n\n<answer>", (None, "<answer>")),
    ],
)
def test_split_response(text: str, expected: tuple[str | None, str]) -> None:
    assert split_response(text) == expected


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("<think>\n3+4", True),
        ("<think>\n", True),
        ("<think>7", True),
        ("<think>\n\n</think>\n\n7", False),
        # As models answer that never learned to close the empty thought.
        ("<think>\n\n7", False),
        ("<think></think>7", False),
    ],
)
def test_what_follows_the_think_token_decides_the_mode(text: str, begins: bool) -> None:
    assert begins_thought(text) is begins
