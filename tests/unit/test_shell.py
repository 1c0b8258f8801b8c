"""The shell scripts: shellcheck finds nothing, and every job begins the same way."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.config.load import load_config

ROOT = Path(__file__).parents[2]
JOBS = sorted(file for file in (ROOT / "slurm").glob("*.sh") if file.name != "common.sh")
COMMON_LINES = (
    "#SBATCH --ntasks-per-node=1",
    # The whole node: Slurm would otherwise give the one task of a node one core, and a core's share of the memory.
    "#SBATCH --exclusive",
    "#SBATCH --mem=0",
    "#SBATCH --requeue",
    "#SBATCH --open-mode=append",
    "#SBATCH --output=slurm/logs/%x-%j.log",
)


def _shellcheck(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("shellcheck")), "--external-sources", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shellcheck_finds_nothing() -> None:
    scripts = [file for folder in ("slurm", "examples", "tools", "tests") for file in (ROOT / folder).glob("*.sh")]
    assert len(scripts) > len(JOBS)
    result = _shellcheck(*scripts)
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_a_planted_fault(tmp_path: Path) -> None:
    script = tmp_path / "fault.sh"
    script.write_text("#!/usr/bin/env bash\nrm -rf $1/*\n", encoding="utf-8")
    assert "SC2086" in _shellcheck(script).stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_holds_no_more_than_its_needs_and_its_recipe(job: Path) -> None:
    lines = job.read_text(encoding="utf-8").splitlines()
    assert set(COMMON_LINES) <= set(lines)
    # A step of reinforcement learning draws thousands of responses before it can be saved.
    assert f"#SBATCH --signal=B:USR1@{1800 if job.stem == 'bpo' else 300}" in lines
    assert f"#SBATCH --job-name={job.stem}" in lines
    commands = [line for line in lines if line and not line.startswith("#")]
    assert len(commands) == 2
    match = re.fullmatch(r'launch (train|rl) ([a-z0-9_]+/[a-z0-9_]+) "\$@"', commands[1])
    assert match is not None
    assert (load_config(match[2]).rl is not None) == (match[1] == "rl")
