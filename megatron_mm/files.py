"""Directories that appear under their name only when they are whole, and directories that one run has for itself."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mm.config.errors import InputError

# What makes a directory one of Hugging Face's models.
HF_CONFIG = "config.json"


def refuse_existing(directory: Path) -> None:
    """Raise `InputError` if the directory exists: nothing of the user's is overwritten."""
    if directory.exists():
        raise InputError(f"{directory} exists already; remove it or choose another directory")


def refuse_unwritable(directory: Path, what: str) -> None:
    """Raise `InputError` if a directory can neither be used nor made, since a file is in its place or above it.

    Args:
        what: the directory is, for the message.
    """
    place = next(path for path in (directory, *directory.parents, Path()) if os.path.lexists(path))
    if not place.is_dir():
        raise InputError(f"{what} {directory} cannot be made: {place} is a file; choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{what} {directory} cannot be written: no permission in {place}; choose another")


def refuse_unwritable_file(file: Path, what: str) -> None:
    """Raise `InputError` if a file cannot be written, since a directory is in its place or it lies in none.

    Args:
        what: the file is, for the message.
    """
    if file.is_dir():
        raise InputError(f"{what} {file} cannot be written: it is a directory; name a file in it")
    if not file.parent.is_dir():
        raise InputError(f"{what} {file} cannot be written: there is no directory {file.parent}; create it")


def partial_of(directory: Path) -> Path:
    """Where a directory is written before it is whole."""
    return directory.with_name(directory.name + ".partial")


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, beside `directory`, that takes its name when the block ends without an error.

    Raises:
        InputError: the directory exists already.
    """
    refuse_existing(directory)
    partial = partial_of(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, directory)


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Have a directory for oneself, making it where it is missing; a process that is killed gives it free.

    Raises:
        InputError: it cannot be written, or another process has it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}; choose another directory") from None
    with lock:
        try:
            # A lock of the process: children that outlive it, such as loader workers, do not have it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{directory} cannot be locked: {error.strerror}; choose a file system with locks"
                ) from None
            lock.seek(0)
            raise InputError(
                f"{directory} is in use by {lock.read().strip()}; end that run, or choose another directory"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
