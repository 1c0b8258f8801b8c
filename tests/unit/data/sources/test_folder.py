"""Folders of pictures: captions of both kinds, and what is left where one of the two is missing."""

import json
from pathlib import Path

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredTurn
from megatron_mm.data.sources import tasks_of
from tests.unit.data.sources import read_all, reasons, samples


def _files(root: Path, **content: str | bytes) -> None:
    for name, value in content.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value if isinstance(value, bytes) else value.encode())


def test_captions_beside_pictures(tmp_path: Path) -> None:
    _files(tmp_path, b_PNG=b"", b_txt="a dog\n", a__c_jpg=b"", a__c_txt="\ufeffa cat", README_md="x")
    found = samples(read_all("folder", tmp_path, question="What is it?"))
    assert [sample.origin for sample in found] == [str(tmp_path / "a/c.jpg"), str(tmp_path / "b.PNG")]
    assert [sample.pictures for sample in found] == [(tmp_path / "a/c.jpg",), (tmp_path / "b.PNG",)]
    question = [0, "\nWhat is it?"]
    assert [sample.content.turns for sample in found] == [
        (StoredTurn(question, "a cat"),),
        (StoredTurn(question, "a dog"),),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata_jsonl", '{"file_name": "1.jpg", "text": "one,\\ntwo"}\n\n{"file_name": "x/2.jpg", "caption": "3"}'),
        ("metadata_csv", '\ufefffile_name,caption\r\n1.jpg,"one,\ntwo"\r\nx/2.jpg,3\r\n'),
    ],
)
def test_metadata(tmp_path: Path, name: str, content: str) -> None:
    _files(tmp_path, d__1_jpg=b"", d__x__2_jpg=b"", **{f"d__{name}": content})
    found = samples(read_all("folder", tmp_path))
    assert [(sample.pictures, sample.content.turns[0].answer) for sample in found] == [
        ((tmp_path / "d/1.jpg",), "one,\ntwo"),
        ((tmp_path / "d/x/2.jpg",), "3"),
    ]


def test_every_reason(tmp_path: Path) -> None:
    names = ("1.jpg", "2.jpg", "2.jpg", "8.jpg", "../x.jpg", "4.jpg")
    lines = [json.dumps({"file_name": name, "text": "t"}) for name in names]
    lines[5] = lines[5].replace("text", "title")
    _files(tmp_path, metadata_jsonl="\n".join([*lines, "{"]))
    _files(tmp_path, **{f"{number}_jpg": b"" for number in range(1, 7)})
    _files(tmp_path, **{"1_txt": "t", "5_txt": " ", "6_txt": b"\xff", "7_txt": "t"})
    found = read_all("folder", tmp_path)
    metadata = tmp_path / "metadata.jsonl"
    assert [record.origin for record in found] == [
        *(str(tmp_path / f"{number}.jpg") for number in range(1, 7)),
        str(tmp_path / "7.txt"),
        *(f"{metadata} line {number}" for number in (4, 5, 7)),
    ]
    *rest, last = reasons(found)
    assert rest == [
        "2 captions",
        "2 captions",
        "no caption",
        "no caption",
        "empty caption",
        "text is not UTF-8 at byte 0",
        "caption without a picture beside it",
        f"caption of {tmp_path / '8.jpg'}, which is no picture here",
        f"picture path '../x.jpg' leaves {tmp_path}; set the source's pictures to the directory that it lies in",
    ]
    assert last.startswith("not JSON: ")


def test_a_caption_that_went_away(tmp_path: Path) -> None:
    _files(tmp_path, a_jpg=b"", a_txt="t")
    (task,) = tasks_of(SourceConfig(name="test", format="folder", path=tmp_path), 1)
    (tmp_path / "a.txt").unlink()
    assert reasons(list(task.records())) == [f"caption {tmp_path / 'a.txt'} cannot be read: No such file or directory"]


def test_what_is_no_folder_of_pictures(tmp_path: Path) -> None:
    _files(tmp_path, a_txt="x")
    with pytest.raises(InputError, match=r"no picture \(\.jpg, .*correct its path"):
        read_all("folder", tmp_path)
    with pytest.raises(InputError, match="is a file; give the directory"):
        read_all("folder", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,text\na.jpg,x\n", "has columns name, text; it needs file_name and text or caption"),
        ('file_name,text\na.jpg,"x', "cannot be read: unexpected end of data"),
        (b"\xff", "cannot be read: text is not UTF-8"),
    ],
)
def test_bad_tables(tmp_path: Path, table: str | bytes, message: str) -> None:
    _files(tmp_path, a_jpg=b"", metadata_csv=table)
    with pytest.raises(InputError, match=message):
        read_all("folder", tmp_path)
