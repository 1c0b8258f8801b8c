"""Directories that appear under their name only when they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mm.config.errors import InputError


def refuse_existing(directory: Path) -> None:
    """Raise `InputError` if the directory exists: nothing of the user's is overwritten."""
    if directory.exists():
        raise InputError(f"{directory} exists already; remove it or choose another directory")


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
