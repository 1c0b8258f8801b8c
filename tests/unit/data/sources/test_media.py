"""What a record says of its pictures, its thoughts and what it wants trained reaches the sample, or it is a reject.

Kinds of silent loss, each with the ways in which data sets that people publish write them.
"""

import base64
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_mm.data.records import StoredTurn
from megatron_mm.data.sources.base import RawSample, Reject
from megatron_mm.data.sources.texts import stray_mark
from tests.unit.data.sources import read_all, write_json


def _png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (2, 2), (9, 8, 7)).save(file, "PNG")
    return file.getvalue()


PNG = _png()
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def _said(question: Any, answer: Any = "a", of_answer: dict[str, Any] | None = None, **record: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **(of_answer or {})}]
    return {"messages": turns, **record}


def _read(path: Path, record: dict[str, Any], **settings: Any) -> RawSample | Reject:
    (found,) = read_all("chat", write_json(path / "data.json", [record]), **settings)
    return found


def _sample(path: Path, record: dict[str, Any], **settings: Any) -> RawSample:
    found = _read(path, record, **settings)
    assert isinstance(found, RawSample), found
    return found


FIELDS = (
    "image_path",
    "img",
    "Image",
    "IMAGES",
    "picture",
    "image_file",
    "imagePath",
    "image_url",
    "photo",
    "img_paths",
)


@pytest.mark.parametrize("field", [*FIELDS, "picture_file_name", "image-file", "pics"])
@pytest.mark.parametrize("value", ["1.png", ["1.png"]])
def test_pictures_under_other_names_are_found(tmp_path: Path, field: str, value: Any) -> None:
    assert _sample(tmp_path, _said("<image>q", **{field: value})).pictures == (tmp_path / "1.png",)
    # Without a mark too, where nothing else would tell.
    assert _sample(tmp_path, _said("q", **{field: value})).content.turns[0].question == [0, "\nq"]


@pytest.mark.parametrize(
    "field", ["image_size", "image_id", "imagery", "caption", "pictured", "epic", "topic", "img_width"]
)
def test_other_fields_are_no_pictures(tmp_path: Path, field: str) -> None:
    record = {**_said("q"), field: "some words"}
    assert _sample(tmp_path, record).pictures == ()


@pytest.mark.parametrize(
    "record",
    [
        _said("q", file="a/b.JPG"),
        _said("q", screenshot=["a.webp", "b.webp"]),
        _said("q", id="coco/000001.jpg"),
        _said("q", url="https://x.y/z.png?width=3"),
        _said("q", scan="a.heic"),
        _said("q", video="v.mp4"),
        _said("q", videos=["v.webm"]),
        _said("q", audio={"path": "a"}),
        _said("q", audio_path="a.wav"),
        _said("q", Videos="v"),
        _said("q", speech_file="s.flac"),
        _said("q", clip="c.mov"),
        _said("<image>q", image="1.png", video="v.mp4"),
        _said("q", images=["1.png"], image="2.png"),
        _said("q", img="1.png", photo="2.png"),
    ],
)
def test_media_that_do_not_reach_the_sample_are_rejects(tmp_path: Path, record: dict[str, Any]) -> None:
    assert isinstance(_read(tmp_path, record), Reject)


@pytest.mark.parametrize("mark", ["<image>", "<video>", "<audio>", "<Image>", "<|image_pad|>", "<|VIDEO_PAD|>"])
@pytest.mark.parametrize(
    "record",
    [
        _said("MARK\nq"),
        _said("q MARK"),
        _said("a MARK b MARK"),
        _said("q", "MARK"),
        _said("q", "<think>MARK</think>a"),
        _said("q", "a", {"reasoning_content": "see MARK"}),
        _said("q", system="MARK"),
        _said([{"type": "text", "text": "q MARK"}]),
        _said("q", image=""),
        _said("q", images=[]),
    ],
)
def test_marks_that_stand_for_nothing_are_seen(tmp_path: Path, mark: str, record: dict[str, Any]) -> None:
    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: marked(item) for name, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return value.replace("MARK", mark) if isinstance(value, str) else value

    has_mark = "MARK" in str(record)
    found = stray_mark(_sample(tmp_path, marked(record)).content)
    assert (found is not None) == has_mark
    assert found is None or found.startswith(f"{mark} in ")


