"""What is written is read back; what is damaged is named."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.index import INDEX, Index
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.sources.base import RawSample
from tests.datasets import encoded, turn, write_dataset

DOCUMENT = StoredContent(document=["before", 0, "between", 1, "after"])
TALK = StoredContent((StoredTurn(["and ", 0, "?"], "yes", "look"), StoredTurn(["sure?"], "no")), "be brief")


def _pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (5 + n, 7, 3), dtype=np.uint8)) for n in range(3)]


@pytest.fixture
def data(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    files = [encoded(picture) for picture in _pictures()]
    samples = [
        RawSample("a", turn("How many?", "7", num_pictures=2), tuple(files[:2])),
        RawSample("b", TALK, (files[2],)),
        RawSample("c", DOCUMENT, (files[1], files[0])),
        RawSample("d", turn("Why ünicode?", "because")),
    ]
    write_dataset(tmp_path / "data", tokenizer, {"some/count": samples})
    return tmp_path / "data"


def test_texts_and_pictures_come_back(data: Path) -> None:
    prepared, pictures = PreparedData(str(data)), _pictures()
    read = {sample.origin: sample for sample in map(prepared.read, range(len(prepared.index)))}
    assert {origin: sample.content for origin, sample in read.items()} == {
        "a": turn("How many?", "7", num_pictures=2),
        "b": TALK,
        "c": DOCUMENT,
        "d": turn("Why ünicode?", "because"),
    }
    for origin, expected in {"a": pictures[:2], "b": pictures[2:], "c": [pictures[1], pictures[0]], "d": []}.items():
        found = decode_with_pillow(read[origin].pictures, "")
        assert [np.asarray(picture).tolist() for picture in found] == [
            np.asarray(picture).tolist() for picture in expected
        ]


def test_the_index_says_what_planning_needs(data: Path) -> None:
    index = Index(data / INDEX)
    assert [(part.part, part.count) for part in index.parts] == [
        ("some/count/document", 1),
        ("some/count/non_thinking", 2),
        ("some/count/thinking", 1),
    ]
    prepared = PreparedData(str(data))
    for row in range(len(index)):
        stored = prepared.read(row)
        sizes = [picture.size for picture in decode_with_pillow(stored.pictures, "")]
        assert index.sizes_of(row) == sizes
        assert index.part_of(row).rsplit("/", 1)[1] == stored.content.mode
        # Some turn of each conversation does not think.
        assert (index.cold_start_tokens[row] > 0) == (stored.content.document is not None)


def test_shards_are_webdataset_tars(data: Path) -> None:
    with tarfile.open(data / "some-count.tar") as tar:
        names = tar.getnames()
        assert names[:4] == ["00000000.json", "00000000.0.png", "00000000.1.png", "00000001.json"]
        member = tar.extractfile("00000001.json")
        assert member is not None
        assert json.load(member)["origin"] == "b"


def test_a_changed_byte_is_found(data: Path) -> None:
    shard = data / "some-count.tar"
    prepared = PreparedData(str(data))
    row = next(row for row in range(4) if prepared.read(row).origin == "b")
    content = bytearray(shard.read_bytes())
    start = int(prepared.index.offset[row])
    for place in (start + 3, start + 1024 + 40):  # in the text; in the picture behind its header
        changed = content.copy()
        changed[place] ^= 1
        shard.write_bytes(changed)
        with pytest.raises(InputError, match=r"some-count\.tar at byte \d+ has changed since it was written"):
            PreparedData(str(data)).read(row)
    shard.write_bytes(content)
    assert PreparedData(str(data)).read(row).origin == "b"


def test_a_shard_cut_off_and_a_missing_one_are_named(data: Path) -> None:
    shard = data / "some-count.tar"
    last = max(range(4), key=lambda row: Index(data / INDEX).offset[row])
    with shard.open("r+b") as file:
        file.truncate(int(Index(data / INDEX).offset[last]) + 3)
    with pytest.raises(InputError, match=r"some-count\.tar ends before byte"):
        PreparedData(str(data)).read(last)
    assert PreparedData(str(data)).read(0 if last else 1)  # the others are whole
    shard.unlink()
    with pytest.raises(InputError, match=r"some-count\.tar cannot be read: No such file"):
        PreparedData(str(data)).read(last)


def test_an_index_cut_off_of_another_version_or_none_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no prepared data in .*\(index\.arrow is missing\)"):
        PreparedData(str(tmp_path))
    whole = (data / INDEX).read_bytes()
    (data / INDEX).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a whole index"):
        PreparedData(str(data))
    (data / INDEX).write_bytes(whole)
    table = pa.ipc.open_file(str(data / INDEX)).read_all()
    metadata = {key: value.replace(b'"version": 2', b'"version": 1') for key, value in table.schema.metadata.items()}
    with pa.OSFile(str(data / INDEX), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert len(PreparedData(str(data)).index) == 4
    table = table.replace_schema_metadata(metadata)
    with pa.OSFile(str(data / INDEX), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="has version 1, not 2"):
        PreparedData(str(data))


def test_the_index_of_another_tokenizer_is_refused(data: Path, tokenizer: ChatTokenizer) -> None:
    file = data / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"version"', ' "version"'), encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer is not the tokenizer that index\.arrow was made with"):
        PreparedData(str(data))
    shutil.rmtree(data / "tokenizer")
    with pytest.raises(InputError, match="no tokenizer in"):
        PreparedData(str(data))
