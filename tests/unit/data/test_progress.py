import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.progress import PreparationProgress
from megatron_mm.data.sources import tasks_of
from tests.datasets import encoded

PNG = encoded(Image.new("RGB", (4, 4)))


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_tell_share_rate_and_time_left() -> None:
    clock, lines = Clock(), []
    with PreparationProgress(["ocr", "web/text"], lines.append, clock) as progress:
        progress.begin("ocr")
        clock.now = 9.0
        progress.advance("ocr", 0.1, 900)
        assert lines == []
        clock.now = 20.0
        progress.advance("ocr", 0.15, 1100)
        clock.now = 25.0
        progress.begin("web/text")
        progress.advance("ocr", 0.75, 500)
        clock.now = 85.0
        progress.advance("web/text", 0.5, 60_000)
    assert lines == [
        "ocr (source 1 of 2): 25%, 2,000 records, 100 records/s, 0:01:00 left",
        "web/text (source 2 of 2): 50%, 60,000 records, 1,000 records/s, 0:01:00 left",
    ]


def test_what_an_earlier_call_did_is_no_work_of_this_one() -> None:
    clock, lines = Clock(), []
    with PreparationProgress(["ocr"], lines.append, clock) as progress:
        progress.begin("ocr")
        progress.restore("ocr", 0.8)
        clock.now = 10.0
        progress.advance("ocr", 0.1, 50)
    assert lines == ["ocr (source 1 of 1): 90%, 50 records, 5 records/s, 0:00:10 left"]


def _write_captions(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for suffix, content in (("png", PNG), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))


@pytest.mark.parametrize("form", ["chat", "lines", "parquet", "webdataset", "folder", "text", "interleaved"])
def test_tasks_end_further_and_further_up_to_the_whole(form: str, tmp_path: Path) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    talk = [
        {"conversations": [{"from": "human", "value": "a" * n}, {"from": "gpt", "value": "b"}]} for n in range(1, 8)
    ]
    if form == "chat":
        for name in "ab":
            (directory / f"{name}.json").write_text(json.dumps(talk))
    elif form == "lines":
        (directory / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in talk))
    elif form == "interleaved":
        (directory / "a.jsonl").write_text('{"texts": ["One"], "images": [null]}\n' * 7)
    elif form == "parquet":
        for name in "ab":
            pq.write_table(pa.table({"problem": ["q"] * 7, "answer": ["a"] * 7}), directory / f"{name}.parquet")
    elif form == "webdataset":
        for name in "ab":
            _write_captions(directory / f"{name}.tar", 7)
    elif form == "folder":
        for number in range(7):
            (directory / f"{number}.png").write_bytes(PNG)
    else:
        (directory / "b.jsonl").write_text('{"text": "x"}\n' * 7)
        (directory / "a.txt").write_text("x")
    reader = "chat" if form == "lines" else form
    source = SourceConfig.model_validate({"name": "s", "format": reader, "path": directory})
    ends = [task.end for task in tasks_of(source, 2)]
    assert len(ends) >= 4
    assert ends == sorted(set(ends))
    assert 0 < ends[0] < 0.6
    assert ends[-1] == pytest.approx(1.0)
