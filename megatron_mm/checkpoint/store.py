"""Saving aside and moving into place; loading whole or weights only, on any layout."""

import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mm.checkpoint.paths import find, pointer, step_directory
from megatron_mm.config.errors import InputError
from megatron_mm.models.vision import POSITIONS, fitted_positions
from megatron_mm.models.vlm import VisionLanguageModel


def save(run_dir: Path, step: int, chunks: Sequence[VisionLanguageModel], optimizer: MegatronOptimizer) -> None:
    """Write a checkpoint after `step` steps; all ranks call it together."""
    sharded = model_state(chunks)
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=False, metadata=_metadata())
    content = {"step": step, "optimizer_kind": _kind(optimizer), "model": sharded, "optimizer": optimizer_state}
    write(run_dir, step, content)


def write(run_dir: Path, step: int, content: dict[str, Any], check: Callable[[Path], None] | None = None) -> None:
    """Write a sharded state aside and move it into place; all ranks call it together.

    Args:
        check: looks at what was written before it is moved, on every rank, and raises where it is not right.
    """
    final = step_directory(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Megatron-Core would start a manager process for this queue, which imports the whole program again: seconds a run.
    # A save that is waited for puts and takes in this process; a queue between processes could still be empty then.
    filesystem_async._results_queue = queue.SimpleQueue()  # pyright: ignore
    dist_checkpointing.save(content, str(partial))
    dist.barrier()
    if check is not None:
        check(partial)
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        new_pointer = pointer(run_dir).with_suffix(".partial")
        new_pointer.write_text(final.name, encoding="utf-8")
        os.replace(new_pointer, pointer(run_dir))
    dist.barrier()


def load_weights(path: Path, chunks: Sequence[VisionLanguageModel]) -> None:
    """Fill the model from a checkpoint that any layout has written.

    A position table of another tile size is interpolated to the model's, and a warning says so.

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    checkpoint = find(path)
    state = model_state(chunks)
    _expect_stored_positions(state, checkpoint)
    loaded = _load({"model": state}, checkpoint)["model"]
    for number, chunk in enumerate(chunks):
        if chunk.vision is not None:
            of_chunk = loaded[str(number)]
            num_patches = len(chunk.vision.position_embedding.weight)
            of_chunk[POSITIONS] = fitted_positions(of_chunk[POSITIONS], num_patches, str(checkpoint))
    _fill(chunks, loaded)


def resume(path: Path, chunks: Sequence[VisionLanguageModel], optimizer: MegatronOptimizer) -> int:
    """Fill model and optimizer from a checkpoint that any layout has written, and return the steps done.

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    checkpoint = find(path)
    _check_kind(optimizer, checkpoint)
    sharded = model_state(chunks)
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_metadata())
    loaded = _load({"model": sharded, "optimizer": optimizer_state}, checkpoint)
    _fill(chunks, loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["step"]


def _kind(optimizer: MegatronOptimizer) -> str:
    """Whose state it is: the two kinds cannot read each other's."""
    (kind,) = {
        "distributed" if isinstance(part, DistributedOptimizer) else "plain"
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
    }
    return kind


def _check_kind(optimizer: MegatronOptimizer, checkpoint: Path) -> None:
    stored: Any = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("optimizer_kind", "distributed")
    if stored != _kind(optimizer):
        raise InputError(
            f"checkpoint {checkpoint} holds the state of a {stored} optimizer; resume with optim.distributed="
            f"{str(stored == 'distributed').lower()}, or start a new run with init_from={checkpoint}"
        )


def model_state(chunks: Sequence[VisionLanguageModel]) -> dict[str, Any]:
    """The sharded state of each chunk; the tensors' names in it are those of the whole model."""
    return {str(number): chunk.sharded_state_dict(metadata=_metadata()) for number, chunk in enumerate(chunks)}


def _expect_stored_positions(state: dict[str, Any], checkpoint: Path) -> None:
    """Make room for the position table as the checkpoint has it."""
    stored: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint)).get(POSITIONS)
    for of_chunk in state.values():
        mine = of_chunk.get(POSITIONS)
        if mine is not None and stored is not None and stored.global_shape != mine.global_shape:
            room = torch.empty(stored.global_shape, dtype=mine.dtype)
            of_chunk[POSITIONS] = ShardedTensor.from_rank_offsets(POSITIONS, room, replica_id=mine.replica_id)


def _fill(chunks: Sequence[VisionLanguageModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)])


def _metadata() -> dict[str, Any]:
    """How states are cut up: the optimizer's in the shape of the parameters, so that any layout can read it.

    A new one each time: Megatron-Core puts the process groups of the present layout into it.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


@torch.no_grad()
def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    check_fit(state["model"], checkpoint)
    try:
        loaded = dist_checkpointing.load(state, str(checkpoint))
    except (CheckpointingException, KeyError, ValueError, OSError) as error:
        raise InputError(f"checkpoint {checkpoint} is damaged: {error}") from error
    assert isinstance(loaded, dict)
    return loaded


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    """Every sharded tensor of a state, those that a factory would make included (the gated MLP's)."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            made: Any = value.build()
            yield from _sharded_tensors(made)


def check_fit(state: ShardedStateDict, checkpoint: Path) -> None:
    """Compare names and shapes before loading, so that every rank refuses a checkpoint, and none waits for another."""
    stored = {
        name: tuple(tensor.global_shape)
        for name, tensor in dist_checkpointing.load_tensors_metadata(str(checkpoint)).items()
        if isinstance(tensor, ShardedTensor) and not name.startswith("optimizer.")
    }
    mine = {tensor.key: tuple(tensor.global_shape) for tensor in _sharded_tensors(state)}
    of_ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    wanted = {name: shape for of_rank in of_ranks for name, shape in of_rank.items()}
    faults = [f"it lacks {name}" for name in sorted(wanted.keys() - stored.keys())]
    faults += [f"the model has no {name}" for name in sorted(stored.keys() - wanted.keys())]
    faults += [
        f"{name} is {list(stored[name])} in it and {list(wanted[name])} in the model"
        for name in sorted(stored.keys() & wanted.keys())
        if stored[name] != wanted[name]
    ]
    if faults:
        raise InputError("\n".join([f"checkpoint {checkpoint} is of another model:", *faults]))
