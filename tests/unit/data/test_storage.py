"""Data that lies behind a URL gives the same batches as data in a directory."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data import storage
from megatron_mm.data.loader import Feed, MicroBatches
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.storage import LocalStorage, RemoteStorage
from tests.tiny import tiny_config


@pytest.fixture
def remote(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The digits in fsspec's memory; what is copied here goes to the test's own directory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"memory://{uuid4().hex}/digits"
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(digits), url, recursive=True)
    yield url
    filesystem.rm(url, recursive=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_url_gives_the_same_batches(
    digits: Path, remote: str, tokenizer: ChatTokenizer, tmp_path: Path, num_workers: int
) -> None:
    found = []
    for path in (digits, remote):
        config = tiny_config(
            data__path=path,
            data__blend="{}",
            data__num_workers=num_workers,
            model__language__vocab_size=384,
            train__global_batch=8,
        )
        feed = Feed(MicroBatches(config, tokenizer, 0, 1), 0, config)
        found.append([batch for step in feed for batch in step])
        assert feed.num_broken == 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert (ours.tiles is None) == (theirs.tiles is None)
        assert ours.tiles is None or torch.equal(ours.tiles, theirs.tiles)  # pyright: ignore[reportArgumentType]
    # One copy of the index, whoever opens it.
    PreparedData(remote)
    assert len(list(tmp_path.glob("megatron_mm-*"))) == 1


def test_changed_data_are_copied_anew(remote: str, digits: Path, tmp_path: Path) -> None:
    first = PreparedData(remote).index.path
    fsspec.filesystem("memory").put(str(digits / "index.arrow"), f"{remote}/index.arrow")
    assert PreparedData(remote).index.path != first


def test_what_is_not_there_is_named(remote: str) -> None:
    with pytest.raises(InputError, match=r"no prepared data in .*index\.arrow is missing"):
        PreparedData("memory://nothing/there")
    data = PreparedData(remote)
    fsspec.filesystem("memory").rm(f"{remote}/{data.index.shards[data.index.shard[0]]}")
    with pytest.raises(InputError, match=rf"shard {remote}/.*\.tar does not exist"):
        data.read(0)
    with pytest.raises(InputError, match="nosuch://x cannot be opened"):
        PreparedData("nosuch://x")


def test_a_read_that_fails_is_tried_again(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    there = RemoteStorage(remote)
    filesystem = there._opened()
    whole, failures = filesystem.cat_file, [OSError("reset"), OSError("reset")]

    def flaky(url: str, *, start: int, end: int) -> bytes:
        if failures:
            raise failures.pop()
        return whole(url, start=start, end=end)

    monkeypatch.setattr(filesystem, "cat_file", flaky)
    assert there.read("manifest.json", 0, 1) == b"{"
    assert waits == [1, 2]
    failures += [OSError("reset")] * storage.ATTEMPTS
    with pytest.raises(InputError, match="cannot be read, 4 times: reset"):
        there.read("manifest.json", 0, 1)


def test_few_files_are_open_at_once(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    for number in range(5):
        shutil.copy(digits / "manifest.json", tmp_path / str(number))
    local = LocalStorage(tmp_path)
    for number in (0, 1, 2, 3, 4, 0, 4):
        assert local.read(str(number), 0, 1) == b"{"
        assert len(local._open) <= 2
