"""What is in a checkpoint, to the bit."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_mm.checkpoint import paths
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
    return run_on_ranks(_content, 1, run_dir)[0]


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
