"""What a trainer moves out of the device's memory while an engine works there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, UntypedStorage

from megatron_mm.parallel.platform import Platform
from megatron_mm.train.assemble import Trainee

# Of a host buffer. torch rounds pinned memory up to a power of two, which would nearly double one large buffer.
_BUFFER_BYTES = 2**26


class HostCopy:
    """Bytes of a device's tensors in the host's memory, in buffers that are made at the first use and kept.

    Args:
        platform: makes the buffers.
    """

    def __init__(self, platform: Platform):
        self._platform = platform
        self._buffers: list[Tensor] = []

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy flat uint8 tensors here, over what was here; `platform.synchronize` waits for the end."""
        for buffer, piece in self._pieces(tensors):
            buffer.copy_(piece, non_blocking=True)

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy into flat uint8 tensors, of the same sizes in the same order, what was written last."""
        for buffer, piece in self._pieces(tensors):
            piece.copy_(buffer, non_blocking=True)

    def _pieces(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of buffers and of tensors that belong together."""
        place = 0
        for tensor in tensors:
            start = 0
            while start < len(tensor):
                number, offset = divmod(place, _BUFFER_BYTES)
                if number == len(self._buffers):
                    self._buffers.append(self._platform.host_buffer(_BUFFER_BYTES))
                size = min(len(tensor) - start, _BUFFER_BYTES - offset)
                yield self._buffers[number][offset : offset + size], tensor[start : start + size]
                start += size
                place += size


class Offload:
    """Room for an engine in a trainer's memory.

    Gradients leave without a copy, since every update begins with zeros. The optimizer's state is copied to the host
    where the device's memory is another one.

    Args:
        trainee: makes room.
        platform: of its tensors.
        is_on: without it nothing ever leaves.
    """

    def __init__(self, trainee: Trainee, platform: Platform, *, is_on: bool):
        self._trainee, self._platform, self._is_on = trainee, platform, is_on
        self._host = HostCopy(platform)

    @contextmanager
    def away(self, timed: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Within, gradients and optimizer take no memory of the device, and neither may be used.

        Args:
            timed: is entered around moving.
        """
        if not self._is_on:
            yield
            return
        with timed():
            sizes = self._leave()
        # Not after an error: the engine may still hold the memory, and what is missing then would hide what went wrong.
        yield
        with timed():
            self._return(sizes)

    def _leave(self) -> list[tuple[UntypedStorage, int]]:
        """Move, and return the storages that were emptied with their sizes."""
        self._platform.synchronize()
        for chunk in self._trainee.ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        if not self._platform.has_own_memory:
            return []
        storages = _optimizer_storages(self._trainee)
        self._host.write([_bytes_of(storage) for storage in storages])
        # Nothing may take the memory before it was copied.
        self._platform.synchronize()
        sizes = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        return sizes

    def _return(self, sizes: Sequence[tuple[UntypedStorage, int]]) -> None:
        for storage, num_bytes in sizes:
            storage.resize_(num_bytes)
        self._host.read([_bytes_of(storage) for storage, _ in sizes])
        for chunk in self._trainee.ddp:
            chunk.restore_grad_buffers(synchronize=False)
        self._platform.synchronize()


def _optimizer_storages(trainee: Trainee) -> list[UntypedStorage]:
    """Return the storages of fp32 weights and moments; not the model's own, which fp32 weights are views of."""
    of_model = {parameter.untyped_storage().data_ptr() for chunk in trainee.chunks for parameter in chunk.parameters()}
    found: dict[int, UntypedStorage] = {}
    for part in trainee.optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        weights = chain.from_iterable(group["params"] for group in part.optimizer.param_groups)
        moments = chain.from_iterable(state.values() for state in part.optimizer.state.values())
        for value in chain(weights, moments):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in of_model:
                found[value.untyped_storage().data_ptr()] = value.untyped_storage()
    return [storage for storage in found.values() if storage.nbytes()]


def _bytes_of(storage: UntypedStorage) -> Tensor:
    """Return a storage as a flat uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
