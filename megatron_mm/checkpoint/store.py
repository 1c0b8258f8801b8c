"""What a checkpoint holds; loading it whole or weights only, on any layout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoint.commit import begin, commit
from megatron_mm.checkpoint.optimizer_shards import SHARDING, optimizer_state
from megatron_mm.checkpoint.paths import find, step_directory
from megatron_mm.checkpoint.snapshot import Planner
from megatron_mm.checkpoint.verify import find_sound
from megatron_mm.config.errors import InputError
from megatron_mm.models.vision import POSITIONS, fitted_positions
from megatron_mm.models.vlm import VisionLanguageModel

#: Counted up where a run cannot go on from what checkpoints held before. Weights load from every one.
FORMAT = 2
# What torch calls a module's entry in a state dict that is no tensor of the model.
_EXTRA_STATE = "_extra_state"


def content_of(
    step: int, chunks: Sequence[VisionLanguageModel], optimizer: ChainedOptimizer, progress: dict[str, Any]
) -> ShardedStateDict:
    """What a checkpoint holds.

    Args:
        step: number of steps done.
        progress: plain values that `resume` returns.
    """
    states = _sharded_states(chunks)
    model, history = _tensors(states), _fp8_history(chunks, states)
    return {
        "progress": {**progress, "step": step},
        "format": FORMAT,
        "optimizer_kind": _kind(optimizer),
        "model": model,
        "fp8_history": {number: _not_empty(of_chunk) for number, of_chunk in history.items()},
        "optimizer": optimizer_state(optimizer, model, _metadata()),
    }


def write(run_dir: Path, step: int, content: ShardedStateDict, check: Callable[[Path], None] | None = None) -> None:
    """Write a sharded state as a checkpoint, and wait for it; all ranks call it together.

    Args:
        check: looks at what was written before it takes its name, on every rank; raises `InputError` where it is wrong.

    Raises:
        InputError: it could not be written, or the check raised it.
    """
    group: Any = dist.new_group(backend="gloo")
    partial, fault = begin(run_dir, step, group)
    if not fault:
        snapshot = Planner(group).take(content, partial)
        fault = commit(run_dir, step, snapshot, snapshot.write(), group, check)
    dist.destroy_process_group(group)
    if fault:
        raise InputError(f"checkpoint {step_directory(run_dir, step)} could not be written: {fault}")


def load_weights(path: Path, chunks: Sequence[VisionLanguageModel]) -> None:
    """Fill the model from a checkpoint that any layout has written.

    A position table of another tile size is interpolated to the model's, and a warning says so.

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    checkpoint = find_sound(path)
    state = model_state(chunks)
    _expect_stored_positions(state, checkpoint)
    loaded = _load({"model": state}, checkpoint)["model"]
    for number, chunk in enumerate(chunks):
        if chunk.vision is not None:
            of_chunk = loaded[str(number)]
            num_patches = len(chunk.vision.position_embedding.weight)
            of_chunk[POSITIONS] = fitted_positions(of_chunk[POSITIONS], num_patches, str(checkpoint))
    _fill(chunks, loaded)


def resume(checkpoint: Path, chunks: Sequence[VisionLanguageModel], optimizer: ChainedOptimizer) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint that any layout has written.

    Args:
        checkpoint: as `verify.newest_sound` gives it: contents are not compared with their checksums again.

    Returns:
        The progress that was saved with it; "step" is the number of steps done.

    Raises:
        InputError: the checkpoint is of another model, optimizer or format, or damaged.
    """
    checkpoint = find(checkpoint)
    _check_resumable(optimizer, checkpoint)
    states = _sharded_states(chunks)
    sharded = _tensors(states)
    optimizer_state = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_metadata())
    history = _stored_part(_fp8_history(chunks, states), checkpoint)
    loaded = _load({"model": sharded, "fp8_history": history, "optimizer": optimizer_state}, checkpoint)
    # Megatron-Core leaves out what is empty.
    _fill(chunks, loaded["model"], loaded.get("fp8_history", {}))
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["progress"]


def _kind(optimizer: ChainedOptimizer) -> str:
    """Whose state it is: the two kinds cannot read each other's."""
    (kind,) = {
        "distributed" if isinstance(part, DistributedOptimizer) else "plain" for part in optimizer.chained_optimizers
    }
    return kind