@pytest.mark.parametrize(
    "empty", [None, "", " ", [], [""], [None], ["", None], math.nan, [math.nan], [[]], ["\n"]], ids=repr
)
@pytest.mark.parametrize("field", ["image", "images", "image_path"])
def test_empty_fields_of_pictures(tmp_path: Path, field: str, empty: Any) -> None:
    assert _sample(tmp_path, _said("q", **{field: empty})).pictures == ()
    assert _sample(tmp_path, _said("q", **{field: empty, "images" if field != "images" else "img": ["1.png"]})).pictures


def _part(**fields: Any) -> list[dict[str, Any]]:
    return [fields, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("parts", "picture"),
    [
        (_part(type="image", image="1.png"), "1.png"),
        (_part(type="image", path="1.png"), "1.png"),
        (_part(type="image", url="https://x.y/1.png"), "https://x.y/1.png"),
        (_part(type="image_url", image_url={"url": "https://x.y/1.png", "detail": "low"}), "https://x.y/1.png"),
        (_part(type="image_url", image_url="1.png"), "1.png"),
        (_part(type="image_url", image_url={"url": DATA_URL}), PNG),
        (_part(type="input_image", image_url=DATA_URL), PNG),
        (_part(type="image", source={"type": "base64", "media_type": "image/png", "data": DATA_URL[22:]}), PNG),
        (_part(type="image", source={"type": "url", "url": "https://x.y/1.png"}), "https://x.y/1.png"),
        (_part(image="1.png"), "1.png"),
        ([{"image": "1.png"}, {"text": "q"}], "1.png"),
        ([{"type": "input_image", "image_url": "1.png"}, {"type": "input_text", "text": "q"}], "1.png"),
        ([{"type": "image", "image": "1.png"}, "q"], "1.png"),
    ],
)
def test_parts_that_name_their_picture(tmp_path: Path, parts: list[Any], picture: Any) -> None:
    sample = _sample(tmp_path, _said(parts))
    assert sample.pictures == (tmp_path / picture if picture == "1.png" else picture,)
    assert sample.content.turns[0].question == [0, "\nq"]


@pytest.mark.parametrize(
    "record",
    [
        _said(_part(type="image")),
        _said([{"type": "image", "image": "1.png"}, {"type": "image"}]),
        _said(_part(type="image", image="1.png"), image="2.png"),
        _said(_part(type="image_url", image_url={"url": "data:image/png;base64,%%%"})),
        _said(_part(type="image_url", image_url={"url": "data:text/plain;base64,eA=="})),
        _said(_part(type="video", video="v.mp4")),
        _said(_part(type="video_url", video_url={"url": "v"})),
        _said(_part(type="input_audio", input_audio={})),
        _said(_part(type="image", image="../1.png")),
        _said(_part(type="image", image={"name": "1.png"})),
    ],
)
def test_parts_that_cannot_be_used(tmp_path: Path, record: dict[str, Any]) -> None:
    assert isinstance(_read(tmp_path, record), Reject)


@pytest.mark.parametrize(
    ("answer", "of_answer", "record", "reasoning"),
    [
        ("a", {"reasoning_content": "r"}, {}, "r"),
        ("a", {"reasoning": " r\n"}, {}, "r"),
        ("a", {"thinking": "r"}, {}, "r"),
        ("a", {"thinking": "r", "reasoning": "r"}, {}, "r"),
        ("a", {"reasoning_content": ""}, {}, None),
        ("a", {"reasoning_content": None}, {}, None),
        ("<think>r</think>a", {"reasoning_content": "r"}, {}, "r"),
        ("a", {}, {"reasoning": "r"}, "r"),
        ("a", {}, {"reasoning_content": "r"}, "r"),
        ("r</think>\n\na", {}, {}, "r"),
        ("r\nr2</think>a", {}, {}, "r\nr2"),
        ("</think>a", {}, {}, None),
        ("<think>r</think><answer>a</answer>", {}, {}, "r"),
        ("r</think><answer>a</answer>", {}, {}, "r"),
        ("one</think>two</think>a", {}, {}, "one</think>two"),
    ],
)
def test_thoughts_become_reasoning(
    tmp_path: Path, answer: str, of_answer: dict[str, Any], record: dict[str, Any], reasoning: str | None
) -> None:
    assert _sample(tmp_path, _said("q", answer, of_answer, **record)).content.turns == (
        StoredTurn(["q"], "a", reasoning),
    )


