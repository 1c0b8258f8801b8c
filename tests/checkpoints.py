"""What is in a checkpoint, to the bit; tiny checkpoints, sound but for their content; ways to damage any."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_mm.checkpoint import paths
from megatron_mm.checkpoint.manifest import FileRecord, Manifest
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.ranks import run_on_ranks


def _content(run_dir: Path) -> dict[str, Any]:
    checkpoint = paths.newest(run_dir)
    assert checkpoint is not None
    with state.process_group(get_platform("cpu")):
        return dist_checkpointing.load_plain_tensors(str(checkpoint))


def content(run_dir: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint of a run, the optimizer's counters too."""
    return run_on_ranks(_content, 1, run_dir, hides_gpus=True)[0]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two contents are equal to the bit."""
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer.") for name in one)
    different = [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]
    assert not different


def make_checkpoint(run_dir: Path, step: int) -> Path:
    """A directory that has the files and the manifest of a checkpoint; `latest` names it."""
    checkpoint = paths.step_directory(run_dir, step)
    checkpoint.mkdir(parents=True)
    for number, name in enumerate((".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json")):
        (checkpoint / name).write_bytes(bytes([number, step % 256]) * 500)
    seal(checkpoint, step)
    paths.point_to(checkpoint)
    return checkpoint


def seal(checkpoint: Path, step: int) -> None:
    """Write the manifest of what is there."""
    manifest = Manifest.of(checkpoint)
    manifest.unlink(missing_ok=True)
    files = {file.name: FileRecord.of(file) for file in checkpoint.iterdir()}
    manifest.write_text(Manifest(step, files).to_json(), encoding="utf-8")


def flip_bit(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Kind of damage -> what does it, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (
        lambda checkpoint: flip_bit(checkpoint / "__0_0.distcp"),
        "__0_0.distcp has other content than was written (sha256 ",
    ),
    "missing file": (lambda checkpoint: (checkpoint / "common.pt").unlink(), "common.pt is missing"),
    "cut file": (
        lambda checkpoint: (checkpoint / ".metadata").write_bytes(b"abc"),
        ".metadata has 3 bytes, ",
    ),
    "cut manifest": (
        lambda checkpoint: (checkpoint / "manifest.json").write_text("{"),
        "manifest.json cannot be read: ",
    ),
    "no manifest": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "manifest.json is missing"),
}
