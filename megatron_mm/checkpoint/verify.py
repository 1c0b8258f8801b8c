"""Is a checkpoint what was written? All ranks look together, each at its share of the files."""

import logging
import os
from pathlib import Path

import torch.distributed as dist

from megatron_mm.checkpoint.agreement import from_first
from megatron_mm.checkpoint.manifest import FileRecord, Manifest, content_faults, size_faults
from megatron_mm.checkpoint.paths import find, newest, point_to, pointer, refuse_damaged, up_to_latest
from megatron_mm.config.errors import InputError

logger = logging.getLogger(__name__)


def newest_sound(run_dir: Path, *, verify: bool) -> Path | None:
    """The newest checkpoint of a run that is not damaged; all ranks call it together.

    A damaged one is told with the files that are wrong, and renamed to step_X.damaged; then the one before is taken,
    and `latest` names it.

    Args:
        verify: compare contents with their checksums, not only the sizes.

    Returns:
        None if the run has never finished a save.

    Raises:
        InputError: it has, but nothing sound is left.
    """
    latest, candidates = from_first(lambda: (newest(run_dir), up_to_latest(run_dir)))
    if latest is None:
        return None
    if latest not in candidates:
        _warn("%s names %s, which is not there", pointer(run_dir), latest.name)
    for checkpoint in candidates:
        faults = faults_of(checkpoint, content=verify)
        if not faults:
            if checkpoint != latest and dist.get_rank() == 0:
                point_to(checkpoint)
            dist.barrier()
            return checkpoint
        away = from_first(lambda checkpoint=checkpoint: _put_away(checkpoint))
        _warn("checkpoint %s is damaged: %s; it is %s now", checkpoint, "; ".join(faults), away.name)
    raise InputError(
        f"no checkpoint of {run_dir} is sound any more; copy one back under its name, or begin another run directory"
    )


def find_sound(path: Path) -> Path:
    """As `paths.find`, and the contents are compared with their checksums; all ranks call it together.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
    """
    checkpoint = find(path)
    refuse_damaged(checkpoint, faults_of(checkpoint, content=True))
    return checkpoint


def faults_of(checkpoint: Path, *, content: bool) -> list[str]:
    """What is wrong with a checkpoint, a line a file, the same on all ranks; all ranks call it together."""
    files, fault = from_first(lambda: _manifest_of(checkpoint))
    if fault:
        return [fault]
    look = content_faults if content else size_faults
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, look(checkpoint, _share(files)))
    return [line for of_rank in of_ranks for line in of_rank]


def _manifest_of(checkpoint: Path) -> tuple[dict[str, FileRecord], str]:
    try:
        return dict(Manifest.read(checkpoint).files), ""
    except InputError as error:
        return {}, str(error)


def _share(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """This rank's files: the largest first, each to the rank that has the fewest bytes yet."""
    taken = [0] * dist.get_world_size()
    mine = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        rank = taken.index(min(taken))
        taken[rank] += record.size_bytes
        if rank == dist.get_rank():
            mine[name] = record
    return mine


def _put_away(checkpoint: Path) -> Path:
    away = checkpoint.with_name(checkpoint.name + ".damaged")
    number = 1
    while away.exists():
        number += 1
        away = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    os.replace(checkpoint, away)
    return away


def _warn(message: str, *arguments: object) -> None:
    if dist.get_rank() == 0:
        logger.warning(message, *arguments)
