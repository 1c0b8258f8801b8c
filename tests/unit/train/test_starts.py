"""A job that gets nowhere is not requeued for ever."""

import json
from pathlib import Path

import pytest

from megatron_mm.checkpoint import paths
from megatron_mm.config.errors import REQUEUE_CODE
from megatron_mm.train.starts import STUCK_CODE, judge_end, record_start


def _save(run_dir: Path, step: int) -> None:
    pointer = paths.pointer(run_dir)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.write_text(paths.step_directory(run_dir, step).name + "\n", encoding="utf-8")


def _start(run_dir: Path, saved_step: int | None = None, code: int = REQUEUE_CODE) -> int:
    record_start(run_dir)
    if saved_step is not None:
        _save(run_dir, saved_step)
    return judge_end(run_dir, code)


def test_two_starts_in_a_row_without_a_checkpoint_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    saved = [10, None, 12, None, None]
    codes = [_start(tmp_path, step) for step in saved]
    assert codes == [REQUEUE_CODE] * 4 + [STUCK_CODE]
    lines = (tmp_path / "logs" / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 10, 12, 12]


def test_another_job_and_other_codes_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert _start(tmp_path) == REQUEUE_CODE
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert _start(tmp_path) == REQUEUE_CODE
    assert _start(tmp_path, code=0) == 0


def test_nothing_is_noted_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [_start(tmp_path / "run") for _ in range(3)] == [REQUEUE_CODE] * 3
    assert not (tmp_path / "run").exists()
