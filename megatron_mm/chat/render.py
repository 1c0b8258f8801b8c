"""Conversation -> ids and loss mask, and prompt -> ids: the one preprocessing of training, rollout and evaluation.

The form is Qwen3's ChatML (recipes: R-4B 1.2, our default, since the released template is not known):

    <|im_start|>user\\n<image>...\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>...</think>\\n\\n{answer}<|im_end|>
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules, Tiling, tiles_of, tilings_of
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.tokenizer import IMAGE, TURN_END, TURN_START, ChatTokenizer
from megatron_mm.config.errors import InputError


@dataclass(frozen=True, slots=True)
class Question:
    """A user's turn: pictures, then text."""

    text: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """An assistant's turn; reasoning is None in a non-thinking one."""

    answer: str
    reasoning: str | None = None


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


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with its response, ready for training.

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


def render_prompt(question: Question, mode: Mode, tokenizer: ChatTokenizer, rules: TileRules) -> Prompt:
    """Ids up to and including the mode's trigger."""
    tilings = tilings_of(question.pictures, rules)
    writer = _Writer(tokenizer)
    _write_question(writer, question, tilings)
    writer.control(modes.THINK)
    if mode is not Mode.AUTO:
        writer.text(modes.TRIGGERS[mode].removeprefix(modes.THINK).removesuffix(modes.END_THINK))
    if mode is Mode.NON_THINKING:
        writer.control(modes.END_THINK)
    ids = writer.ids()
    image = tokenizer.control(IMAGE)
    collapsed = np.array(_collapse(ids.tolist(), image, tilings), np.int64)
    return Prompt(ids, collapsed, _tiles(question, tilings, rules), tilings)


def render_sample(question: Question, response: Response, tokenizer: ChatTokenizer, rules: TileRules) -> Sample:
    """Ids and loss mask of a whole turn.

    Trained is the response without `<think>` and, in a non-thinking one, without the whole empty thought, so that
    joint training does not teach the language model to stop thinking (R-4B, appendix B.2). The line break between
    `</think>` and the answer is trained: the non-thinking trigger ends before it, and a model that never learned it
    there sometimes goes on reasoning instead.

    Raises:
        InputError: the answer is empty, or the reasoning is given but empty.
    """
    answer = response.answer.strip()
    reasoning = None if response.reasoning is None else response.reasoning.strip()
    if not answer or reasoning == "":
        raise InputError(f"question {question.text!r} has an empty {'answer' if not answer else 'reasoning'}")
    tilings = tilings_of(question.pictures, rules)
    writer = _Writer(tokenizer)
    _write_question(writer, question, tilings)
    writer.control(modes.THINK)
    if reasoning is None:
        writer.text(modes.EMPTY_THOUGHT)
        writer.control(modes.END_THINK)
        writer.trained = True
    else:
        writer.trained = True
        writer.text(modes.THOUGHT_START)
        # Tokenised apart: the mode's decision is this one token, whatever the reasoning begins with.
        writer.end_run()
        writer.text(reasoning + modes.THOUGHT_END)
        writer.control(modes.END_THINK)
    writer.text(modes.AFTER_THINK + answer)
    writer.control(TURN_END)
    return Sample(writer.ids(), writer.mask(), _tiles(question, tilings, rules), tilings)


class _Writer:
    """Collects ids; neighbouring plain text is tokenised in one run, as a template's string would be."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._run = ""
        self.trained = False

    def text(self, text: str) -> None:
        self._run += text

    def control(self, token: str, times: int = 1) -> None:
        self.end_run()
        self._add([self._tokenizer.control(token)] * times)

    def end_run(self) -> None:
        if self._run:
            run, self._run = self._run, ""
            self._add(self._tokenizer.text(run))

    def ids(self) -> np.ndarray:
        self.end_run()
        return np.array(self._ids, np.int64)

    def mask(self) -> np.ndarray:
        return np.array(self._mask, bool)

    def _add(self, ids: list[int]) -> None:
        self._ids += ids
        self._mask += [self.trained] * len(ids)


def _write_question(writer: _Writer, question: Question, tilings: tuple[Tiling, ...]) -> None:
    writer.control(TURN_START)
    writer.text("user\n")
    for grid in tilings:
        writer.control(IMAGE, grid.num_features)
        writer.text("\n")
    writer.text(question.text)
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


def _tiles(question: Question, tilings: tuple[Tiling, ...], rules: TileRules) -> np.ndarray:
    side = rules.tile_size
    parts = [tiles_of(picture, grid) for picture, grid in zip(question.pictures, tilings, strict=True)]
    return np.concatenate(parts) if parts else np.zeros((0, side, side, 3), np.uint8)
