"""Preparing: counts add up whatever is bad, whoever is killed, and however often it is started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_prepare
from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.data import prepare as prepare_module
from megatron_mm.data.index import INDEX, Index
from megatron_mm.data.prepare import Manifest, SourceCounts, prepare
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.sources.base import RawSample, Reject
from tests.datasets import encoded, turn, write_dataset

RECORDS = 60


@pytest.fixture
def sources(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    """A YAML file that names 60 conversations about pictures, of which 3 are bad, and 10 texts."""
    random = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    records: list[dict[str, Any]] = []
    for number in range(RECORDS):
        name = f"{number}.png"
        size = (8 + number, 20, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(pictures / name)
        said = f"<think>Let me see {number}</think>It is {number}." if number % 3 else f"It is {number}."
        turns = [{"from": "human", "value": f"<image>\nWhat is it? ({number})"}, {"from": "gpt", "value": said}]
        records.append({"id": number, "image": name, "conversations": turns})
    (pictures / "10.png").write_bytes(b"")
    (pictures / "20.png").unlink()
    records[30]["conversations"][1]["value"] = " "
    (tmp_path / "talk.json").write_text(json.dumps(records), encoding="utf-8")
    lines = [json.dumps({"text": f"Text number {number}."}) for number in range(10)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tree = {
        "tokenizer": str(tokenizer.directory),
        "samples_per_shard": 8,
        "max_rejected": 0.1,
        "sources": [
            {
                "name": "talk",
                "format": "chat",
                "path": str(tmp_path / "talk.json"),
                "pictures": str(pictures),
                "heldout": 0.2,
            },
            {"name": "web/text", "format": "text", "path": str(tmp_path / "texts.jsonl")},
        ],
    }
    file = tmp_path / "sources.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def _config(sources: Path, *overrides: str) -> PrepareConfig:
    return load_prepare(sources, overrides)


def _prepared(sources: Path, directory: Path, *overrides: str, workers: int = 0) -> Manifest:
    return prepare(_config(sources, *overrides), directory, workers, lambda _: None)


def _command(sources: Path, directory: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "megatron_mm.cli", "data", "prepare", str(sources), str(directory), *options]


def test_counts_add_up_and_rejects_say_where_and_why(sources: Path, tmp_path: Path) -> None:
    manifest = _prepared(sources, tmp_path / "out")
    talk, text = manifest.sources["talk"], manifest.sources["web/text"]
    assert (talk.records, talk.written, talk.rejected, talk.duplicates_dropped) == (60, 57, 3, 0)
    assert text == SourceCounts(10, 10, 0, 0, train={"web/text/document": 10}, heldout={})
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    file = tmp_path / "talk.json"
    assert [reject["origin"] for reject in rejects] == [f"{file} record {number}" for number in (11, 21, 31)]
    for reject, reason in zip(rejects, ("is empty (0 bytes)", "does not exist", "empty answer"), strict=True):
        assert reject["source"] == "talk"
        assert reason in reject["reason"]
    data = PreparedData(str(tmp_path / "out"))
    origins = Counter(data.read(row).origin for row in range(len(data.index)))
    assert len(origins) == len(data.index) == 67
    counts = Counter(part.part for part in data.index.parts for _ in range(part.count))
    assert counts == {"talk/thinking": 38, "talk/non_thinking": 19, "web/text/document": 10}
    for split, told in (("train", {**talk.train, **text.train}), ("heldout", talk.heldout)):
        assert told == {part.part: part.count for part in data.index.parts if part.split == split}
    assert 3 < sum(talk.heldout.values()) < 25
    assert Manifest.read(tmp_path / "out") == manifest
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_workers_change_nothing(sources: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    _prepared(sources, one)
    _prepared(sources, other, workers=3)
    assert _files(one) == _files(other)


def test_a_second_call_does_nothing_and_another_request_is_refused(sources: Path, tmp_path: Path) -> None:
    first = _prepared(sources, tmp_path / "out")
    before = (tmp_path / "out" / INDEX).stat().st_mtime_ns
    assert _prepared(sources, tmp_path / "out", "max_rejected=0.5") == first
    assert (tmp_path / "out" / INDEX).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made with duplicates=keep, not drop"):
        _prepared(sources, tmp_path / "out", "duplicates=drop")
    with pytest.raises(InputError, match=r"3 of 60 records of its source talk were rejected, .*max_rejected=0\.02"):
        _prepared(sources, tmp_path / "out", "max_rejected=0.02")
    with pytest.raises(InputError, match="exists already, made of other sources or settings"):
        _prepared(sources, tmp_path / "out", "samples_per_shard=9")
    (tmp_path / "talk.json").write_text((tmp_path / "talk.json").read_text() + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="exists already, made of other sources or settings"):
        _prepared(sources, tmp_path / "out")


def test_above_the_share_of_rejects_nothing_is_written_and_raising_it_goes_on(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 of 60 records of source talk are bad, .*max_rejected=0\.02(.|\n)*empty"):
        _prepared(sources, tmp_path / "out", "max_rejected=0.02")
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.partial" / "rejects.jsonl").read_text().splitlines()) == 3
    shard = tmp_path / "out.partial" / "000-talk-00000.tar"
    written = shard.stat().st_mtime_ns
    with pytest.raises(InputError, match="holds an unfinished preparation of other sources or settings"):
        _prepared(sources, tmp_path / "out", "samples_per_shard=9")
    _prepared(sources, tmp_path / "out")
    assert (tmp_path / "out" / shard.name).stat().st_mtime_ns == written


def test_a_full_disk_is_named_and_the_rest_follows(sources: Path, tmp_path: Path) -> None:
    work, config = tmp_path / "out.partial", _config(sources)
    own = ChatTokenizer(config.tokenizer, add_image=True)
    prepare_module._begin(work, prepare_module._request(config), own)
    full = work / "000-talk-00003.tar.partial"
    full.symlink_to("/dev/full")
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"no space to write .*No space left on device; make room"):
            _prepared(sources, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()
        if not full.is_symlink():
            full.symlink_to("/dev/full")
    full.unlink()
    _prepared(sources, tmp_path / "out")
    _prepared(sources, tmp_path / "whole")
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


@pytest.mark.parametrize("victim", ["worker", "all"])
def test_killed_processes_lose_nothing(sources: Path, tmp_path: Path, victim: str) -> None:
    directory = tmp_path / "out"
    command = _command(sources, directory, "--workers", "2", "samples_per_shard=1")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    tasks = tmp_path / "out.partial" / "tasks"
    deadline = time.monotonic() + 300
    while len(list(tasks.glob("*.arrow"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    # The first child of a pool of spawned processes only watches over shared resources.
    os.kill(int(children[-1]) if victim == "worker" else process.pid, signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 2
        assert "a worker was killed" in message
        assert "the same command goes on from there" in message
    assert not directory.exists()
    done = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.arrow")}
    assert 3 <= len(done) < 70
    # What is half written is not taken for whole.
    manifest = _prepared(sources, directory, "samples_per_shard=1")
    assert sum(counts.records for counts in manifest.sources.values()) == 70
    _prepared(sources, tmp_path / "whole", "samples_per_shard=1")
    assert _files(directory) == _files(tmp_path / "whole")


def test_duplicates_are_counted_and_dropped_on_request(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    picture, other = (encoded(Image.new("RGB", (9, 9), (shade, 0, 0))) for shade in (1, 2))
    samples = [
        RawSample("first", turn("Which?", "1", num_pictures=1), (picture,)),
        RawSample("again", turn("Which?", "1", num_pictures=1), (picture,)),
        RawSample("other picture", turn("Which?", "1", num_pictures=1), (other,)),
        RawSample("other answer", turn("Which?", "2", num_pictures=1), (picture,)),
        Reject("bad", "reason"),
    ]
    limits: dict[str, Any] = {"max_rejected": 0.2}
    kept = write_dataset(tmp_path / "kept", tokenizer, {"a": samples}, **limits)
    assert (kept.duplicates, kept.sources["a"]) == (1, SourceCounts(5, 4, 1, 0, {"a/non_thinking": 4}, {}))
    assert len(Index(tmp_path / "kept" / INDEX)) == 4
    dropped = write_dataset(tmp_path / "dropped", tokenizer, {"a": samples}, duplicates="drop", **limits)
    assert (dropped.duplicates, dropped.sources["a"]) == (1, SourceCounts(5, 3, 1, 1, {"a/non_thinking": 3}, {}))
    data = PreparedData(str(tmp_path / "dropped"))
    assert {data.read(row).origin for row in range(len(data.index))} == {"first", "other picture", "other answer"}


def test_limits_on_records(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    picture = encoded(Image.new("RGB", (9, 9)))
    samples = [
        RawSample("fine", turn("Which?", "1", num_pictures=2), (picture, picture)),
        RawSample("many", turn("Which?", "1", num_pictures=3), (picture,) * 3),
        RawSample("long", turn("Which?" * 20, "1")),
        RawSample("missing", turn("Which?", "1", num_pictures=2), (picture,)),
    ]
    limits: dict[str, Any] = {"max_pictures": 2, "max_text_characters": 99, "max_rejected": 1}
    write_dataset(tmp_path / "data", tokenizer, {"a": samples}, **limits)
    rejects = [json.loads(line) for line in (tmp_path / "data" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["origin"]: reject["reason"] for reject in rejects} == {
        "many": "3 pictures, more than max_pictures=2",
        "long": "121 characters, more than max_text_characters=99",
        "missing": "its texts show the pictures [0, 1], but it has 1",
    }
    with pytest.raises(InputError, match="the sources hold no usable record"):
        write_dataset(
            tmp_path / "none", tokenizer, {"a": samples[1:]}, max_pictures=1, max_rejected=1, max_text_characters=9
        )


def test_faults_of_the_file_are_reported_together(sources: Path) -> None:
    with pytest.raises(InputError) as error:
        load_prepare(sources, ["samples_per_shard=0", "max_rejectd=1"])
    assert "samples_per_shard: input should be greater than 0 (seen: 0)" in str(error.value)
    assert "max_rejectd: unknown key; the nearest valid one is max_rejected" in str(error.value)
    tree = yaml.safe_load(sources.read_text())
    tree["sources"][1] |= {"name": "talk", "form": "text"}
    sources.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(InputError, match=r"sources\.1\.form: unknown key; the nearest valid one is sources\.1\.format"):
        load_prepare(sources)


def _files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
