"""The miniature data set: real scans, right answers, and no held-out scan in training."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from megatron_mm.data.digits import NUM_TRAIN_SCANS, POSITIONS, SCAN_PIXELS
from megatron_mm.data.shards import PreparedData, Record


def _scans(record: Record) -> list[bytes]:
    """The four squares of a picture, in the order of POSITIONS."""
    pixels = np.asarray(record.picture)[..., 0]
    half = SCAN_PIXELS
    return [pixels[y : y + half, x : x + half].tobytes() for y in (0, half) for x in (0, half)]


def test_train_and_heldout_scans_are_apart(digits: Path) -> None:
    seen = {}
    for split in ("train", "heldout"):
        data = PreparedData(digits, split)
        rows = data.rows_of("digits/caption/non_thinking")
        seen[split] = {scan for row in rows for scan in _scans(data.read(row))}
    assert len(seen["train"]) > 150
    assert len(seen["heldout"]) > 50
    assert not seen["train"] & seen["heldout"]
    scans: Any = load_digits()
    assert len(scans.target) - NUM_TRAIN_SCANS == 297


def test_answers_follow_from_the_caption_and_the_question(digits: Path) -> None:
    data = PreparedData(digits, "train")
    for row in range(len(data)):
        record = data.read(row)
        turn = record.turn
        read = [int(digit) for digit in record.caption if digit.isdigit()]
        places: dict[str, int] = dict(zip(POSITIONS, read, strict=True))
        if turn.source == "digits/caption":
            assert turn.answer == record.caption
        elif turn.source == "digits/easy":
            (place,) = (place for place in places if place in turn.question)
            assert turn.answer == str(places[place])
            assert turn.reasoning in (None, f"{place} is {turn.answer}")
        else:
            order = sorted(places, key=turn.question.index)
            a, b, c, d = (places[place] for place in order)
            assert turn.answer == str(((a * b + c) * d) % 10)
            for line in (turn.reasoning or "").splitlines():
                left, right = line.split("=")
                # One product or sum of two digits.
                operation = (lambda x, y: x * y) if "*" in left else (lambda x, y: x + y)
                assert operation(int(left[0]), int(left[2])) % 10 == int(right)
