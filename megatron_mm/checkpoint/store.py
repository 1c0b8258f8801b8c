"""Saving aside and moving into place; loading whole or weights only, on any layout."""

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_mm.checkpoint.paths import find, pointer, step_directory
from megatron_mm.config.errors import InputError
from megatron_mm.models.vlm import VisionLanguageModel

# Optimizer state in the shape of the parameters, so that any layout can read it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def save(run_dir: Path, step: int, model: VisionLanguageModel, optimizer: MegatronOptimizer) -> None:
    """Write a checkpoint after `step` steps; all ranks call it together."""
    final = step_directory(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Megatron-Core would start a manager process for this queue, which imports the whole program again: seconds a run.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Queue()  # pyright: ignore
    sharded = model.sharded_state_dict(metadata=_METADATA)
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=False, metadata=_METADATA)
    dist_checkpointing.save({"step": step, "model": sharded, "optimizer": optimizer_state}, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        new_pointer = pointer(run_dir).with_suffix(".partial")
        new_pointer.write_text(final.name, encoding="utf-8")
        os.replace(new_pointer, pointer(run_dir))
    dist.barrier()


def load_weights(path: Path, model: VisionLanguageModel) -> None:
    """Fill the model from a checkpoint that any layout has written.

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    loaded = _load({"model": model.sharded_state_dict(metadata=_METADATA)}, find(path))
    model.load_state_dict(loaded["model"])


def resume(path: Path, model: VisionLanguageModel, optimizer: MegatronOptimizer) -> int:
    """Fill model and optimizer from a checkpoint that any layout has written, and return the steps done.

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    sharded = model.sharded_state_dict(metadata=_METADATA)
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_METADATA)
    loaded = _load({"model": sharded, "optimizer": optimizer_state}, find(path))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["step"]


@torch.no_grad()
def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        loaded, missing, unexpected = dist_checkpointing.load(state, str(checkpoint), strict=StrictHandling.RETURN_ALL)
    except (CheckpointingException, KeyError, ValueError, OSError) as error:
        raise InputError(f"checkpoint {checkpoint} does not fit this model or is damaged: {error}") from error
    assert isinstance(loaded, dict)
    left_over = [key for key in missing if "optimizer" in state or not key.startswith("optimizer.")]
    if left_over or unexpected:
        raise InputError(
            f"checkpoint {checkpoint} is of another model: it lacks {sorted(unexpected) or 'nothing'}, "
            f"and holds {sorted(left_over) or 'nothing'} besides"
        )
    return loaded
