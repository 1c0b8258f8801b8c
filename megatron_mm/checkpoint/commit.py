"""From an empty directory to a checkpoint: what the ranks agree on before and after each writes its files.

Whatever happens on one rank is told to all, so that none waits for another.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_mm.checkpoint.agreement import from_first
from megatron_mm.checkpoint.manifest import FileRecord, Manifest
from megatron_mm.checkpoint.paths import partial_of, partials, point_to, step_directory, sync_directory
from megatron_mm.checkpoint.snapshot import Failed, Snapshot, Written
from megatron_mm.config.errors import InputError

logger = logging.getLogger(__name__)

# The files that rank 0 writes when all ranks are done: torch's and Megatron-Core's descriptions.
DESCRIPTIONS = (".metadata", "metadata.json")


def begin(run_dir: Path, step: int, group: dist.ProcessGroup) -> tuple[Path, str]:
    """Make the directory that a checkpoint is written to; all ranks call it together.

    Returns:
        The directory, of a name that no other attempt has, and why it could not be made, "" if it was.
    """
    return from_first(lambda: _made(partial_of(step_directory(run_dir, step), uuid.uuid4().hex[:12])), group)


def _made(partial: Path) -> tuple[Path, str]:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        return partial, str(error)
    return partial, ""


def commit(
    run_dir: Path,
    step: int,
    snapshot: Snapshot,
    outcome: Written | Failed,
    group: dist.ProcessGroup,
    check: Callable[[Path], None] | None = None,
) -> str:
    """Make a checkpoint of what the ranks have written, or remove it; all ranks call it together.

    Args:
        outcome: this rank's.
        check: looks at what was written before it takes its name, on every rank; raises `InputError` where it is wrong.

    Returns:
        Why there is no checkpoint, "" if there is one.

    Raises:
        InputError: a check raised it, on any rank.
    """
    is_first = dist.get_rank() == 0
    of_ranks: list[Any] = [None] * dist.get_world_size() if is_first else []
    dist.gather_object((outcome, snapshot.num_bytes()), of_ranks or None, group=group)
    outcomes: list[Written | Failed] = [of_rank[0] for of_rank in of_ranks]
    needed_bytes = sum(of_rank[1] for of_rank in of_ranks)
    fault = _described(snapshot, outcomes) if is_first else ""
    if fault:
        fault += f"; {_room(snapshot.directory, needed_bytes)}"
    fault = from_first(lambda: fault, group)
    refused = "" if fault or check is None else _checked(check, snapshot.directory, group)
    if is_first and not fault and not refused:
        fault = _named(run_dir, step, snapshot.directory, outcomes, needed_bytes)
    if is_first and (fault or refused):
        shutil.rmtree(snapshot.directory, ignore_errors=True)  # what is left is removed when a run starts
    fault = from_first(lambda: fault, group)
    if refused:
        raise InputError(refused)
    return fault


def remove_partials(run_dir: Path) -> None:
    """Remove what saves and removals that were cut off have left. For one rank."""
    for path in partials(run_dir):
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            logger.warning("%s could not be removed: %s; the next start of the run tries again", path, error)


def _described(snapshot: Snapshot, outcomes: list[Written | Failed]) -> str:
    """Write what tells where each tensor lies. On rank 0."""
    failed = [f"rank {rank}: {outcome.reason}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
    if failed:
        return "; ".join(failed)
    assert snapshot.metadata is not None
    try:
        snapshot.writer.finish(
            snapshot.metadata, [outcome.results for outcome in outcomes if isinstance(outcome, Written)]
        )
        save_config(CheckpointingConfig("torch_dist", 1), str(snapshot.directory))
    except OSError as error:
        return f"rank 0: {error}"
    return ""


def _checked(check: Callable[[Path], None], directory: Path, group: dist.ProcessGroup) -> str:
    try:
        check(directory)
        mine = ""
    except InputError as error:
        mine = str(error)
    verdicts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(verdicts, mine, group=group)
    return next(filter(None, verdicts), "")


def _named(run_dir: Path, step: int, partial: Path, outcomes: list[Written | Failed], needed_bytes: int) -> str:
    """Write the manifest and give the directory its name. On rank 0."""
    final = step_directory(run_dir, step)
    files = {
        name: record for outcome in outcomes if isinstance(outcome, Written) for name, record in outcome.files.items()
    }
    try:
        _sync(partial / "metadata.json")  # torch has done so for its own
        for name in DESCRIPTIONS:
            files[name] = FileRecord.of(partial / name)
        manifest = Manifest.of(partial)
        manifest.write_text(Manifest(step, files).to_json(), encoding="utf-8")
        _sync(manifest)
        sync_directory(partial)
        earlier = partial_of(final, f"removed-{uuid.uuid4().hex[:12]}")
        if final.exists():  # of the same step, from before a roll-back
            os.replace(final, earlier)
        os.replace(partial, final)
        # Syncs both names. If the power fails and only the second is kept, the checkpoint before is still there.
        point_to(final)
        shutil.rmtree(earlier, ignore_errors=True)  # what is left is removed when a run starts
    except OSError as error:
        return f"rank 0: {error}; {_room(partial, needed_bytes)}"
    return ""


def _room(directory: Path, needed_bytes: int) -> str:
    free_bytes = shutil.disk_usage(directory.parent).free
    return (
        f"the checkpoint takes about {needed_bytes / 1e9:.3f} GB, {free_bytes / 1e9:.3f} GB are free in "
        f"{directory.parent}"
    )


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
