"""Whole parameters in and out of a checkpoint's files, one at a time, without a live model.

A checkpoint holds every parameter as one global tensor (those of a stack's layers joined), cut into pieces by the
layout that wrote it. A skeleton, the model in one piece on torch's meta device, says where each parameter lies.
"""

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mm.checkpoint.store import check_fit, model_state, write
from megatron_mm.config.errors import InputError
from megatron_mm.models.vlm import VisionLanguageModel

# The pieces that a parameter is stored as: one, or gate and up of a gated MLP.
Places = Mapping[str, Sequence[ShardedTensor]]


def _places(state: Mapping[str, Any]) -> Places:
    """Where each parameter of a skeleton, whose state this is, lies in a checkpoint."""
    found: dict[str, list[ShardedTensor]] = {}
    for name, entry in state["0"].items():
        if isinstance(entry, ShardedTensor):
            found[name] = [entry]
        elif isinstance(entry, ShardedTensorFactory):
            made: Any = entry.build()
            found[name] = list(made)
    return found


class WholeParameters:
    """The parameters of a checkpoint.

    Args:
        checkpoint: its directory, looked through already.
        skeleton: of the checkpoint's model.

    Raises:
        InputError: it is of another model.
    """

    def __init__(self, checkpoint: Path, skeleton: Sequence[VisionLanguageModel]):
        self.checkpoint = checkpoint
        state = model_state(skeleton)
        check_fit(state, self.checkpoint)
        self._places = _places(state)
        try:
            self._reader = FileSystemReader(self.checkpoint)
            self._metadata: Any = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"checkpoint {self.checkpoint} is damaged: {error}") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def dtype(self) -> torch.dtype:
        """Of the parameters, which have one.

        Raises:
            InputError: they have several.
        """
        names = {piece.key for pieces in self._places.values() for piece in pieces}
        found = {self._metadata.state_dict_metadata[name].properties.dtype for name in names}
        if len(found) > 1:
            raise InputError(f"checkpoint {self.checkpoint} holds parameters of several types: {found}")
        return found.pop()

    def __getitem__(self, name: str) -> Tensor:
        """The whole parameter.

        Raises:
            InputError: the file that holds it is damaged.
        """
        pieces = [self.piece(piece) for piece in self._places[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def piece(self, piece: ShardedTensor) -> Tensor:
        """One part of a global tensor, whatever parts it was written in."""
        stored = self._metadata.state_dict_metadata[piece.key]
        sizes = torch.Size((*(1,) * piece.prepend_axis_num, *piece.local_shape))
        chunk = ChunkStorageMetadata(torch.Size(piece.global_offset), sizes)
        planner = _IntoTensor(torch.empty(sizes, dtype=stored.properties.dtype))
        plan = LoadPlan(create_read_items_for_chunk_list(piece.key, stored, [chunk]))
        try:
            self._reader.read_data(plan, planner).wait()
        except (OSError, EOFError, RuntimeError, AssertionError, pickle.UnpicklingError) as error:
            raise InputError(f"checkpoint {self.checkpoint} is damaged at {piece.key}: {error}") from None
        assert planner.num_read == sizes.numel(), f"{piece.key} is stored in part only"
        return planner.tensor.view(piece.local_shape)


class _IntoTensor(DefaultLoadPlanner):
    """Takes what is read into one tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor, self.num_read = tensor, 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        del read_item
        self.num_read += tensor.numel()


def write_whole(
    run_dir: Path,
    skeleton: Sequence[VisionLanguageModel],
    parameters: Iterable[tuple[str, Tensor, int | None]],
    tensor_ranks: int,
    same: Callable[[Tensor, Tensor], bool],
) -> None:
    """Write a checkpoint of whole parameters; each rank gives its share, all call it together.

    What each rank wrote is read back and compared before the checkpoint takes its name.

    Args:
        run_dir: directory that gets `checkpoints/`.
        parameters: (name, parameter, dimension that tensor parallelism cuts or None); each parameter of the skeleton
            on one rank.
        tensor_ranks: parts to store a parameter in, so that each rank of the layout to come reads its own only.
        same: whether what was read back is what was written.

    Raises:
        InputError: it is not.
    """
    state = model_state(skeleton)
    where = _places(state)
    mine: dict[str, Any] = {}
    for name, parameter, axis in parameters:
        pieces = where[name]
        mine[name] = [
            part
            for piece, values in zip(pieces, parameter.chunk(len(pieces)), strict=True)
            for part in _cut(piece, values, axis, tensor_ranks)
        ]

    def check(checkpoint: Path) -> None:
        stored = WholeParameters(checkpoint, skeleton)
        for entry in nested_values(mine):
            if not isinstance(entry, ShardedTensor):
                continue
            assert entry.data is not None
            # The writer has put the prepended axes into the shape.
            if not same(stored.piece(entry), entry.data.view(entry.local_shape)):
                raise InputError(f"{checkpoint} holds other values than were written for {entry.key}; check the disk")

    write(run_dir, 0, {"progress": {"step": 0}, "model": {"0": mine}}, check)


def _cut(piece: ShardedTensor, values: Tensor, axis: int | None, parts: int) -> Iterator[ShardedTensor]:
    """A piece with its values, in parts. Each part is copied: the writer would copy views, all at the same time."""
    # The one copy that is written, whatever replica this rank would have been of a whole model's.
    piece = dataclasses.replace(piece, replica_id=0)
    if axis is None:
        yield dataclasses.replace(piece, data=values.clone())
        return
    stored_axis = piece.prepend_axis_num + axis
    start = 0
    for data in values.chunk(parts, axis):
        offset, fragments = list(piece.global_offset), list(piece.axis_fragmentations or ())
        offset[stored_axis] += start
        fragments[stored_axis] *= parts
        start += data.shape[axis]
        yield dataclasses.replace(
            piece,
            data=data.clone(memory_format=torch.contiguous_format),
            local_shape=tuple(data.shape),
            global_offset=tuple(offset),
            axis_fragmentations=tuple(fragments),
        )
