"""Documents of texts and pictures: three shapes, line breaks, and reasons."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.sources import read_all, reasons, samples, write_json


def _text(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _info(name: str | None, place: Any, **more: Any) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": place, **more}


@pytest.mark.parametrize(
    "record",
    [
        {"texts": ["One", None, "Two", None], "images": [None, "1.jpg", None, "http://x/2.jpg"]},
        {
            "parts": [
                _text("One"),
                {"type": "image", "image": "1.jpg"},
                _text("Two"),
                {"type": "image", "url": "http://x/2.jpg"},
            ]
        },
        {
            "content": [_text("One"), {"type": "image"}, _text("Two"), {"type": "image"}],
            "images": ["1.jpg", "http://x/2.jpg"],
        },
    ],
)
def test_shapes(tmp_path: Path, record: dict[str, Any]) -> None:
    (sample,) = samples(read_all("interleaved", write_json(tmp_path / "a.json", [record])))
    assert sample.content.document == ["One\n", 0, "\nTwo\n", 1]
    assert sample.pictures == (tmp_path / "1.jpg", "http://x/2.jpg")


def test_mmc4_puts_pictures_before_their_texts(tmp_path: Path) -> None:
    infos = [_info("1.jpg", 1), _info(None, 0, raw_url="http://x/0.jpg"), _info("2.jpg", 1, raw_url="http://x/2.jpg")]
    path = write_json(tmp_path / "a.jsonl", {"text_list": ["One", "Two", "Three"], "image_info": infos})
    (sample,) = samples(read_all("interleaved", path, pictures=tmp_path / "p"))
    assert sample.content.document == [0, "\nOne\n", 1, "\n", 2, "\nTwo\nThree"]
    assert sample.pictures == ("http://x/0.jpg", tmp_path / "p/1.jpg", tmp_path / "p/2.jpg")


def test_no_line_break_where_white_space_is(tmp_path: Path) -> None:
    record = {"texts": ["a ", None, " b\n\n", "", "c <image>"], "images": [None, "1.jpg", None, None, None]}
    (sample,) = samples(read_all("interleaved", write_json(tmp_path / "a.json", [record])))
    assert sample.content.document == ["a ", 0, " b\n\nc <image>"]


BAD = [
    (1, "the record is int, not an object"),
    ({"text": "x"}, "none of texts, text_list, parts and content"),
    ({"texts": ["x"]}, "no images"),
    ({"texts": "x", "images": []}, "texts is str, not a list"),
    ({"texts": ["x"], "images": []}, "1 texts beside 0 images: the lists are not parallel"),
    ({"texts": ["x"], "images": ["1.jpg"]}, "place 1 has both a text and a picture"),
    ({"texts": [3], "images": [None]}, "text 1 is int, not text"),
    ({"texts": [None, " "], "images": ["1.jpg", None]}, "no text"),
    ({"texts": ["x", None], "images": [None, "../1.jpg"]}, "picture path '../1.jpg' leaves ROOT; set the source's pictures to the directory that it lies in"),
    ({"text_list": ["x"], "image_info": [_info("1.jpg", 1)]}, "picture 1 matches text 1 of 1 texts"),
    ({"text_list": ["x"], "image_info": [_info("1.jpg", True)]}, "picture 1 matches text True of 1 texts"),
    ({"text_list": ["x"], "image_info": [_info(None, 0)]}, "a picture is given as NoneType, not as a path"),
    ({"parts": "x"}, "parts are str, not a list"),
    ({"parts": [_text(None)]}, "no text in part 1"),
    ({"parts": [{"type": "video"}]}, "part 1 is of type 'video'; known are text and image"),
    ({"parts": [_text("x"), {"type": "image"}]}, "part 2 is a picture without a name"),
    ({"parts": [_text("x")], "image": "1.jpg"}, "0 image parts for 1 pictures"),
    (
        {"parts": [{"type": "image", "path": "1"}], "image": "1"},
        "part 1 names its picture, and the record lists pictures too",
    ),
]


def test_every_reason(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [record for record, _ in BAD])
    assert reasons(read_all("interleaved", path)) == [reason.replace("ROOT", str(tmp_path)) for _, reason in BAD]
