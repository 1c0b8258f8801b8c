"""Conversation -> ids and loss mask, and prompt -> ids: the one preprocessing of training, rollout and evaluation.

The form is Qwen3's ChatML (recipes: R-4B 1.2, our default, since the released template is not known):

    <|im_start|>user\\n<image>...\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>...</think>\\n\\n{answer}<|im_end|>

Of several turns, every turn of the assistant keeps its thought, empty or not, when others follow: all turns of a
sequence are trained in one pass, so a later one sees the earlier ones as they stand there. template.py serves them so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby

import numpy as np
from PIL import Image

from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules, Tiling, tiles_of, tilings_of
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.tokenizer import IMAGE, PAD, TURN_END, TURN_START, ChatTokenizer
from megatron_mm.config.errors import InputError

Parts = tuple[str | Image.Image, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A user's turn: text and pictures in the order they stand."""

    parts: Parts

    @classmethod
    def about(cls, text: str, pictures: Sequence[Image.Image] = ()) -> "Question":
        """Pictures, each on a line of its own, then text."""
        return cls((*(part for picture in pictures for part in (picture, "\n")), text))

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """In the order they stand."""
        return _pictures(self.parts)


@dataclass(frozen=True, slots=True)
class Response:
    """An assistant's turn; reasoning is None in a non-thinking one.

    Attributes:
        trained: whether it is learned, or only what comes before others.
    """

    answer: str
    reasoning: str | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions with their responses."""

    turns: tuple[tuple[Question, Response], ...]
    system: str | None = None

    @classmethod
    def of(cls, question: Question, response: Response) -> "Conversation":
        """One turn."""
        return cls(((question, response),))

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """In the order they stand."""
        return _pictures(*(question.parts for question, _ in self.turns))


@dataclass(frozen=True, slots=True)
class Document:
    """Text, with or without pictures in it, that nobody asked for: all of the text is trained."""

    parts: Parts

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """In the order they stand."""
        return _pictures(self.parts)


Content = Conversation | Document


class Rendering(StrEnum):
    """How a response is written and which of its tokens are trained."""

    # The empty thought of a non-thinking response is masked (R-4B, appendix B.2): stages 1 to 3.
    PRETRAIN = "pretrain"
    # Only `<think>` is masked, so that the token behind it, the decision to think, is learned (our default).
    ANNEAL = "anneal"
    # `<think>...</think><answer>...</answer>`, all of it trained (Vision-R1; LLaMA-Factory masks the prompt alone).
    COLD_START = "cold_start"

    @property
    def wraps_answer(self) -> bool:
        """Whether the ids differ from those of the other renderings."""
        return self is Rendering.COLD_START


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes before generation.

    Attributes:
        ids: int64 [S], every placeholder expanded.
        collapsed_ids: int64 [S'], one placeholder a picture, as vLLM takes it.
        tiles: uint8 [T, h, w, 3].
        tilings: one a picture.
    """

    ids: np.ndarray
    collapsed_ids: np.ndarray
    tiles: np.ndarray
    tilings: tuple[Tiling, ...]

    def followed_by(self, trigger: Sequence[int]) -> "Prompt":
        """The prompt that goes on with a mode's trigger."""
        behind = np.array(trigger, np.int64)
        ids, collapsed = (np.concatenate([one, behind]) for one in (self.ids, self.collapsed_ids))
        return replace(self, ids=ids, collapsed_ids=collapsed)


@dataclass(frozen=True, slots=True)
class Sample:
    """Content ready for training.

    Attributes:
        ids: int64 [S].
        trained: bool [S], true where the token is a target of the loss.
        tiles: uint8 [T, h, w, 3].
        tilings: one a picture.
    """

    ids: np.ndarray
    trained: np.ndarray
    tiles: np.ndarray
    tilings: tuple[Tiling, ...]


def render_prompt(
    question: Question, mode: Mode, tokenizer: ChatTokenizer, rules: TileRules, system: str | None = None
) -> Prompt:
    """Ids up to and including the mode's trigger."""
    pictures = question.pictures
    tilings = tilings_of(pictures, rules)
    writer = _Writer(tokenizer, [grid.num_features for grid in tilings])
    _write_system(writer, system)
    _write_question(writer, question)
    writer.control(modes.THINK)
    ids = writer.ids()
    collapsed = np.array(_collapse(ids.tolist(), tokenizer.control(IMAGE), tilings), np.int64)
    asked = Prompt(ids, collapsed, _tiles(pictures, tilings, rules), tilings)
    return asked.followed_by(trigger_ids(mode, tokenizer))


