"""Loss masks of whole conversations, against what the renderings promise, run by run of equal mask."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Content, Conversation, Document, Question, Rendering, Response, render_sample
from megatron_mm.chat.tokenizer import CONTROL_TOKENS, IMAGE, PAD, TURN_END, ChatTokenizer
from megatron_mm.config.errors import InputError

RULES = TileRules(((1, 1), (1, 2), (2, 1)), 32, 4)
PLACEHOLDERS = 16 + 4 * 5
PICTURE = Image.new("RGB", (32, 32), (9, 99, 199))
# What people write, control tokens, tags and boxes among it.
WORDS = [*CONTROL_TOKENS, "<answer>", "</answer>", "\n", "\n\n", " ", "7", "left", "é", "<", "think>"]
BOXES = ["<box>(12, 30), (200, 310)</box>", "[0.1, 0.2, 0.5, 0.9]"]
TEXTS = st.lists(st.sampled_from([*WORDS, *BOXES]), max_size=6).map("".join)
SAID = TEXTS.filter(lambda text: text.strip())
PARTS = st.lists(st.one_of(TEXTS, st.just(PICTURE)), min_size=1, max_size=4).map(tuple)
THINKING = st.builds(Response, SAID, SAID)
ANY = st.one_of(THINKING, st.builds(Response, SAID))


def _conversations(responses: st.SearchStrategy[Response]) -> st.SearchStrategy[Conversation]:
    turns = st.lists(st.tuples(st.builds(Question, PARTS), responses), min_size=1, max_size=3).map(tuple)
    return st.builds(Conversation, turns, st.one_of(st.none(), TEXTS))


def _written(parts: tuple[str | Image.Image, ...]) -> str:
    return "".join(part if isinstance(part, str) else IMAGE * PLACEHOLDERS for part in parts)


def _asked(question: Question, tokenizer: ChatTokenizer) -> str:
    """A question with the tags of its texts spelled as docs/modes.md has it."""
    texts = _written(tuple(part if isinstance(part, str) else "\0" for part in question.parts))
    return tokenizer.broken_tags(texts).replace("\0", IMAGE * PLACEHOLDERS)


def _runs(content: Content, rendering: Rendering, tokenizer: ChatTokenizer) -> list[tuple[bool, str]]:
    """(trained, text) of neighbouring tokens with the same mask."""
    sample = render_sample(content, rendering, tokenizer, RULES)
    return [
        (trained, tokenizer.decode([token for token, _ in run]))
        for trained, run in groupby(
            zip(sample.ids.tolist(), sample.trained.tolist(), strict=True), key=lambda pair: pair[1]
        )
    ]


def _expected(content: Conversation, rendering: Rendering, tokenizer: ChatTokenizer) -> list[tuple[bool, str]]:
    """The same as docs/data.md has it."""
    system = "" if content.system is None else tokenizer.broken_tags(content.system)
    runs = [[False, "" if content.system is None else f"<|im_start|>system\n{system}<|im_end|>\n"]]
    for number, (question, response) in enumerate(content.turns):
        runs[-1][1] += "\n" if number else ""
        runs[-1][1] += f"<|im_start|>user\n{_asked(question, tokenizer)}<|im_end|>\n<|im_start|>assistant\n"
        answer = response.answer.strip()
        if rendering is Rendering.COLD_START:
            assert response.reasoning is not None
            said = f"<think>\n{response.reasoning.strip()}\n</think><answer> {answer} </answer>"
        else:
            runs[-1][1] += "<think>"
            if response.reasoning is not None:
                said = f"\n{response.reasoning.strip()}\n</think>\n\n{answer}"
            elif rendering is Rendering.ANNEAL:
                said = f"\n\n</think>\n\n{answer}"
            else:
                runs[-1][1] += "\n\n</think>"
                said = f"\n\n{answer}"
        runs += [[True, said + "<|im_end|>"], [False, ""]]
    return [(bool(trained), str(text)) for trained, text in runs if text]


@given(content=_conversations(ANY), rendering=st.sampled_from([Rendering.PRETRAIN, Rendering.ANNEAL]))
@settings(deadline=None)
def test_exactly_the_responses_are_trained(
    tokenizer: ChatTokenizer, content: Conversation, rendering: Rendering
) -> None:
    assert _runs(content, rendering, tokenizer) == _expected(content, rendering, tokenizer)


@given(content=_conversations(THINKING))
@settings(deadline=None)
def test_a_cold_start_trains_the_whole_response(tokenizer: ChatTokenizer, content: Conversation) -> None:
    assert _runs(content, Rendering.COLD_START, tokenizer) == _expected(content, Rendering.COLD_START, tokenizer)


@given(content=_conversations(ANY), rendering=st.sampled_from([Rendering.PRETRAIN, Rendering.ANNEAL]))
@settings(deadline=None)
def test_the_mode_decision_is_one_token_that_annealing_alone_trains_in_both_modes(
    tokenizer: ChatTokenizer, content: Conversation, rendering: Rendering
) -> None:
    sample = render_sample(content, rendering, tokenizer, RULES)
    thinks = np.flatnonzero(sample.ids == tokenizer.control(modes.THINK))
    (newline,), (blank_line,) = tokenizer.text("\n"), tokenizer.text("\n\n")
    assert len(thinks) == len(content.turns)
    for place, (_, response) in zip(thinks, content.turns, strict=True):
        is_thinking = response.reasoning is not None
        assert sample.ids[place + 1] == (newline if is_thinking else blank_line)
        assert not sample.trained[place]
        assert sample.trained[place + 1] == (is_thinking or rendering is Rendering.ANNEAL)
        if not is_thinking:
            assert sample.ids[place + 2] == tokenizer.control(modes.END_THINK)
            assert sample.trained[place + 2] == (rendering is Rendering.ANNEAL)


@given(content=_conversations(THINKING))
@settings(deadline=None)
def test_nothing_written_becomes_a_control_token(tokenizer: ChatTokenizer, content: Conversation) -> None:
    for rendering in Rendering:
        ids = render_sample(content, rendering, tokenizer, RULES).ids.tolist()
        num_turns = len(content.turns)
        assert ids.count(tokenizer.control(modes.THINK)) == num_turns
        assert ids.count(tokenizer.control(modes.END_THINK)) == num_turns
        assert ids.count(tokenizer.control(IMAGE)) == PLACEHOLDERS * len(content.pictures)
        assert ids.count(tokenizer.control(TURN_END)) == 2 * num_turns + (content.system is not None)
        assert ids.count(tokenizer.control(PAD)) == 0


@given(parts=PARTS)
@settings(deadline=None)
def test_a_document_trains_its_text_and_its_end(tokenizer: ChatTokenizer, parts: tuple[str | Image.Image, ...]) -> None:
    document = Document(parts)
    if not any(isinstance(part, str) and part.strip() for part in parts):
        with pytest.raises(InputError, match="a document holds no text"):
            render_sample(document, Rendering.PRETRAIN, tokenizer, RULES)
        return
    runs = _runs(document, Rendering.PRETRAIN, tokenizer)
    assert "".join(text for _, text in runs) == _written(parts) + PAD
    assert "".join(text for trained, text in runs if not trained) == IMAGE * PLACEHOLDERS * len(document.pictures)
    assert runs[-1][0]


def test_what_cannot_be_rendered_is_named(tokenizer: ChatTokenizer) -> None:
    plain = Conversation.of(Question.about("Why?"), Response("because"))
    with pytest.raises(InputError, match="a cold start's response has no reasoning"):
        render_sample(plain, Rendering.COLD_START, tokenizer, RULES)
    with pytest.raises(InputError, match="a conversation has no turns"):
        render_sample(Conversation(()), Rendering.PRETRAIN, tokenizer, RULES)
