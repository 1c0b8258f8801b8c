"""config.yaml of a run directory is that of the newest start; config.1.yaml, config.2.yaml ... are earlier ones."""

import itertools
import os
from pathlib import Path

CONFIG = "config.yaml"


def write_config(run_dir: Path, text: str) -> None:
    """Make `text` the config of the run; one that differs from it is kept under the next free number.

    Raises:
        OSError: the directory cannot be written.
    """
    newest = run_dir / CONFIG
    if newest.exists():
        before = newest.read_text(encoding="utf-8")
        if before == text:
            return
        numbered = (run_dir / f"config.{number}.yaml" for number in itertools.count(1))
        # The last one is the same where a start was killed between the two writes here.
        kept = list(itertools.takewhile(Path.exists, numbered))
        if not kept or kept[-1].read_text(encoding="utf-8") != before:
            _write_aside(run_dir / f"config.{len(kept) + 1}.yaml", before)
    _write_aside(newest, text)


def _write_aside(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
