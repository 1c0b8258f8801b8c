"""Conversations as JSON: shapes that are read, reasons why others are not, and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import RawSample, Reject
from tests.unit.data.sources import read_all, reasons, samples, write_json

REASONED = "<think> Okay, let's see. <image> is C. </think><answer> Final Answer:C </answer>"


def _human(text: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], **more}


def _user(text: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


def _one(path: Path, record: Any, **settings: Any) -> RawSample:
    (sample,) = samples(read_all("chat", write_json(path / "data.json", [record]), **settings))
    return sample


@pytest.mark.parametrize(
    "record",
    [
        _human("<image>\nWhich?", REASONED, image="a/1.png", id=7),
        # Its file names lists "conversations" and roles "user" and "assistant".
        {
            "images": ["a/1.png"],
            "conversations": [
                {"role": "user", "content": "<image>\nWhich?"},
                {"role": "assistant", "content": REASONED},
            ],
        },
        _user([{"type": "image"}, {"type": "text", "text": "Which?"}], REASONED, images=[{"path": "a/1.png"}]),
        # Without a mark the picture goes in front: stored alike, so that duplicates are seen.
        _human("Which?", REASONED, image="a/1.png"),
    ],
)
def test_both_files_of_vision_r1_cold_and_messages_read_alike(tmp_path: Path, record: dict[str, Any]) -> None:
    sample = _one(tmp_path, record)
    turn = StoredTurn([0, "\nWhich?"], "Final Answer:C", "Okay, let's see. <image> is C.")
    assert sample.content == StoredContent((turn,))
    assert sample.pictures == (tmp_path / "a/1.png",)
    assert sample.origin == f"{tmp_path / 'data.json'} record 1"


def test_pictures_lie_where_the_source_says_or_are_urls(tmp_path: Path) -> None:
    sample = _one(tmp_path, _human("q", image=["x/../1.png", "https://a.b/c"]), pictures=tmp_path / "pictures")
    assert sample.pictures == (tmp_path / "pictures" / "1.png", "https://a.b/c")
    assert sample.content.turns[0].question == [0, "\n", 1, "\nq"]


def test_marks_are_placed_over_all_questions_and_left_without_pictures(tmp_path: Path) -> None:
    said = [("human", "first <image>"), ("gpt", "a <image>"), ("human", "<image><image> then "), ("gpt", "b")]
    record = {"conversations": [{"from": role, "value": text} for role, text in said]}
    turns = _one(tmp_path, {**record, "images": ["1", "2", "3"]}).content.turns
    assert [turn.question for turn in turns] == [["first ", 0], [1, 2, " then "]]
    assert turns[0].answer == "a <image>"
    assert [turn.question for turn in _one(tmp_path, record).content.turns] == [[said[0][1]], [said[2][1]]]


@pytest.mark.parametrize(
    ("record", "system"),
    [
        (_human("q", system="S"), "S"),
        (_human("q", system=""), None),
        ({"messages": [{"role": "system", "content": "S"}, *_user("q")["messages"]]}, "S"),
    ],
)
def test_system_texts(tmp_path: Path, record: dict[str, Any], system: str | None) -> None:
    assert _one(tmp_path, record).content == StoredContent((StoredTurn(["q"], "a"),), system)


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("  plain ", "plain", None),
        ("<think>\n\n</think>\n\nshort", "short", None),
        ("<think>one</think>two</think> three", "three", "one</think>two"),
        ("see <think>x</think>", "see <think>x</think>", None),
        ("<answer>x</answer>", "x", None),
        ("<answer>x</answer> or <answer>y</answer>", "<answer>x</answer> or <answer>y</answer>", None),
        ("<answer>x", "<answer>x", None),
    ],
)
def test_responses(tmp_path: Path, text: str, answer: str, reasoning: str | None) -> None:
    assert _one(tmp_path, _human("q", text)).content.turns == (StoredTurn(["q"], answer, reasoning),)


def _turns(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "x"} for role in roles]}


ELSEWHERE = "; set the source's pictures to the directory that it lies in"
BAD = [
    ("text", "the record is str, not an object"),
    ({"id": 1}, "no turns"),
    ({"conversations": []}, "no turns"),
    ({"conversations": "x"}, "turns are str, not a list"),
    ({"conversations": ["x"]}, "turn 1 is str, not an object"),
    ({**_human("q"), **_user("q")}, "both conversations and messages"),
    (_turns("system"), "no turns"),
    (_turns("gpt", "human"), "turn 1 is the assistant's, not the user's"),
    (_turns("system", "human", "user"), "turn 3 is the user's, not the assistant's"),
    (_turns("human", "gpt", "human"), "the last turn is not the assistant's"),
    (_turns("tool"), "unknown role 'tool' in turn 1"),
    ({"conversations": [{"value": "x"}]}, "no role in turn 1"),
    (_human(3), "text in turn 1 is int, not text"),
    (_human("q", None), "no text in turn 2"),
    (_human("q", True), "text in turn 2 is bool, not text"),
    (_human(" "), "question 1 is empty"),
    (_human("q", system=["S"]), "system text is list, not text"),
    (
        {**_turns("system", "human", "gpt"), "system": "S"},
        "system texts both beside the turns and in the first of them",
    ),
    (_human("<image><image><image>", images=["1", "2"]), "3 <image> marks for 2 pictures"),
    (_human("<image>", images=["1", "2"]), "1 <image> marks for 2 pictures"),
    (_user([{"type": "image"}]), "1 <image> marks for 0 pictures"),
    (_user([{"type": "audio"}]), "turn 1 has a part of type 'audio'; known are text and image"),
    (_user("q", [{"type": "image"}], image="1"), "a picture in the assistant's turn"),
    (_human("q", "<think>endless"), "<think> without </think>"),
    (_human("q", "<think>x</think> "), "empty answer"),
    (_human("q", "<answer> </answer>"), "empty answer"),
    (_human("q", image=4), "a picture is given as int, not as a path"),
    (_human("q", image="/etc/x.png"), "picture path '/etc/x.png' leaves ROOT" + ELSEWHERE),
    (_human("q", image="a/../../x.png"), "picture path 'a/../../x.png' leaves ROOT" + ELSEWHERE),
    (_human("q", image=".."), "picture path '..' leaves ROOT" + ELSEWHERE),
    (_human("q", images=["", "1.png"]), "picture path '' cannot be that of a file"),
    (_human("q", image="a\0b"), "picture path 'a\\x00b' cannot be that of a file"),
    (_human("q", image="file:///x.png"), "picture 'file:///x.png' is neither a path nor an http(s) URL"),
    (_human("q", image={"path": None}), "a picture has neither bytes nor a path"),
    (_human("half \ud83d"), "text holds '\\ud83d', half of a surrogate pair"),
]


def test_every_reason_and_every_record_once(tmp_path: Path) -> None:
    path = write_json(tmp_path / "bad.json", [record for record, _ in BAD])
    found = read_all("chat", path)
    assert reasons(found) == [reason.replace("ROOT", str(tmp_path)) for _, reason in BAD]
    assert [record.origin for record in found] == [f"{path} record {number + 1}" for number in range(len(BAD))]


def test_a_line_that_is_not_json_is_one_reject(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b"\n".join([json.dumps(_human("q")).encode(), b" ", b'{"conv', deep, b'"\xff"', b"[]"]))
    first, *rest = read_all("chat", path)
    assert isinstance(first, RawSample)
    assert [record.origin for record in rest] == [f"{path} line {number}" for number in (3, 4, 5, 6)]
    assert all(reason.startswith("not JSON: ") for reason in reasons(rest[:3]))
    assert reasons(rest[3:]) == ["the record is list, not an object"]


def test_a_directory_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.json", "a.json", ".cache/x.json"):
        write_json(tmp_path / name, [_human("q", image="1.png")] * 3)
    found = samples(read_all("chat", tmp_path, records_per_task=4))
    expected = [(tmp_path / name, number) for name in ("a.json", "b/2.json") for number in (1, 2, 3)]
    assert [sample.origin for sample in found] == [f"{file} record {number}" for file, number in expected]
    assert found[-1].pictures == (tmp_path / "b/1.png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"conversations": [', "is not JSON: .*copy it again, or call it"),
        ("{}", "holds a JSON dict, not an array of records; put it in"),
        (None, "does not exist; correct it"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as raised:
        read_all("chat", path)
    assert str(path) in str(raised.value)


def test_a_directory_without_files_of_the_format(tmp_path: Path) -> None:
    (tmp_path / "data.txt").touch()
    with pytest.raises(InputError, match=r"no file of format chat \(\*\.json, \*\.jsonl\) at "):
        read_all("chat", tmp_path)


def test_names_that_utf8_cannot_hold_are_escaped(tmp_path: Path) -> None:
    path = write_json(tmp_path / "\udcff.json", [_human("q"), 1])
    sample, reject = read_all("chat", path)
    assert isinstance(reject, Reject)
    assert sample.origin == f"{tmp_path}/\\udcff.json record 1"
    reject.origin.encode()
