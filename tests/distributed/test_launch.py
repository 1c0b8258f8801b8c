"""The launcher with real ranks: what is told, what comes back, and that nobody stays behind."""

import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from megatron_mm.config.errors import REQUEUE_CODE, InputError
from megatron_mm.parallel.nodes import find_nodes
from megatron_mm.parallel.output import log_file

ROOT = Path(__file__).parents[2]
NUM_RANKS = 3


def _launch(
    folder: Path, scenario: str, *arguments: str, node: int = 0, num_ranks: int = NUM_RANKS
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.rank_program", str(folder), str(num_ranks), scenario, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": str(node)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _pids(folder: Path, num_ranks: int = NUM_RANKS) -> list[int]:
    """Process ids of all ranks, once all of them are at work."""
    files = [folder / f"pid_{rank}" for rank in range(num_ranks)]
    while not all(file.is_file() and file.read_text(encoding="utf-8") for file in files):
        time.sleep(0.1)
    return [int(file.read_text(encoding="utf-8")) for file in files]


def _assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _group_exists(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def _told(stderr: str) -> str:
    """What was printed, but for what the ranks print themselves."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("[rank "))


@pytest.mark.parametrize("scenario", ["raise", "no exception", "stopped"])
def test_the_first_failure_is_told_once_and_everyone_ends(tmp_path: Path, scenario: str) -> None:
    launcher = _launch(tmp_path, scenario)
    pids = _pids(tmp_path)
    _, stderr = launcher.communicate()
    _assert_gone(pids)
    assert launcher.returncode == 1
    told = _told(stderr)
    assert told.startswith("megatron-mm: rank 1 failed\nTraceback (most recent call last):\n"), stderr
    assert "ValueError: the planted fault\n" in told
    if scenario != "no exception":  # whose message goes on
        assert told.endswith("ValueError: the planted fault\n")
    assert stderr.count("megatron-mm: rank") == 1
    assert "the planted fault" in log_file(tmp_path / "logs", 1).read_text(encoding="utf-8")


def test_a_rank_ended_by_a_signal_is_named(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "killed")
    pids = _pids(tmp_path)
    _, stderr = launcher.communicate()
    _assert_gone(pids)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert _told(stderr) == "megatron-mm: rank 1 ended by SIGKILL\n"


def test_bad_input_of_one_rank_is_told_without_a_traceback(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "bad input")
    _, stderr = launcher.communicate()
    assert launcher.returncode == 2
    assert _told(stderr) == "megatron-mm: data.path=nowhere is missing\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_every_rank_and_they_end_by_themselves(tmp_path: Path, number: signal.Signals) -> None:
    launcher = _launch(tmp_path, "asked")
    pids = _pids(tmp_path)
    launcher.send_signal(number)
    _, stderr = launcher.communicate()
    assert launcher.returncode == REQUEUE_CODE, stderr
    assert _told(stderr) == ""
    _assert_gone(pids)
    assert sorted(file.name for file in tmp_path.glob("saved_*")) == ["saved_0", "saved_1", "saved_2"]


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "asked")
    pids = _pids(tmp_path)
    launcher.kill()
    launcher.communicate()
    while any(_group_exists(pid) for pid in pids):  # the test's time limit is for those who stay
        time.sleep(0.1)
    assert not list(tmp_path.glob("saved_*"))


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "deaf")
    pids = _pids(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    _, stderr = launcher.communicate()
    _assert_gone(pids)
    # What ranks have started ends with them: nobody is left in their process groups, once init has reaped them.
    while any(_group_exists(pid) for pid in pids):
        time.sleep(0.1)
    assert launcher.returncode == 128 + signal.SIGINT
    assert _told(stderr) == "megatron-mm: ended by a second SIGINT\n"


def test_logs_keep_every_start_and_the_terminal_gets_its_share(tmp_path: Path) -> None:
    for _ in range(2):
        launcher = _launch(tmp_path, "print")
        stdout, stderr = launcher.communicate()
        assert launcher.returncode == 0, stderr
        assert stdout == "rank 0 at work\n"
        assert sorted(stderr.splitlines()) == [f"[rank {rank}] rank {rank} complains" for rank in range(NUM_RANKS)]
    for rank in range(NUM_RANKS):
        lines = log_file(tmp_path / "logs", rank).read_text(encoding="utf-8").splitlines()
        assert [f"rank {rank} of 3 starts on {socket.gethostname()}" in line for line in lines] == [
            True,
            False,
            False,
        ] * 2
        assert sorted(lines[1:3]) == sorted(lines[4:6]) == [f"rank {rank} at work", f"rank {rank} complains"]


def test_two_launchers_make_one_job(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        rendezvous = f"localhost:{probe.getsockname()[1]}"
    launchers = [_launch(tmp_path, "asked", rendezvous, node=node, num_ranks=2) for node in range(2)]
    pids = _pids(tmp_path, 4)
    for launcher in launchers:
        launcher.send_signal(signal.SIGUSR1)
    told = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [REQUEUE_CODE] * 2, told
    _assert_gone(pids)
    assert len(list(tmp_path.glob("saved_*"))) == 4


def _screen(folder: Path, columns: int) -> str:
    """What the scenario with the bar writes to a terminal."""
    command = [sys.executable, "-m", "tests.rank_program", str(folder), str(NUM_RANKS), "bar"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 240)[0]:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def test_rank_0_draws_a_bar_on_the_launchers_terminal(tmp_path: Path) -> None:
    shown = _screen(tmp_path, 100)
    # A line as a terminal has it in the end: what is behind the last return to its beginning.
    lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line).rstrip("\r") for line in shown.split("\n")]
    final = [line.rpartition("\r")[2].rstrip() for line in lines]
    assert final[-2] == "done: all of it"
    assert "3/3" in final[-3]
    assert "loss 1.5" in final[-3]
    assert "━" in final[-3]
    assert len(final[-3]) <= 100
    assert any("1/3" in line and "loss 2.5" in line for line in re.split("[\r\n]", shown))
    # It stands in a line of its own, and the bar is drawn again below.
    assert "[rank 1] rank 1 warns" in final
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l"), "the cursor stays hidden"
    log = log_file(tmp_path / "logs", 0).read_text(encoding="utf-8")
    assert "\x1b" not in log
    assert "\r" not in log
    assert [line for line in log.splitlines() if "loss" in line] == [final[-3]]


def test_nodes_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(InputError, match="--nodes 0 is not a number of machines"):
        find_nodes(0, None)
    with pytest.raises(InputError, match="--nodes 2 needs --rendezvous HOST:PORT"):
        find_nodes(2, "n1")
    with pytest.raises(InputError, match="--nodes 2 is for srun"):
        find_nodes(2, "n1:29500")
