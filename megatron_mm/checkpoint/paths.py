"""Where a run's checkpoints lie. Without Megatron-Core, so that a launcher can look before it starts ranks.

RUN/checkpoints/step_00000500/    Megatron-Core's torch_dist files; complete as soon as it has this name
RUN/checkpoints/latest            name of the newest complete one, written last
"""

from pathlib import Path

from megatron_mm.config.errors import InputError

# Megatron-Core writes this file into every distributed checkpoint.
_MARK = "metadata.json"


def step_directory(run_dir: Path, step: int) -> Path:
    """The checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def pointer(run_dir: Path) -> Path:
    """The file that names the newest complete checkpoint."""
    return run_dir / "checkpoints" / "latest"


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    file = pointer(run_dir)
    return file.with_name(file.read_text(encoding="utf-8").strip()) if file.is_file() else None


def find(path: Path) -> Path:
    """The checkpoint that a user means by `path`: a run directory, or one checkpoint in it.

    Raises:
        InputError: neither.
    """
    found = newest(path) or path
    if not (found / _MARK).is_file():
        raise InputError(f"no checkpoint in {path}; give a run directory that has finished a save, or a checkpoint")
    return found


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was saved after; the inverse of `step_directory`."""
    return int(checkpoint.name.removeprefix("step_"))
