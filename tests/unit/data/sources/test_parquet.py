"""Parquet: rows that are read over groups and tasks, reasons, and damaged files."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.data.records import StoredTurn
from megatron_mm.data.sources.base import Reject
from megatron_mm.data.sources.parquet import ParquetTask
from tests.unit.data.sources import read_all, reasons, samples


def _write(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def _row(number: int = 0, **more: Any) -> dict[str, Any]:
    picture = {"bytes": b"picture %d" % number, "path": None}
    return {"images": [picture], "problem": f"<image>Find {number}.", "answer": f"<answer> {number} </answer>", **more}


@pytest.mark.parametrize("records_per_task", [1, 3, 40, 1000])
@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_every_row_once_over_groups_and_tasks(tmp_path: Path, records_per_task: int, row_group_size: int) -> None:
    path = _write(tmp_path / "a.parquet", [_row(number) for number in range(80)], row_group_size=row_group_size)
    found = samples(read_all("parquet", tmp_path, records_per_task))
    assert [sample.origin for sample in found] == [f"{path} row {number + 1}" for number in range(80)]
    for number, sample in enumerate(found):
        assert sample.content.turns == (StoredTurn([0, f"Find {number}."], str(number)),)
        assert sample.pictures == (b"picture %d" % number,)


@pytest.mark.parametrize(
    ("column", "pictures"),
    [
        ({"image": b"x"}, (b"x",)),
        ({"images": [b"x"]}, (b"x",)),
        ({"image": {"bytes": b"x", "path": "a.png"}}, (b"x",)),
        ({"image": {"bytes": None, "path": "a.png"}}, (Path("a.png"),)),
        ({"image": "a.png"}, (Path("a.png"),)),
        ({"images": [{"bytes": b"x"}, {"bytes": b"y"}]}, (b"x", b"y")),
        ({"images": None}, ()),
    ],
)
def test_ways_to_hold_pictures(tmp_path: Path, column: dict[str, Any], pictures: tuple[Any, ...]) -> None:
    path = _write(tmp_path / "a.parquet", [{"problem": "q", "answer": "a", **column}])
    (sample,) = samples(read_all("parquet", path, pictures=tmp_path / "p"))
    assert sample.pictures == tuple(tmp_path / "p" / item if isinstance(item, Path) else item for item in pictures)


def test_reasoning_of_its_own_column(tmp_path: Path) -> None:
    rows = [_row(reasoning=" since "), _row(reasoning=None), _row(reasoning=" "), _row(reasoning=None)]
    rows[3]["answer"] = "<think>because</think>0"
    found = samples(read_all("parquet", _write(tmp_path / "a.parquet", rows)))
    assert [sample.content.turns[0].reasoning for sample in found] == ["since", None, None, "because"]


def test_conversations(tmp_path: Path) -> None:
    said = [("user", "<image>q", None), ("assistant", None, "a")]
    turns = [{"role": role, "content": content, "value": value} for role, content, value in said]
    (sample,) = samples(
        read_all("parquet", _write(tmp_path / "a.parquet", [{"messages": turns, "image": b"x", "system": "S"}]))
    )
    assert (sample.content.turns, sample.content.system) == ((StoredTurn([0, "q"], "a"),), "S")


def test_reasons(tmp_path: Path) -> None:
    rows = [
        _row(problem=None, reasoning=None),
        _row(answer=None),
        _row(answer="<think>x</think>y", reasoning="z"),
        _row(problem="<image><image>"),
        _row(images=[{"bytes": None, "path": None}]),
    ]
    assert reasons(read_all("parquet", _write(tmp_path / "a.parquet", rows))) == [
        "no problem",
        "no answer",
        "reasoning both in answer and in a column of its own",
        "2 <image> marks for 1 pictures",
        "a picture has neither bytes nor a path",
    ]


@pytest.mark.parametrize(
    ("column", "answers"),
    [
        (pa.array([4, -7]), ["4", "-7"]),
        (pa.array([3.0, 0.25]), ["3", "0.25"]),
        (pa.array([2**53 + 1, 10**18]), [str(2**53 + 1), str(10**18)]),
        (pa.array([1e-9, 12345678.9]), ["1e-09", "12345678.9"]),
        (pa.array([3, None], pa.float64()), ["3", "no answer"]),
        (pa.array([math.nan, math.inf]), ["answer is float, not text", "answer is float, not text"]),
        (pa.array([Decimal("1.50"), Decimal("20.00")]), ["1.50", "20.00"]),
        (pa.array([7, 200], pa.uint8()), ["7", "200"]),
        (pa.array([1.5, 2.0], pa.float32()), ["1.5", "2"]),
        (pa.array([True, False]), ["answer is bool, not text", "answer is bool, not text"]),
        (pa.array(["0042", "1.10"]), ["0042", "1.10"]),
    ],
)
def test_columns_of_numbers(tmp_path: Path, column: pa.Array, answers: list[str]) -> None:
    pq.write_table(pa.table({"problem": ["q", "q"], "answer": column}), tmp_path / "a.parquet")
    found = read_all("parquet", tmp_path)
    assert [item.reason if isinstance(item, Reject) else item.content.turns[0].answer for item in found] == answers


def test_text_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"problem": texts, "answer": pa.array(["a", "a"])}), tmp_path / "a.parquet")
    first, second = read_all("parquet", tmp_path)
    assert len(samples([first])) == 1
    assert reasons([second])[0].startswith("text is not UTF-8")


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"a\.parquet has columns question, answer; rename them so that"):
        read_all("parquet", path)


@pytest.mark.parametrize("damage", ["cut off", "in the middle", "empty"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path / "a.parquet", [_row(number) for number in range(50)], compression="zstd")
    content = bytearray(path.read_bytes())
    if damage == "in the middle":
        content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    path.write_bytes({"cut off": content[:-20], "in the middle": content, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"a\.parquet is damaged, cut off or not Parquet .*copy it again"):
        read_all("parquet", path)


def test_a_file_with_fewer_rows_than_it_says(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.parquet", [_row()] * 5)
    task = ParquetTask(file, 2, 9, ("problem", "answer", "images"), tmp_path, 1.0)
    with pytest.raises(InputError, match="it ends before row 9"):
        list(task.records())
