"""Bad arguments end with exit code 2 and one message, at once, and leave nothing behind.

The list of them is in tests/bad_arguments.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_arguments import CASES, Outcome, write_files

ROOT = Path(__file__).parents[2]
# Of the processor, and far more than any call takes: a heavy package alone takes as much.
MOST_SECONDS = 5.0
# What a call of a real process is tried on: each kind once, since starting one takes seconds.
ON_THEIR_OWN = (("show", "binary.yaml"), ("data", "prepare", "no_tokenizer.yaml", "D"), ("export", "nowhere", "E"))


@pytest.fixture(scope="module")
def outcomes(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What all calls came to, in one process that begins without any package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.bad_arguments", str(digits)],
        cwd=tmp_path_factory.mktemp("bad"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [Outcome(**outcome) for outcome in json.loads(result.stdout)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(arguments)[:60] for arguments, _ in CASES])
def test_a_bad_argument_is_refused(outcomes: list[Outcome], number: int) -> None:
    outcome, expected = outcomes[number], CASES[number][1]
    assert outcome.code == 2, f"{outcome.code}\n{outcome.stderr}"
    assert expected in outcome.stderr
    assert outcome.stdout == ""
    told = [line for line in outcome.stderr.splitlines() if line.startswith("megatron-mm")]
    assert len(told) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr) < 6000
    assert not outcome.written
    assert not outcome.imported
    assert outcome.seconds < MOST_SECONDS


@pytest.mark.parametrize("arguments", ON_THEIR_OWN, ids=" ".join)
def test_a_process_of_its_own_refuses_it_too(digits: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    expected = next(message for tried, message in CASES if tried == arguments)
    write_files(tmp_path, f"{digits}/tokenizer")
    command = [sys.executable, "-m", "megatron_mm.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("megatron-mm: ")
    assert expected in result.stderr
