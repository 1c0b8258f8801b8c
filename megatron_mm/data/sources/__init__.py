"""Readers of data sources: each makes tasks, whose records a worker reads one by one.

    base.py            what a reader makes
    chat.py            conversations as JSON
    parquet.py         questions with answers, or conversations, as Parquet
    webdataset.py      samples in tar files; tar_files.py reads their headers, energon.py energon's layout
    folder.py          pictures with captions beside them
    interleaved.py     documents of texts and pictures as JSON
    text.py            plain text
    pictures.py        a picture of a source -> a plain picture

Shared by them: paths.py (which files), json_files.py (records of JSON files), media.py (fields that name pictures or
other media), picture_names.py (how records name pictures), texts.py (where pictures stand in texts, and what is
reasoning), faults.py (records that cannot be used).
"""

from collections.abc import Callable, Iterator

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.sources import chat, folder, interleaved, parquet, text, webdataset
from megatron_mm.data.sources.base import Task

_READERS: dict[str, Callable[[SourceConfig, int], Iterator[Task]]] = {
    "chat": chat.tasks,
    "parquet": parquet.tasks,
    "webdataset": webdataset.tasks,
    "folder": folder.tasks,
    "interleaved": interleaved.tasks,
    "text": text.tasks,
}


def tasks_of(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of a source, in an order that its files alone decide.

    Args:
        source: what to read.
        records_per_task: most records that one task has.

    Raises:
        InputError: the path is missing, or has no file of the format; while iterating, a file is none of its kind as
            a whole, such as a JSON array that is cut off.
    """
    return _READERS[source.format](source, records_per_task)
