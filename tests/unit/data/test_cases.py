"""Inputs that once came out wrong in silence (tests/cases/data): what is stored of each, and what is rejected."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.data.prepare import prepare
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.shards import PreparedData
from tests.datasets import turn

CASES = Path(__file__).parents[2] / "cases" / "data"


def _about_picture(question: str, answer: str, between: str = "\n") -> StoredContent:
    return StoredContent((StoredTurn([0, between + question], answer),))


SHOWN = _about_picture("What is shown?", "A red box.")
PLAIN = turn("Plain question?", "Plain answer.")
BOX, UPPER, FINE = (_about_picture("Describe the image.", text) for text in ("box", "upper", "fine"))


def _untrained_first(question: str, answer: str, *later: tuple[str, str]) -> StoredContent:
    first, *others = (turn(*said).turns[0] for said in ((question, answer), *later))
    return StoredContent((type(first)(first.question, first.answer, trained=False), *others))


# Case: format, input, what is stored in order, and a piece of each reject's reason.
EXPECTED: dict[str, tuple[str, str, list[StoredContent], list[str]]] = {
    "d01_picture_field_misnamed": ("chat", "d.json", [PLAIN, SHOWN, SHOWN], ["<image>"]),
    "d02_tar_picture_member_missing": ("webdataset", "src", [SHOWN, SHOWN], ["2.png"]),
    "d03_video_records": ("chat", "d.json", [PLAIN], ["video", "video"]),
    "d04_reasoning_content": ("chat", "d.json", [turn("q?", "a", "because")], []),
    "d05_close_think_only": ("chat", "d.json", [turn("What is 2+2?", "4", "Two and two make four.")], []),
    "d06_turn_not_to_be_trained": ("chat", "d.json", [_untrained_first("q1", "BAD", ("q2", "good"))], []),
    "d07_tool_calls_dropped": ("chat", "d.json", [PLAIN], ["tool_calls"]),
    "d08_absolute_path_inside": ("chat", "d.json", [SHOWN], []),
    "d09_picture_named_in_part": ("chat", "d.json", [PLAIN, *[_about_picture("x?", "y")] * 2], []),
    "d10_empty_picture_field": (
        "chat",
        "d.json",
        [*[turn("Hi?", "A red box.")] * 2, _about_picture("x?", "A red box.", "")],
        [],
    ),
    "d11_tar_dotted_names_merge": ("webdataset", "src", [BOX] * 10, ["has a dot"] * 10),
    "d12_concatenated_tar": ("webdataset", "src", [BOX] * 2, []),
    "d13_png_big_metadata": ("chat", "d.json", [PLAIN, SHOWN], []),
    "d14_int32_black": ("chat", "d.json", [PLAIN, SHOWN], []),
    "d15_upper_case_txt": ("folder", "src", [UPPER, FINE], []),
    "d16_numeric_answer_column": ("parquet", "d.parquet", [turn("x?", "3"), turn("y?", "4")], []),
}


def test_every_case_is_here() -> None:
    assert {path.name for path in CASES.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("case", EXPECTED)
def test_what_becomes_of_it(case: str, tmp_path: Path, tokenizer: Any) -> None:
    form, name, stored, reasons = EXPECTED[case]
    inputs = tmp_path / case
    shutil.copytree(CASES / case, inputs)
    if form == "chat":
        # Absolute paths are those of the case's directory.
        (inputs / name).write_text((inputs / name).read_text().replace(f"HERE/data/{case}", str(inputs)))
    source = {"name": "s", "format": form, "path": inputs / name}
    settings = {"tokenizer": tokenizer.directory, "max_rejected": 1.0, "sources": [source]}
    config = PrepareConfig.model_validate(settings)
    counts = prepare(config, tmp_path / "out", 0, lambda _: None).sources["s"]
    assert (counts.records, counts.written) == (len(stored) + len(reasons), len(stored))
    data = PreparedData(str(tmp_path / "out"))
    samples = [data.read(row) for row in range(len(data.index))]
    assert [sample.content for sample in samples] == stored
    if case == "d14_int32_black":
        (picture,) = (picture for sample in samples for picture in sample.pictures)
        assert Image.open(BytesIO(picture)).getextrema() == ((200, 200),) * 3
    rejects = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == len(reasons), rejects
    assert all(reason in reject for reason, reject in zip(reasons, rejects, strict=True)), rejects
