"""Names and order of checkpoints, what is kept, and what `find` refuses, without ranks."""

from pathlib import Path

import pytest

from megatron_mm.checkpoint.paths import find, newest, partial_of, partials, point_to, step_directory, up_to_latest
from megatron_mm.checkpoint.retention import Remover, superfluous
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import CheckpointConfig
from tests.checkpoints import make_checkpoint


def _steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in paths]


def test_newest_first_and_none_beyond_latest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert up_to_latest(tmp_path) == partials(tmp_path) == []
    for step in (500, 1000, 100_000_000, 1500):
        make_checkpoint(tmp_path, step)
    left = partial_of(step_directory(tmp_path, 2000), "x")
    left.mkdir()
    step_directory(tmp_path, 700).with_suffix(".damaged").mkdir()
    point_to(step_directory(tmp_path, 100_000_000))
    assert _steps(up_to_latest(tmp_path)) == [100_000_000, 1500, 1000, 500]
    point_to(step_directory(tmp_path, 1000))
    assert _steps(up_to_latest(tmp_path)) == [1000, 500]
    assert partials(tmp_path) == [left]


@pytest.mark.parametrize(
    ("latest", "keep_last", "keep_every", "gone"),
    [
        (6, 2, None, [4, 3, 2, 1]),
        (6, 1, 2, [5, 3, 1]),
        (6, 9, None, []),
        (4, 1, 3, [2, 1]),  # 5 and 6 are newer than latest
        (6, 1, 1, []),
    ],
)
def test_retention(tmp_path: Path, latest: int, keep_last: int, keep_every: int | None, gone: list[int]) -> None:
    for step in range(1, 7):
        make_checkpoint(tmp_path, step)
    point_to(step_directory(tmp_path, latest))
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    assert _steps(superfluous(tmp_path, config)) == gone
    remover = Remover()
    remover.remove(superfluous(tmp_path, config))
    remover.finish()
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", *(f"step_{step:08d}" for step in range(1, 7) if step not in gone)]


def test_find_looks_at_manifest_and_sizes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 3)
    assert find(tmp_path) == find(checkpoint) == checkpoint
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(InputError, match=r"step_00000003 is damaged(.|\n)*__0_0.distcp has 5 bytes, 1000 were written"):
        find(tmp_path)
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match=r"__0_0.distcp is missing"):
        find(tmp_path)
    (checkpoint / "manifest.json").write_text('{"step": 3', encoding="utf-8")
    with pytest.raises(InputError, match=r"step_00000003 is damaged(.|\n)*manifest.json cannot be read"):
        find(tmp_path)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match="no checkpoint in"):
        find(tmp_path)