@pytest.mark.parametrize(
    "record",
    [
        _said("q", "<think>r</think>a", {"reasoning": "other"}),
        _said("q", "a", {"reasoning": "r", "thinking": "other"}),
        _said("q", "a", {"reasoning": 3}),
        _said("q", "a", {"reasoning": ["r"]}),
        _said("q", "a", {"reasoning": "r"}, reasoning="r"),
        _said("q", "r</think>"),
        {"messages": [*_said("q")["messages"], *_said("q")["messages"]], "reasoning": "of which?"},
        {"messages": [{"role": "user", "content": "q", "reasoning": "r"}, {"role": "assistant", "content": "a"}]},
        _said("q", "a", {"tool_calls": [{"name": "f"}]}),
        _said("q", "a", {"function_call": {"name": "f"}}),
        _said("q", "a", tools=[{"name": "f"}]),
        _said("q", "a", functions=[{"name": "f"}]),
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        _said("q", "a", {"loss": False}),
        _said("q", "a", {"loss": 0.5}),
        _said("q", "a", {"loss": True, "train": False}),
        _said("q", "a", {"weight": "no"}),
    ],
)
def test_what_contradicts_itself_or_cannot_be_learned(tmp_path: Path, record: dict[str, Any]) -> None:
    assert isinstance(_read(tmp_path, record), Reject)


@pytest.mark.parametrize(
    ("marks", "trained"),
    [
        ({"loss": False}, False),
        ({"loss": 0}, False),
        ({"train": False}, False),
        ({"trainable": False}, False),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"mask": True}, False),
        ({"masked": 1}, False),
        ({"loss": False, "weight": 0}, False),
        ({"loss": True}, True),
        ({"weight": 1}, True),
        ({"mask": False}, True),
        ({"loss": None}, True),
        ({}, True),
    ],
)
def test_turns_that_are_not_to_be_trained(tmp_path: Path, marks: dict[str, Any], trained: bool) -> None:
    first, second = _said("one", "1", marks)["messages"], _said("two", "2")["messages"]
    sample = _sample(tmp_path, {"messages": [*first, *second]})
    assert sample.content.turns == (StoredTurn(["one"], "1", None, trained), StoredTurn(["two"], "2"))


@pytest.mark.parametrize("role", ["Human", "USER", " user", "human", "User"])
@pytest.mark.parametrize(("system", "answer"), [("System", "Assistant"), ("developer", "GPT"), ("SYSTEM", "gpt")])
def test_roles_in_any_case(tmp_path: Path, role: str, system: str, answer: str) -> None:
    turns = [{"role": system, "content": "S"}, {"role": role, "content": "q"}, {"from": answer, "value": 4}]
    content = _sample(tmp_path, {"messages": turns}).content
    assert (content.system, content.turns) == ("S", (StoredTurn(["q"], "4"),))


@pytest.mark.parametrize(
    "name", ["ROOT/1.png", "ROOT/./a/../1.png", "ROOT//1.png", "1.png", "./1.png", "a/../1.png", "ROOT/a/b/../../1.png"]
)
def test_paths_inside_of_the_directory(tmp_path: Path, name: str) -> None:
    (found,) = _sample(tmp_path, _said("q", image=name.replace("ROOT", str(tmp_path)))).pictures
    assert found == tmp_path / "1.png"


@pytest.mark.parametrize("name", ["ROOT/../1.png", "/1.png", "ROOTx/1.png", "../x", "a/../../x", "/etc/passwd"])
def test_paths_outside_of_the_directory(tmp_path: Path, name: str) -> None:
    found = _read(tmp_path, _said("q", image=name.replace("ROOT", str(tmp_path))))
    assert isinstance(found, Reject)
    assert "set the source's pictures to" in found.reason
