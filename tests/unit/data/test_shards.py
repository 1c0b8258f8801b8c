"""What is written is read back; what is damaged is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.config.errors import InputError
from megatron_mm.data.shards import PreparedData, Turn, writing


def _write(directory: Path) -> list[Image.Image]:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (5 + n, 7, 3), dtype=np.uint8)) for n in range(3)]
    with writing(directory) as writer:
        for number, picture in enumerate(pictures):
            turns = [Turn("count", "How many?", str(number)), Turn("count", "How many?", str(number), "1, 2")]
            writer.add("train", picture, f"caption {number}", turns)
    return pictures


def test_pictures_and_turns_come_back(tmp_path: Path) -> None:
    pictures = _write(tmp_path / "data")
    data = PreparedData(tmp_path / "data", "train")
    assert len(data) == 6
    for number, row in enumerate(data.rows_of("count/thinking")):
        record = data.read(row)
        assert (record.turn.answer, record.turn.reasoning) == (str(number), "1, 2")
        assert record.caption == f"caption {number}"
        assert np.array_equal(np.asarray(record.picture), np.asarray(pictures[number]))


def test_a_failed_preparation_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "data") as writer:  # noqa: PT012
        writer.add("train", Image.new("RGB", (4, 4)), "", [Turn("a", "b", "c")])
        raise RuntimeError
    assert not (tmp_path / "data").exists()
    _write(tmp_path / "data")
    with pytest.raises(InputError, match="exists already"), writing(tmp_path / "data"):
        pass


def test_a_picture_that_cannot_be_read_is_named_with_its_place(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[512:520] = b"not PNG!"
    shard.write_bytes(content)
    data = PreparedData(tmp_path / "data", "train")
    with pytest.raises(InputError, match=r"train-00000\.tar at byte 512 cannot be read"):
        data.read(0)
    data.read(5)  # the others are whole


def test_a_shard_cut_off_and_a_missing_one_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(InputError, match=r"train-00000\.tar ends before byte"):
        PreparedData(tmp_path / "data", "train").read(5)
    shard.unlink()
    with pytest.raises(InputError, match=r"train-00000\.tar cannot be read: No such file"):
        PreparedData(tmp_path / "data", "train").read(0)


def test_unknown_splits_parts_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.parquet is missing"):
        PreparedData(tmp_path, "train")
    _write(tmp_path / "data")
    with pytest.raises(InputError, match="holds no sample of split 'test'"):
        PreparedData(tmp_path / "data", "test")
    with pytest.raises(InputError, match="it holds count/non_thinking, count/thinking"):
        PreparedData(tmp_path / "data", "train").rows_of("count/auto")
