"""What a rank has to write of a checkpoint, taken at one moment, and the writing of it.

The files are Megatron-Core's torch_dist format, made by its planner and its writer. `dist_checkpointing.save` is not
called itself: it writes common.pt before the ranks have agreed on the plan, so a full disk on rank 0 would leave the
others waiting; it copies every tensor that is a part of a larger one while training stands still; and its writer starts
a process a file that nobody notices to have been killed.
"""

import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mm.checkpoint.manifest import FileRecord

# Of a rank; each is written by a thread of its own.
NUM_FILES = 2


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank has written.

    Attributes:
        results: where each tensor lies, for torch's metadata.
        files: the files, by name.
    """

    results: list[WriteResult]
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a rank could not write."""

    reason: str


class Writer(FileSystemWriterAsync):
    """Megatron-Core's writer, but that parts of larger tensors are copied one at a time while they are written."""

    def __init__(self, directory: Path):
        super().__init__(str(directory), thread_count=NUM_FILES)
        self.buckets: list[tuple[str, list[tuple[WriteItem, Any]], list[tuple[WriteItem, Tensor]]]] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Bring what the plan names to the host, and share it out over files."""
        assert plan.storage_data is not None
        for number, items in enumerate(_split_by_size_and_type(NUM_FILES, plan.items)):
            objects: list[tuple[WriteItem, Any]] = []
            tensors: list[tuple[WriteItem, Tensor]] = []
            for item in items:
                data: Any = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    objects.append((item, data))
                else:
                    tensors.append((item, data.detach().to("cpu", non_blocking=True)))
            if items:
                self.buckets.append((f"{plan.storage_data.prefix}{number}.distcp", objects, tensors))
        torch.cuda.synchronize()

    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for _, _, tensors in self.buckets for _, tensor in tensors)

    def write(self) -> tuple[list[WriteResult], list[str]]:
        """Write all files; their content is on the disk when this returns.

        Returns:
            Where each tensor lies, and the names of the files.

        Raises:
            OSError, RuntimeError: they cannot be written; torch.save turns some of the first into the second.
        """
        if not self.buckets:
            return [], []
        with ThreadPoolExecutor(len(self.buckets)) as pool:
            results = list(pool.map(self._write_file, range(len(self.buckets))))
        return [result for of_file in results for result in of_file], [name for name, _, _ in self.buckets]

    def _write_file(self, number: int) -> list[WriteResult]:
        name, objects, tensors = self.buckets[number]
        # Megatron-Core's annotations are narrower than what its writer takes.
        bucket: Any = (os.path.join(self.checkpoint_dir, name), name, (objects, _compact(tensors)))
        outcome: Any = queue.SimpleQueue()
        still_to_do: Any = queue.Queue()
        still_to_do.put(number)
        transforms: Any = [self.transforms]
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcome, still_to_do, use_fsync=True)
        _, results = outcome.get()
        if isinstance(results, Exception):
            raise results
        return results


def _compact(tensors: list[tuple[WriteItem, Tensor]]) -> Iterator[tuple[WriteItem, Tensor]]:
    """Each without the rest of its storage, which torch.save would write as well."""
    for item, tensor in tensors:
        yield item, tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this rank has to write.

    A tensor on the host is not copied: what is written is what it holds then. A forked process writes what it held at
    the fork, since the kernel copies a page when either side changes it.

    Attributes:
        common: the state that is the same on all ranks, on rank 0, which writes it.
        metadata: where each tensor of the checkpoint belongs, on rank 0.
    """

    directory: Path
    writer: Writer
    common: dict[str, Any] | None
    metadata: Metadata | None

    def num_bytes(self) -> int:
        """That this rank's tensors take."""
        return self.writer.num_bytes()

    def write(self) -> Written | Failed:
        """Write this rank's files and take their checksums."""
        try:
            results, names = self.writer.write()
            if self.common is not None:
                names.append(COMMON_STATE_FNAME)
                with (self.directory / COMMON_STATE_FNAME).open("wb") as stream:
                    torch.save(self.common, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            with ThreadPoolExecutor(NUM_FILES) as pool:
                records = pool.map(FileRecord.of, (self.directory / name for name in names))
                return Written(results, dict(zip(names, records, strict=True)))
        except (OSError, RuntimeError, MemoryError) as error:
            return Failed(_reason(error))


def _reason(error: BaseException) -> str:
    """What the system said, which torch.save hides behind an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


class Planner:
    """Takes snapshots; ranks agree on who writes what the first time, and go on as long as that does not change.

    Args:
        group: of all ranks, on the host: a collective on the GPU would wait for the step that it computes.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._outline: list[Any] = []
        self._plans: tuple[SavePlan, SavePlan] | None = None
        self._metadata: Metadata | None = None

    @torch.no_grad()
    def take(self, content: ShardedStateDict, directory: Path) -> Snapshot:
        """A snapshot of a sharded state; all ranks call it together.

        Args:
            directory: to write to, which is there already.
        """
        known = self._plans is not None
        sharded, common = save_preprocess(content, validate_access_integrity=not known)
        outline = [
            (entry.key, entry.global_offset, entry.local_shape, entry.dtype, entry.replica_id)
            if isinstance(entry, ShardedTensor)
            else entry.unique_key
            for entry in nested_values(sharded)
        ]
        if known:
            changed = torch.tensor(int(outline != self._outline))
            dist.all_reduce(changed, group=self._group)
            known = not changed.item()
        assert isinstance(sharded, dict)
        flat: Any = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)[0]
        planned: Any = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(flat),
            Writer(directory),
            self._group,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            cached_ckpt_structure=(*self._plans, True) if known and self._plans is not None else None,
        )
        (writer, metadata, _), central, local, *_ = planned
        if metadata is not None:
            # For a comparison of plans that we do by outlines; stored, it would grow with the ranks.
            del metadata.all_local_plans
        if not known:
            self._outline, self._plans, self._metadata = outline, (central, local), metadata
        is_first = dist.get_rank() == 0
        return Snapshot(directory, writer, common if is_first else None, self._metadata)
