"""Process groups: start, ask, end. The only module that knows `megatron.core.parallel_state`."""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel.platform import Platform

# Longest that a collective waits, unless the caller has a reason to wait longer.
TIMEOUT_SECONDS = 30 * 60.0


def num_ranks() -> int:
    """Ranks of this job as torchrun says; 1 where it did not start us."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(platform: Platform, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Join the job's ranks, or be a job of one rank; leave at the end, but not a job of many with an error."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    platform.prepare(local_rank)
    # torch 2.13 renames two collectives that Megatron-Core calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # It announces twice a run that it is off.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(platform.distributed_backend, timeout=timeout)
    else:
        dist.init_process_group(
            platform.distributed_backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
        )
    try:
        yield
    except BaseException:
        # Where others have gone NCCL would wait for them, and nobody would hear of the error.
        if "RANK" not in os.environ:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def model_parallel(
    parallel: ParallelConfig, seed: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> Iterator[ProcessGroupCollection]:
    """Cut the ranks into Megatron-Core's groups and seed them; `check_layout` has said that they can be."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        # Experts are never cut: their matrices are small, and gloo cannot gather parts of different sizes.
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def host_group(timeout_seconds: float = TIMEOUT_SECONDS) -> dist.ProcessGroup:
    """Return a new group of all ranks that talk through the host's memory, also where the job's own group is NCCL's.

    All ranks ask together.
    """
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group


def without_tensor_parallelism(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The same groups, but this rank alone in its tensor-parallel one."""
    alone = copy.copy(groups)
    # Synchronised locally, since only the ranks of the first pipeline stage have a ViT; otherwise the others would name
    # the next group of the job by another number, and wait for ever.
    mine: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    alone.tp = mine
    return alone


def data_rank() -> int:
    """This rank's place among the data-parallel ones."""
    return parallel_state.get_data_parallel_rank()


def data_ranks() -> int:
    """The number of data-parallel ranks."""
    return parallel_state.get_data_parallel_world_size()


def writes() -> bool:
    """Whether this rank writes files and prints."""
    return dist.get_rank() == 0


def broadcast_from_last_stage(value: torch.Tensor) -> torch.Tensor:
    """`value` of the last pipeline stage, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(value, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank of the job; all ranks ask together."""
    value = torch.full((), int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def least_of_all(values: torch.Tensor) -> torch.Tensor:
    """The least of each of `values` over all ranks of the job; all ranks ask together."""
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def largest_over_data(value: torch.Tensor) -> torch.Tensor:
    """The largest `value` of the data- and context-parallel ranks."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return value


def sum_over_data(value: torch.Tensor) -> torch.Tensor:
    """Sum of `value` over the data- and context-parallel ranks."""
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return value
