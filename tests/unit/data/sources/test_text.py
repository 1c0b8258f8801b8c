"""Plain text: files and records, and reasons."""

from pathlib import Path

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.data.records import StoredContent
from tests.unit.data.sources import read_all, reasons, samples, write_json


def test_files_and_records(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffOne\r\n<image> \u00e4\n".encode())
    write_json(tmp_path / "a.json", [{"text": "Two", "id": 1}, {"text": "Three"}])
    write_json(tmp_path / "c.jsonl", {"text": "Four"})
    found = samples(read_all("text", tmp_path))
    names = ("a.json record 1", "a.json record 2", "b.txt", "c.jsonl line 1")
    assert [sample.origin for sample in found] == [f"{tmp_path}/{name}" for name in names]
    texts = ("Two", "Three", "One\r\n<image> \u00e4\n", "Four")
    assert [sample.content for sample in found] == [StoredContent(document=[text]) for text in texts]
    assert all(not sample.pictures for sample in found)


def test_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    (tmp_path / "b.txt").write_bytes(b" \n")
    write_json(tmp_path / "c.json", ["x", {}, {"text": 1}, {"text": ""}])
    assert reasons(read_all("text", tmp_path)) == [
        "text is not UTF-8 at byte 3",
        "empty text",
        "the record is str, not an object",
        "no text",
        "text is int, not text",
        "empty text",
    ]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(
        InputError, match=r"no file of format text \(\*\.txt, \*\.json, \*\.jsonl\) at .*a\.pdf; correct"
    ):
        read_all("text", tmp_path / "a.pdf")
