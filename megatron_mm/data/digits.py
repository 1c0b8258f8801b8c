"""The miniature data set: four real handwritten digits a picture, questions with answers that can be checked.

The scans are scikit-learn's copy of the UCI optical recognition of handwritten digits (1,797 pictures of 8 x 8). Each
picture is a square of four of them, each enlarged to 16 x 16. Its turns:

    digits/caption   "Describe the image."            both rows of digits
    digits/easy      "Which digit is top left?"       one digit
    digits/hard      a chain over all four digits     ((a * b + c) * d), every step modulo 10

Easy and hard ones come in two modes. In training there is each once more as text alone, the caption in place of the
picture: digits-text/... Train and held-out pictures are made of different scans.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_mm.chat import modes
from megatron_mm.chat.tokenizer import IMAGE, PAD, TURN_END, TURN_START, ChatTokenizer
from megatron_mm.config.prepare import PrepareConfig, SourceConfig, Split
from megatron_mm.data.prepare import NamedTask, run_tasks
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import ListedTask, RawSample
from megatron_mm.files import refuse_existing

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
NUM_TRAIN_SCANS = 1500
SCAN_PIXELS = 16
VOCAB_TOKENS = 384
# Qwen's pre-tokeniser: words with the space before them, digits one by one, line ends on their own.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about a picture, and its answer; reasoning is None in a non-thinking turn."""

    source: str
    question: str
    answer: str
    reasoning: str | None = None


def prepare_digits(directory: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """Write the data set.

    Args:
        directory: must not exist yet.
        num_train: pictures made of the 1,500 training scans.
        num_heldout: pictures made of the 297 held-out scans.
        seed: what pictures and questions are drawn from.

    Raises:
        InputError: the directory exists.
    """
    from sklearn.datasets import load_digits  # an extra: only this data set needs it

    refuse_existing(directory)
    scans: Any = load_digits()
    # Which scans are held out does not depend on the seed: no data set may train on another's held-out scans.
    order = np.random.default_rng(1797).permutation(len(scans.target))
    pictures = [_enlarged(scans.images[scan]) for scan in order]
    labels = scans.target[order]
    train, heldout = np.arange(NUM_TRAIN_SCANS), np.arange(NUM_TRAIN_SCANS, len(order))
    training = _samples("train", num_train, train, pictures, labels, np.random.default_rng([seed, 0]))
    held_out = _samples("heldout", num_heldout, heldout, pictures, labels, np.random.default_rng([seed, 1]))
    tasks = []
    splits: dict[Split, dict[str, list[RawSample]]] = {"train": training, "heldout": held_out}
    for split, sources in splits.items():
        for name, samples in sorted(sources.items()):
            source = SourceConfig(name=name, format="chat", path=directory, split=split)
            tasks.append(NamedTask(f"{split}-{name.replace('/', '-')}", source, ListedTask(samples), 1.0))
    request = f"digits {num_train} {num_heldout} {seed}"
    with TemporaryDirectory() as scratch:
        texts = [text for samples in training.values() for sample in samples for text in _texts(sample.content)]
        build_tokenizer(texts, VOCAB_TOKENS).save_pretrained(scratch)
        config = PrepareConfig(tokenizer=Path(scratch), sources=tuple(task.source for task in tasks[: len(training)]))
        run_tasks(config, ChatTokenizer(Path(scratch)), tasks, directory, request, 0, lambda _: None)


def build_tokenizer(texts: list[str], num_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer cut and named like Qwen3's, of at most `num_tokens` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(PAD, special=True),
        AddedToken(TURN_START, special=True),
        AddedToken(TURN_END, special=True),
        AddedToken(IMAGE, special=True),
        # Not special, as in Qwen3: they stay in decoded text.
        AddedToken(modes.THINK, special=False),
        AddedToken(modes.END_THINK, special=False),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - len(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\n", "assistant\n", modes.EMPTY_THOUGHT], trainer)
    tokenizer.add_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, IMAGE],
        clean_up_tokenization_spaces=False,
    )


def caption_of(digits: list[int]) -> str:
    """The digits as they lie: two rows of two."""
    return f"{digits[0]}{digits[1]}\n{digits[2]}{digits[3]}"


def easy_turns(digits: list[int], position: int) -> list[Turn]:
    """One digit, in both modes."""
    where, answer = POSITIONS[position], str(digits[position])
    question = f"Which digit is {where}?"
    return [
        Turn("easy", question, answer),
        Turn("easy", question, answer, reasoning=f"{where} is {answer}"),
    ]


def hard_turns(digits: list[int], order: list[int]) -> list[Turn]:
    """A chain over the four digits in the order given, in both modes."""
    a, b, c, d = (digits[position] for position in order)
    first, second, third, fourth = (POSITIONS[position] for position in order)
    question = f"Start with {first}, times {second}, plus {third}, times {fourth}. Last digit?"
    product = a * b % 10
    total = (product + c) % 10
    answer = total * d % 10
    worked = f"{a}*{b}={product}\n{product}+{c}={total}\n{total}*{d}={answer}"
    return [
        Turn("hard", question, str(answer)),
        Turn("hard", question, str(answer), reasoning=worked),
    ]


def _samples(
    split: str,
    num_pictures: int,
    scans: np.ndarray,
    pictures: list[np.ndarray],
    labels: np.ndarray,
    random: np.random.Generator,
) -> dict[str, list[RawSample]]:
    """Samples of a split, by source."""
    samples = defaultdict(list)
    for number in range(num_pictures):
        chosen = random.choice(scans, 4)
        digits = [int(labels[scan]) for scan in chosen]
        turns = [
            Turn("caption", "Describe the image.", caption_of(digits)),
            *easy_turns(digits, int(random.integers(4))),
            *hard_turns(digits, random.permutation(4).tolist()),
        ]
        top, bottom = (np.hstack([pictures[scan] for scan in row]) for row in (chosen[:2], chosen[2:]))
        encoded = BytesIO()
        Image.fromarray(np.vstack([top, bottom])).convert("RGB").save(encoded, format="PNG")
        origin = f"{split} picture {number}"
        for turn in turns:
            seen = StoredContent((StoredTurn([0, "\n" + turn.question], turn.answer, turn.reasoning),))
            samples[f"digits/{turn.source}"].append(RawSample(origin, seen, (encoded.getvalue(),)))
            if split == "train":
                told = f"{caption_of(digits)}\n{turn.question}"
                read = StoredContent((StoredTurn([told], turn.answer, turn.reasoning),))
                samples[f"digits-text/{turn.source}"].append(RawSample(origin, read))
    return samples


def _texts(content: StoredContent) -> Iterator[str]:
    for turn in content.turns:
        yield from (part for part in turn.question if isinstance(part, str))
        yield from (text for text in (turn.answer, turn.reasoning) if text)


def _enlarged(scan: np.ndarray) -> np.ndarray:
    """An 8 x 8 scan of values 0 to 16 as uint8 [16, 16]."""
    picture = Image.fromarray(np.round(scan / 16 * 255).astype(np.uint8))
    return np.asarray(picture.resize((SCAN_PIXELS, SCAN_PIXELS), Image.Resampling.BILINEAR))
