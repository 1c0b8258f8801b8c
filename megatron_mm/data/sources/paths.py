"""Which files a source is made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import SourceConfig

T = TypeVar("T")


def files_of(source: SourceConfig, suffixes: tuple[str, ...]) -> list[Path]:
    """The source's file, or every file with one of the suffixes in its directory and below, sorted.

    Hidden files and directories (.cache, ._picture.jpg) are no data.

    Raises:
        InputError: there is no such path, or no such file.
    """
    if source.path.is_file():
        found = [source.path]
    elif source.path.is_dir():
        found = visible_files(source.path)
    else:
        raise InputError(f"path {source.path} of source {source.name} does not exist; correct it")
    found = [path for path in found if path.suffix.lower() in suffixes]
    if not found:
        wanted = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise InputError(
            f"no file of format {source.format} ({wanted}) at {source.path}; correct source {source.name}'s path or "
            "its format"
        )
    return found


def visible_files(directory: Path) -> list[Path]:
    """Every file in the directory and below that is not hidden, sorted."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def with_spans(files: Sequence[Path]) -> Iterator[tuple[Path, Callable[[float], float]]]:
    """Files, each with a function from a share of the file, 0 to 1, to the share of all files' bytes that ends there.

    Raises:
        InputError: a file is gone.
    """
    try:
        # None counts for nothing: an empty file is a step as well.
        sizes = [file.stat().st_size + 1 for file in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    total, begin = sum(sizes), 0
    for file, size in zip(files, sizes, strict=True):
        yield file, partial(_share, begin=begin, size=size, total=total)
        begin += size


def _share(of_file: float, begin: int, size: int, total: int) -> float:
    return (begin + of_file * size) / total


def in_batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch
