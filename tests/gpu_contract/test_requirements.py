"""The requirements of a GPU machine agree with one another, and with what these tests run with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_contract

CHECKOUT = Path(__file__).parents[2]


def _resolve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def test_the_gpu_extra_resolves_to_what_is_installed() -> None:
    done = _resolve("-e", ".[gpu]")
    assert done.returncode == 0, done.stderr[-3000:]
    would = re.findall(r"^Would install (.*)$", done.stdout, re.MULTILINE)
    assert len(would) == 1
    assert re.fullmatch(r"megatron_mm-\S+", would[0]), would


def test_what_is_installed_has_no_conflicts() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
