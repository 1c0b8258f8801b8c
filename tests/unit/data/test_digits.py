"""The miniature data set: real scans, right answers, and no held-out scan in training."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.digits import NUM_TRAIN_SCANS, POSITIONS, SCAN_PIXELS, caption_of
from megatron_mm.data.shards import PreparedData


def _scans(picture: Image.Image) -> list[bytes]:
    """The four squares of a picture, in the order of POSITIONS."""
    pixels = np.asarray(picture)[..., 0]
    half = SCAN_PIXELS
    return [pixels[y : y + half, x : x + half].tobytes() for y in (0, half) for x in (0, half)]


def test_train_and_heldout_scans_are_apart(digits: Path) -> None:
    data = PreparedData(str(digits))
    seen = {}
    for split in ("train", "heldout"):
        (part,) = (part for part in data.index.ranges(split) if part.part == "digits/caption/non_thinking")
        samples = [data.read(row) for row in range(part.first, part.first + part.count)]
        pictures = [decode_with_pillow(sample.pictures, sample.name)[0] for sample in samples]
        seen[split] = {scan for picture in pictures for scan in _scans(picture)}
    assert len(seen["train"]) > 150
    assert len(seen["heldout"]) > 50
    assert not seen["train"] & seen["heldout"]
    scans: Any = load_digits()
    assert len(scans.target) - NUM_TRAIN_SCANS == 297


def test_answers_follow_from_the_caption_and_the_question(digits: Path) -> None:
    data = PreparedData(str(digits))
    captions = {}
    for row in range(len(data.index)):
        sample, part = data.read(row), data.index.part_of(row)
        (turn,) = sample.content.turns
        if part == "digits/caption/non_thinking":
            captions[sample.origin] = turn.answer
    checked = 0
    for row in range(len(data.index)):
        sample, part = data.read(row), data.index.part_of(row)
        (turn,) = sample.content.turns
        question = turn.question[-1]
        assert isinstance(question, str)
        assert bool(sample.pictures) == part.startswith("digits/")
        if part.startswith("digits-text/"):
            assert question.startswith(captions[sample.origin] + "\n")
        else:
            assert turn.question[0] == 0
        read = [int(digit) for digit in captions[sample.origin] if digit.isdigit()]
        assert caption_of(read) == captions[sample.origin]
        places: dict[str, int] = dict(zip(POSITIONS, read, strict=True))
        if "/easy/" in part:
            (place,) = (place for place in places if place in question)
            assert turn.answer == str(places[place])
            assert turn.reasoning in (None, f"{place} is {turn.answer}")
        elif "/hard/" in part:
            order = sorted(places, key=question.index)
            a, b, c, d = (places[place] for place in order)
            assert turn.answer == str(((a * b + c) * d) % 10)
            for line in (turn.reasoning or "").splitlines():
                left, right = line.split("=")
                # One product or sum of two digits.
                operation = (lambda x, y: x * y) if "*" in left else (lambda x, y: x + y)
                assert operation(int(left[0]), int(left[2])) % 10 == int(right)
        checked += 1
    assert checked == 2 * 5 * 60 + 5 * 20
