"""What a run does about its surroundings: signals, stopped ranks, other runs, damaged checkpoints."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from megatron_mm.checkpoint import paths
from megatron_mm.config.errors import REQUEUE_CODE
from tests import runs
from tests.checkpoints import assert_same, content, flip_bit

LONG = ("train.steps=100000", "optim.schedule=constant", "checkpoint.save_every=100000")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_asks_to_be_started_again(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = runs.start("mini/stage3", digits, tmp_path, 2, *LONG)
    runs.wait_until(lambda: runs.steps_done(tmp_path) >= 3, process)
    process.send_signal(number)
    code, said = runs.end(process)
    assert code == REQUEUE_CODE, said
    done = runs.steps_done(tmp_path)
    newest = paths.newest(tmp_path)
    assert newest == paths.step_directory(tmp_path, done)
    # The launcher passes each on as the same one.
    assert f"SIGUSR1: saved after step {done}, leaving" in said
    assert "Traceback" not in said
    if number is signal.SIGUSR1:
        # Started again, it goes on there.
        runs.train("mini/stage3", digits, tmp_path, 2, *LONG[1:], f"train.steps={done + 2}")
        assert [line["step"] for line in runs.metrics(tmp_path)] == list(range(1, done + 3))


def test_a_stopped_rank_is_named_and_all_end(digits: Path, tmp_path: Path) -> None:
    process = runs.start("mini/stage3", digits, tmp_path, 2, *LONG, "guard.hang_seconds=5")
    runs.wait_until(lambda: runs.steps_done(tmp_path) >= 3, process)
    ranks = runs.ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    code, said = runs.end(process)
    assert code not in (0, 2, REQUEUE_CODE), said
    assert "no progress for 5 s: rank 1 does not answer, process " in said
    assert f"process {ranks[1]} on" in said
    assert " of step " in said
    assert not [rank for rank in ranks.values() if Path(f"/proc/{rank}").exists()]


def test_a_directory_that_a_run_uses_is_refused(digits: Path, tmp_path: Path) -> None:
    process = runs.start("mini/stage3", digits, tmp_path, 2, *LONG)
    runs.wait_until(lambda: runs.steps_done(tmp_path) >= 1, process)
    code, said = runs.end(runs.start("mini/stage3", digits, tmp_path, 1, *LONG))
    assert code == 2, said
    assert f"{tmp_path} is in use by process {runs.ranks_of(process)[0]} on " in said
    before = runs.steps_done(tmp_path)
    runs.wait_until(lambda: runs.steps_done(tmp_path) > before, process)  # undisturbed
    runs.kill_all(process)


def test_a_directory_that_cannot_be_written_is_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = runs.end(runs.start("mini/stage3", digits, tmp_path / "file" / "run", 2, *LONG))
    assert code == 2, said
    assert f"{tmp_path / 'file' / 'run'} cannot be made: {tmp_path / 'file'} is a file; choose another" in said


def test_a_flipped_byte_costs_the_steps_since_the_checkpoint_before(digits: Path, tmp_path: Path) -> None:
    six = ("train.steps=6", "checkpoint.save_every=2", "checkpoint.keep_last=9")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    runs.train("mini/stage3", digits, whole, 2, *six)
    shutil.copytree(whole, damaged)
    file = next(paths.step_directory(damaged, 6).glob("*.distcp"))
    flip_bit(file)
    code, said = runs.end(runs.start("mini/stage3", digits, damaged, 2, *six))
    assert code == 0, said
    assert file.name in said
    assert "resuming at step 4" in said
    assert_same(content(damaged), content(whole))
    assert [line["step"] for line in runs.metrics(damaged)] == list(range(1, 7))
