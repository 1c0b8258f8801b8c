"""What tests of grading share: plug-ins that are installed for a test, and processes that are left."""

import sys
from pathlib import Path

import pytest


def install_plugin(directory: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Install the reward `planted`, the function `pay` of this source, for this test and the processes it starts."""
    (directory / "planted_reward.py").write_text(source, encoding="utf-8")
    metadata = directory / "planted-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        "[megatron_mm.rewards]\nplanted = planted_reward:pay\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "planted_reward", raising=False)


def keepers_of(parent: int) -> list[int]:
    """Processes that grade for `parent`, their forks included."""
    found = []
    for directory in Path("/proc").iterdir():
        try:
            command = (directory / "cmdline").read_bytes() if directory.name.isdigit() else b""
        except OSError:  # it has ended
            continue
        if b"megatron_mm.grading.keeper" in command and f'"parent": {parent}}}'.encode() in command:
            found.append(int(directory.name))
    return found