def _check_resumable(optimizer: ChainedOptimizer, checkpoint: Path) -> None:
    common: Any = dist_checkpointing.load_common_state_dict(str(checkpoint))
    stored, kind = common.get("format"), common.get("optimizer_kind")
    if stored != FORMAT:
        raise InputError(
            f"checkpoint {checkpoint} cannot be resumed: its format is {stored or 'none (imported, or older)'}, not "
            f"{FORMAT}; start a new run with init_from={checkpoint}"
        )
    if kind != _kind(optimizer):
        raise InputError(
            f"checkpoint {checkpoint} holds the state of a {kind} optimizer; resume with optim.distributed="
            f"{str(kind == 'distributed').lower()}, or start a new run with init_from={checkpoint}"
        )


def model_state(chunks: Sequence[VisionLanguageModel]) -> dict[str, Any]:
    """Return the sharded tensors of each chunk; their names are those of the whole model.

    Layers of Transformer Engine and of Megatron-Core have further entries that the other kind's have not, so a
    checkpoint that held them could only be loaded into the layers that wrote it. See `_fp8_history` for the ones that
    matter.
    """
    return _tensors(_sharded_states(chunks))


def _sharded_states(chunks: Sequence[VisionLanguageModel]) -> dict[str, dict[str, Any]]:
    """Return all that Megatron-Core would write of each chunk; FP8 layers wait for the GPU to serialize theirs."""
    return {str(number): chunk.sharded_state_dict(metadata=_metadata()) for number, chunk in enumerate(chunks)}


def _tensors(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        number: {name: entry for name, entry in of_chunk.items() if not isinstance(entry, ShardedObject)}
        for number, of_chunk in states.items()
    }


def _fp8_history(
    chunks: Sequence[VisionLanguageModel], states: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, ShardedObject]]:
    """Return what delayed scaling remembers of past steps, chunk by chunk: the largest values, and the scales.

    Transformer Engine serializes them into one byte tensor a module, empty before a module's first step. The other FP8
    recipes take each scale from the tensor at hand and remember nothing.

    Args:
        chunks: the model.
        states: see `_sharded_states`.
    """
    return {
        number: {
            name: entry
            for name, entry in states[number].items()
            if isinstance(entry, ShardedObject) and _is_delayed(chunk, name)
        }
        for number, chunk in zip(states, chunks, strict=True)
    }


def _is_delayed(chunk: VisionLanguageModel, name: str) -> bool:
    """Return whether the ViT, projector or language model that `name` belongs to has FP8 with delayed scaling."""
    config: Any = getattr(chunk, name.partition(".")[0]).config
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _not_empty(history: Mapping[str, ShardedObject]) -> dict[str, ShardedObject]:
    return {
        name: entry
        for name, entry in history.items()
        if isinstance(entry.data, torch.Tensor) and entry.data.numel() > 0
    }


def _stored_part(history: dict[str, dict[str, ShardedObject]], checkpoint: Path) -> dict[str, dict[str, ShardedObject]]:
    """Return the entries of `history` that a checkpoint has; one of another FP8 recipe has none."""
    if not any(history.values()):
        return history
    stored = {entry.key for entry in load_sharded_metadata(str(checkpoint)).values()}
    return {
        number: {name: entry for name, entry in of_chunk.items() if entry.key in stored}
        for number, of_chunk in history.items()
    }


def _expect_stored_positions(state: dict[str, Any], checkpoint: Path) -> None:
    """Make room for the position table as the checkpoint has it."""
    stored: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint)).get(POSITIONS)
    for of_chunk in state.values():
        mine = of_chunk.get(POSITIONS)
        if mine is not None and stored is not None and stored.global_shape != mine.global_shape:
            room = torch.empty(stored.global_shape, dtype=mine.dtype)
            of_chunk[POSITIONS] = ShardedTensor.from_rank_offsets(POSITIONS, room, replica_id=mine.replica_id)


def _fill(
    chunks: Sequence[VisionLanguageModel], loaded: dict[str, Any], history: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Put loaded tensors into the model. Modules without an entry in `history` keep what they remember."""
    for number, chunk in enumerate(chunks):
        values = {**loaded[str(number)], **(history or {}).get(str(number), {})}
        missing, unexpected = chunk.load_state_dict(values, strict=False)
        assert not unexpected, unexpected
        assert all(name.endswith(_EXTRA_STATE) for name in missing), missing


def _metadata() -> dict[str, Any]:
    """How states are cut up: the optimizer's in the shape of the parameters, so that any layout can read it.

    A new one each time: Megatron-Core puts the process groups of the present layout into it.
    """
    return {
        "distrib_optim_sharding_type": SHARDING,
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
    except CheckpointException as error:  # torch's, for what happened on any rank; it is no Exception
        rank, (reason, _) = next(iter(error.failures.items()))
        raise InputError(f"checkpoint {checkpoint} cannot be loaded: rank {rank}: {reason}") from error
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