def trigger_ids(mode: Mode, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Ids behind `<think>` that force a mode; none in auto mode."""
    text = modes.TRIGGERS[mode].removeprefix(modes.THINK)
    ids = tokenizer.text(text.removesuffix(modes.END_THINK))
    return (*ids, tokenizer.control(modes.END_THINK)) if mode is Mode.NON_THINKING else tuple(ids)


def render_sample(content: Content, rendering: Rendering, tokenizer: ChatTokenizer, rules: TileRules) -> Sample:
    """Ids, loss mask and tiles.

    Raises:
        InputError: see `render_ids`.
    """
    pictures = content.pictures
    tilings = tilings_of(pictures, rules)
    ids, trained = render_ids(content, [grid.num_features for grid in tilings], rendering, tokenizer)
    return Sample(ids, trained, _tiles(pictures, tilings, rules), tilings)


def render_ids(
    content: Content, num_features: Sequence[int], rendering: Rendering, tokenizer: ChatTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and loss mask.

    Trained are the responses that are to be, and the end of each turn of them, without what `rendering` masks. In
    pretraining the line break between an empty thought and the answer is trained: the non-thinking trigger ends before
    it, and a model that never learned it there sometimes goes on reasoning instead.

    Args:
        content: what to write.
        num_features: placeholders of each picture.
        rendering: how.
        tokenizer: of the model.

    Returns:
        int64 [S] and bool [S].

    Raises:
        InputError: there is nothing to learn, an answer is empty, a reasoning is given but empty, or a cold start's
            is missing.
    """
    writer = _Writer(tokenizer, num_features)
    if isinstance(content, Document):
        _write_document(writer, content)
    else:
        _write_conversation(writer, content, rendering)
    return writer.ids(), writer.mask()


def _pictures(*parts: Parts) -> tuple[Image.Image, ...]:
    return tuple(part for some in parts for part in some if isinstance(part, Image.Image))


class _Writer:
    """Collects ids; neighbouring plain text is tokenised in one run, as a template's string would be."""

    def __init__(self, tokenizer: ChatTokenizer, num_features: Sequence[int]):
        self._tokenizer = tokenizer
        self._num_features = iter(num_features)
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._run = ""
        self.trained = False

    def text(self, text: str) -> None:
        self._run += text

    def given(self, text: str) -> None:
        """Text that the model reads and never writes."""
        self.text(self._tokenizer.broken_tags(text))

    def parts(self, parts: Parts, write: Callable[[str], None]) -> None:
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                write("".join(part for part in run if isinstance(part, str)))
                continue
            self.end_run()
            for _ in run:
                self._add([self._tokenizer.control(IMAGE)] * next(self._num_features), trained=False)

    def control(self, token: str) -> None:
        self.end_run()
        self._add([self._tokenizer.control(token)], self.trained)

    def end_run(self) -> None:
        if self._run:
            run, self._run = self._run, ""
            self._add(self._tokenizer.text(run), self.trained)

    def train(self, trained: bool) -> None:
        self.end_run()
        self.trained = trained

    def ids(self) -> np.ndarray:
        self.end_run()
        return np.array(self._ids, np.int64)

    def mask(self) -> np.ndarray:
        return np.array(self._mask, bool)

    def _add(self, ids: list[int], trained: bool) -> None:
        self._ids += ids
        self._mask += [trained] * len(ids)


def _write_document(writer: _Writer, document: Document) -> None:
    if not any(isinstance(part, str) and part.strip() for part in document.parts):
        raise InputError("a document holds no text")
    writer.trained = True
    writer.parts(document.parts, writer.text)
    writer.control(PAD)  # Qwen's <|endoftext|>, which ends its own documents


def _write_conversation(writer: _Writer, content: Conversation, rendering: Rendering) -> None:
    if not content.turns:
        raise InputError("a conversation has no turns")
    _write_system(writer, content.system)
    for number, (question, response) in enumerate(content.turns):
        if number:
            writer.text("\n")
        _write_question(writer, question)
        _write_response(writer, question, response, rendering)
        writer.control(TURN_END)
        writer.train(False)


def _write_response(writer: _Writer, question: Question, response: Response, rendering: Rendering) -> None:
    answer = response.answer.strip()
    reasoning = None if response.reasoning is None else response.reasoning.strip()
    if not answer or reasoning == "":
        asked = "".join(part for part in question.parts if isinstance(part, str))
        raise InputError(f"question {asked!r} has an empty {'answer' if not answer else 'reasoning'}")
    if rendering.wraps_answer:
        if reasoning is None:
            raise InputError("a cold start's response has no reasoning")
        answer = f"{modes.ANSWER} {answer} {modes.END_ANSWER}"
        writer.train(response.trained)
    else:
        answer = modes.AFTER_THINK + answer
    writer.control(modes.THINK)
    if reasoning is None:
        writer.train(response.trained and rendering is Rendering.ANNEAL)
        writer.text(modes.EMPTY_THOUGHT)
        writer.control(modes.END_THINK)
        writer.train(response.trained)
    else:
        writer.train(response.trained)
        writer.text(modes.THOUGHT_START)
        # Tokenised apart: the mode's decision is this one token, whatever the reasoning begins with.
        writer.end_run()
        writer.text(reasoning + modes.THOUGHT_END)
        writer.control(modes.END_THINK)
    writer.text(answer)


def _write_system(writer: _Writer, system: str | None) -> None:
    if system is not None:
        writer.control(TURN_START)
        writer.text("system\n")
        writer.given(system)
        writer.control(TURN_END)
        writer.text("\n")


def _write_question(writer: _Writer, question: Question) -> None:
    writer.control(TURN_START)
    writer.text("user\n")
    writer.parts(question.parts, writer.given)
    writer.control(TURN_END)
    writer.text("\n")
    writer.control(TURN_START)
    writer.text("assistant\n")


def _collapse(ids: list[int], image: int, tilings: tuple[Tiling, ...]) -> list[int]:
    """`ids` with each picture's run of placeholders replaced by one."""
    collapsed, grids, position = [], iter(tilings), 0
    while position < len(ids):
        collapsed.append(ids[position])
        position += next(grids).num_features if ids[position] == image else 1
    return collapsed


def _tiles(pictures: Sequence[Image.Image], tilings: tuple[Tiling, ...], rules: TileRules) -> np.ndarray:
    side = rules.tile_size
    parts = [tiles_of(picture, grid) for picture, grid in zip(pictures, tilings, strict=True)]
    return np.concatenate(parts) if parts else np.zeros((0, side, side, 3), np.uint8)
