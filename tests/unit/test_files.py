"""A directory belongs to one process at a time."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.files import in_use


def _hold(directory: Path, ready: Connection) -> None:
    with in_use(directory):
        ready.send("held")
        signal.pause()


def test_a_directory_is_refused_while_another_process_has_it(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "run"
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(directory, theirs))
    holder.start()
    assert mine.recv() == "held"
    with pytest.raises(InputError, match=rf"{directory} is in use by process {holder.pid} on .*; end that run"):
        with in_use(directory):
            pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with in_use(directory):
        assert (directory / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: Not a directory; choose another"):
        with in_use(tmp_path / "file" / "run"):
            pass
