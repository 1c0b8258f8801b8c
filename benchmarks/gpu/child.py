"""One measurement in a process of its own, which says each figure as soon as it is known."""

import importlib
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.setting import Setting

# Keys of the first line, which names the device, and of the last.
DEVICE, DONE = "device", "done"


def run_measurement(target: str, setting: Setting, figures: Path, log: Path) -> None:
    """Run a measurement and write its figures, one JSON object a line, between the device's name and a last word.

    Args:
        target: "module:function"; the function takes a `Setting` and yields `Figure`s.
        figures: file that is written.
        log: takes all that the process prints, and its children.
    """
    from megatron_mm.parallel.platform import get_platform
    from megatron_mm.processes import end_with_parent

    # A group of its own, so that it can be ended together with what it has started.
    os.setsid()
    # The server that forked it, or the run itself: both end with the run.
    end_with_parent(os.getppid())
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    # Megatron-Core says in every process that Apex is missing.
    warnings.filterwarnings("ignore", category=UserWarning)
    module, function = target.split(":")
    measure = getattr(importlib.import_module(module), function)
    with figures.open("w", encoding="utf-8", buffering=1) as out:
        out.write(json.dumps({DEVICE: get_platform(setting.sizes.platform).describe()}) + "\n")
        for figure in measure(setting):
            out.write(json.dumps(asdict(figure)) + "\n")
        out.write(json.dumps({DONE: True}) + "\n")
