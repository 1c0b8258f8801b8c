"""Tests of the readers of data sources."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.sources import tasks_of
from megatron_mm.data.sources.base import RawSample, Reject


def read_all(kind: str, path: Path, records_per_task: int = 2, **settings: Any) -> list[RawSample | Reject]:
    """Every record, by way of tasks that have been pickled, as they are for a worker."""
    source = SourceConfig.model_validate({"name": "test", "format": kind, "path": path, **settings})
    tasks = pickle.loads(pickle.dumps(list(tasks_of(source, records_per_task))))  # noqa: S301 (our own)
    batches = [list(task.records()) for task in tasks]
    assert all(batches), "a task without records"
    # The end of an archive is judged beside its records.
    assert all(len(batch) <= records_per_task + 1 for batch in batches)
    return [record for batch in batches for record in batch]


def write_json(path: Path, records: Any) -> Path:
    """A JSON file, with the directory it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def samples(records: Sequence[RawSample | Reject]) -> list[RawSample]:
    """The records, none of which is rejected."""
    assert not (rejects := [record for record in records if isinstance(record, Reject)]), rejects
    return [record for record in records if isinstance(record, RawSample)]


def reasons(records: Sequence[RawSample | Reject]) -> list[str]:
    """Why the records are rejected, all of them."""
    assert not (taken := [record for record in records if isinstance(record, RawSample)]), taken
    return [record.reason for record in records if isinstance(record, Reject)]
