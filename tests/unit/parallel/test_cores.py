"""The cores that a process may use: what it is bound to, and its quota; and whom the launcher warns."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.cli import main
from megatron_mm.parallel.cores import shared_cores, usable_cores


def _cgroups(folder: Path, path: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A hierarchy of cgroups with these limits, and a file that says that this process is in `path`."""
    for name, limit in limits.items():
        (folder / "cgroup" / name).mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name / "cpu.max").write_text(f"{limit}\n", encoding="utf-8")
    (folder / "cgroup").mkdir(exist_ok=True)
    (folder / "membership").write_text(f"1:name=systemd:/else\n0::{path}\n", encoding="utf-8")
    return folder / "cgroup", folder / "membership"


def test_a_binding_counts(tmp_path: Path) -> None:
    """In a process of its own, since the binding stays."""
    first = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{first}]); from megatron_mm.parallel.cores import usable_cores; "
        "print(usable_cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) <= 1


@pytest.mark.parametrize(
    ("path", "limits", "expected"),
    [
        ("/", {"": "50000 100000"}, 0.5),
        # The narrowest of a group and those that it is in; "max" is no limit.
        ("/pod/task", {"pod": "75000 100000", "pod/task": "max 100000"}, 0.75),
        ("/pod/task", {"pod": "max 100000", "pod/task": "25000 50000"}, 0.5),
        ("/pod/task", {"other": "10000 100000"}, math.inf),
    ],
)
def test_a_quota_counts(tmp_path: Path, path: str, limits: dict[str, str], expected: float) -> None:
    bound = len(os.sched_getaffinity(0))
    assert usable_cores(*_cgroups(tmp_path, path, limits)) == min(bound, expected)


def test_without_cgroups_the_binding_alone_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == len(os.sched_getaffinity(0))


def test_ranks_that_share_cores_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_cores(8, 8) is None
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    message = shared_cores(8, 1.5)
    assert message is not None
    assert message.startswith("8 ranks on ")
    assert f"share 1.5 of its {os.cpu_count()} cores" in message
    assert "start fewer ranks" in message
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    message = shared_cores(8, 1)
    assert message is not None
    assert "--exclusive --mem=0" in message


def test_the_launcher_warns_before_it_starts_ranks(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the ranks: what they do has nothing to do with it."""
    monkeypatch.setattr("megatron_mm.parallel.launch.run_ranks", lambda *_: 0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    warned = []
    for number, cores in enumerate(({0}, {0, 1})):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        run = [f"data.path={digits}", f"run_dir={tmp_path / str(number)}", "init_from=null", "--nproc", "2"]
        assert main(["train", "mini/stage3", *run]) == 0
        warned.append([line for line in capsys.readouterr().err.splitlines() if "share 1 of its" in line])
    assert [len(lines) for lines in warned] == [1, 0]
    assert warned[0][0].startswith("megatron-mm: 2 ranks on ")
