"""The distributed optimizer's state for a checkpoint, each rank its own part, whatever the layout that loads it.

A data-parallel rank holds a stretch of the flattened elements of a parameter. Megatron-Core's format that every layout
can load ("fully_reshardable") gathers the whole state on every rank before it is written: seconds of waiting, twelve
bytes of memory a parameter, and one rank that writes it all. A stretch of an array in row order is a few boxes, and
a stored tensor may be cut into any boxes, so each rank can give its stretches as they are. What is stored, names and
shapes of global tensors, is the same; Megatron-Core loads it as its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# The formats whose global tensors are those of the parameters.
SHARDING = "fully_reshardable"


def optimizer_state(optimizer: ChainedOptimizer, model: ShardedStateDict, metadata: dict[str, Any]) -> ShardedStateDict:
    """The sharded state to save, of the structure that Megatron-Core's `ChainedOptimizer` loads.

    Args:
        model: sharded state of the model that it trains.
        metadata: as Megatron-Core's own `sharded_state_dict` takes it.
    """
    parts = optimizer.chained_optimizers
    if len(parts) == 1:
        return _state_of(parts[0], model, metadata)
    optimizer._synchronize_steps()  # as its own method does
    states: dict[Any, Any] = {number: _state_of(part, model, metadata) for number, part in enumerate(parts)}
    return states


def _state_of(part: MegatronOptimizer, model: ShardedStateDict, metadata: dict[str, Any]) -> ShardedStateDict:
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(model, is_loading=False, metadata=metadata)
    return {**part.state_dict(), "param_state": _shards(part, model), "param_state_sharding_type": SHARDING}


def _shards(part: DistributedOptimizer, model: ShardedStateDict) -> dict[str, list[ShardedTensor]]:
    """What this rank holds of each tensor of the optimizer's state, by the tensor's name."""
    entries = {
        entry.data: entry for entry in nested_values(model) if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    shards: dict[str, list[ShardedTensor]] = {}
    for of_buffer in part.gbuf_ranges:
        for of_buckets in of_buffer.values():
            for bucket in of_buckets:
                for parameter, ranges in bucket["param_map"].items():
                    entry = entries[parameter]
                    stretch = ranges["param"]
                    # Each data-parallel rank holds something else, so this part of the number is nobody's copy.
                    replica: Any = entry.replica_id  # of pipeline, tensor and data parallelism
                    copy = (*replica[:2], part.distributed_optimizer_instance_id)
                    pieces = _pieces(entry, tuple(parameter.shape))
                    for name, values in part._get_main_param_and_optimizer_states(parameter).items():
                        if name == "step":  # of torch's Adam, which keeps it in the groups as well
                            continue
                        shards.setdefault(f"{name}.{entry.key}", []).extend(
                            replace(shard, key=f"optimizer.state.{name}.{shard.key}", replica_id=copy)
                            for start, piece in pieces
                            for shard in _cut(piece, start, values, stretch.start, stretch.end)
                        )
    return shards


def _pieces(entry: ShardedTensor | ShardedTensorFactory, shape: tuple[int, ...]) -> list[tuple[int, ShardedTensor]]:
    """What a parameter is stored as: one tensor, or gate and up of a gated MLP; with its first element's place."""
    whole = torch.empty(shape, device="meta")
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    made: Any = entry.build_fn(entry.key, whole, entry.replica_id, None)
    for piece in made:
        assert piece.data.is_contiguous(), f"{piece.key} is not a stretch of its parameter"
    return [(piece.data.storage_offset(), piece) for piece in made]


def _cut(piece: ShardedTensor, first: int, values: Tensor, start: int, end: int) -> Iterator[ShardedTensor]:
    """The boxes of a piece that a stretch of its parameter fills.

    Args:
        piece: of the parameter.
        first: place of its first element in the flattened parameter.
        values: [end - start] elements, of the parameter from `start` on.
    """
    numel = math.prod(piece.local_shape)
    begin, stop = max(start, first), min(end, first + numel)
    flat = values.detach().view(-1)
    done = begin - start
    for offsets, lengths in boxes(piece.local_shape, begin - first, stop - first):
        num_elements = math.prod(lengths)
        prepended = piece.prepend_axis_num
        shape = (*(1,) * prepended, *lengths)
        inner = (offset + more for offset, more in zip(piece.global_offset[prepended:], offsets, strict=True))
        yield ShardedTensor(
            piece.key,
            flat[done : done + num_elements].view(shape),
            values.dtype,
            shape,
            piece.global_shape,
            (*piece.global_offset[:prepended], *inner),
            # No grid: boxes differ in size.
            axis_fragmentations=None,
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )
        done += num_elements


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements [start, end) of an array, counted in row order, into boxes; also in that order.

    Yields:
        Offsets and lengths of a box, which has at least one element.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    whole_from, whole_to = -(-start // row), end // row
    if whole_from > whole_to:  # inside one row
        for offsets, lengths in boxes(shape[1:], start - whole_to * row, end - whole_to * row):
            yield (whole_to, *offsets), (1, *lengths)
        return
    for offsets, lengths in boxes(shape[1:], start - (whole_from - 1) * row, row if start < whole_from * row else 0):
        yield (whole_from - 1, *offsets), (1, *lengths)
    if whole_from < whole_to:
        yield (whole_from, *(0,) * (len(shape) - 1)), (whole_to - whole_from, *shape[1:])
    for offsets, lengths in boxes(shape[1:], 0, end - whole_to * row):
        yield (whole_to, *offsets), (1, *lengths)
