"""Batches from one process to another as one block of shared memory.

torch hands over each tensor by a connection of its own between the two processes, which costs about a millisecond; a
batch has half a dozen.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where each tensor begins in the block; no type has larger items.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Packed:
    """Something with tensors in it, which are all in one block.

    Attributes:
        description: all but the content of the tensors.
        block: uint8 [bytes], the content.
        places: of each tensor, the first byte and the number of bytes.
    """

    description: bytes
    block: Tensor
    places: tuple[tuple[int, int], ...]


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # Arrays can be pickled without their content, tensors cannot.
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, Tensor) else NotImplemented


def pack(content: Any) -> Packed:
    """Bring the tensors of anything that can be pickled into one block; they lie in this process's memory."""
    stream, buffers = io.BytesIO(), []
    _Pickler(stream, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw())).dump(content)
    places, end = [], 0
    for buffer in buffers:
        places.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(end, dtype=torch.uint8)
    view = block.numpy().data
    for (first, size), buffer in zip(places, buffers, strict=True):
        view[first : first + size] = buffer
    return Packed(stream.getvalue(), block, tuple(places))


def unpack(packed: Packed) -> Any:
    """What was packed; its tensors share the block's memory."""
    view = packed.block.numpy().data
    buffers = [view[first : first + size] for first, size in packed.places]
    # A worker of our own has made it.
    return pickle.loads(packed.description, buffers=buffers)  # noqa: S301
