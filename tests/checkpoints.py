"""Checkpoints of a few bytes, sound but for their content, and ways to damage any."""

from collections.abc import Callable
from pathlib import Path

from megatron_mm.checkpoint.manifest import FileRecord, Manifest
from megatron_mm.checkpoint.paths import point_to, step_directory


def make_checkpoint(run_dir: Path, step: int) -> Path:
    """A directory that has the files and the manifest of a checkpoint; `latest` names it."""
    checkpoint = step_directory(run_dir, step)
    checkpoint.mkdir(parents=True)
    for number, name in enumerate((".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "metadata.json")):
        (checkpoint / name).write_bytes(bytes([number, step % 256]) * 500)
    files = {file.name: FileRecord.of(file) for file in checkpoint.iterdir()}
    Manifest.of(checkpoint).write_text(Manifest(step, files).to_json(), encoding="utf-8")
    point_to(checkpoint)
    return checkpoint


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
