"""metrics.jsonl: whole lines only, whatever happens while one is written, and no step twice."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mm.telemetry.lines import JsonLines, cut_after


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, *steps: int) -> None:
    lines = JsonLines(path)
    for step in steps:
        lines.append({"step": step, "loss": 1 / step})
    lines.close()


@contextmanager
def _full_at(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes`: writing gives an error, after what still fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_resumed_run_has_no_step_twice_and_none_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, *range(1, 16))
    cut_after(path, 10)
    _write(path, *range(11, 21))
    assert _steps(path) == list(range(1, 21))
    cut_after(path, 20)
    assert _steps(path)[-1] == 20
    cut_after(path, 0)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "of a new run", 0)


@pytest.mark.parametrize("missing", [1, 2, 5, 15])
def test_a_line_that_a_kill_has_cut_off_is_removed(missing: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2, 3)
    os.truncate(path, path.stat().st_size - missing)
    cut_after(path, 3)
    _write(path, 3, 4)
    assert _steps(path) == [1, 2, 3, 4]


def test_a_process_that_is_killed_loses_no_line_that_it_has_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from megatron_mm.telemetry.lines import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]))\n"
        "for step in range(1, 4): lines.append({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert _steps(path) == [1, 2, 3]


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    whole = path.read_bytes()
    with _full_at(len(whole) + 3):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                lines.append({"step": step})
            assert path.read_bytes() == whole
    assert lines.num_waiting == 2
    lines.append({"step": 4})
    assert lines.num_waiting == 0
    assert _steps(path) == [1, 2, 3, 4]


def test_lines_that_wait_are_rewound_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    with _full_at(path.stat().st_size):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                lines.append({"step": step})
    lines.rewind(2)
    lines.append({"step": 3})
    lines.rewind(3)
    assert _steps(path) == [1, 2, 3]


def test_figures_that_json_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 1e-3,
    }
