"""Where a run's checkpoints lie. Without Megatron-Core, so that a launcher can look before it starts ranks.

RUN/checkpoints/step_00000500/              a checkpoint; complete as soon as it has this name
RUN/checkpoints/latest                      name of the newest complete one, written last
RUN/checkpoints/step_00000500.partial-...   being written or removed; what is left of it is removed when a run starts
RUN/checkpoints/step_00000500.damaged       was found damaged when a run wanted to resume from it
"""

import os
import re
from pathlib import Path

from megatron_mm.checkpoint.manifest import Manifest, size_faults
from megatron_mm.config.errors import InputError

_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"


def step_directory(run_dir: Path, step: int) -> Path:
    """The checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The steps after which a checkpoint was written, by its name; None where it is not a complete one's."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def pointer(run_dir: Path) -> Path:
    """The file that names the newest complete checkpoint."""
    return run_dir / "checkpoints" / "latest"


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    file = pointer(run_dir)
    return file.with_name(file.read_text(encoding="utf-8").strip()) if file.is_file() else None


def up_to_latest(run_dir: Path) -> list[Path]:
    """A run's checkpoints, newest first, without those newer than `latest` names."""
    latest = newest(run_dir)
    if latest is None:
        return []
    steps = {path: step for path in latest.parent.iterdir() if (step := step_of(path)) is not None}
    last = step_of(latest)
    # Without a readable name in `latest` all of them count.
    kept = [path for path, step in steps.items() if last is None or step <= last]
    return sorted(kept, key=steps.__getitem__, reverse=True)


def partial_of(checkpoint: Path, attempt: str) -> Path:
    """Where a checkpoint lies that is not complete, or not any more.

    Args:
        attempt: differs between attempts, so that none meets what is left of another.
    """
    return checkpoint.with_name(f"{checkpoint.name}{_PARTIAL}-{attempt}")


def partials(run_dir: Path) -> list[Path]:
    """What saves and removals that were cut off have left."""
    directory = pointer(run_dir).parent
    return [path for path in directory.iterdir() if _PARTIAL in path.name] if directory.is_dir() else []


def point_to(checkpoint: Path) -> None:
    """Make `latest` name a checkpoint, at once and durably."""
    file = checkpoint.with_name("latest")
    aside = file.with_name(file.name + _PARTIAL)
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(checkpoint.name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: that of a file is not so by the file's own fsync."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(path: Path) -> Path:
    """The checkpoint that a user means by `path`: a run directory, or one checkpoint in it.

    Its manifest and the sizes of its files are looked at, not their content.

    Raises:
        InputError: neither, or the checkpoint is damaged.
    """
    found = newest(path) or path
    if not Manifest.of(found).is_file():
        raise InputError(f"no checkpoint in {path}; give a run directory that has finished a save, or a checkpoint")
    try:
        faults = size_faults(found, Manifest.read(found).files)
    except InputError as error:
        faults = [str(error)]
    refuse_damaged(found, faults)
    return found


def refuse_damaged(checkpoint: Path, faults: list[str]) -> None:
    """Raise `InputError` where there are faults."""
    if faults:
        raise InputError(
            "\n".join([f"checkpoint {checkpoint} is damaged; copy it again, or give another one:", *faults])
        )
