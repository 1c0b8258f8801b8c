"""Saves checkpoints of a run, in the background or not."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from megatron_mm.checkpoint.background import BackgroundWrite
from megatron_mm.checkpoint.commit import begin, commit, remove_partials
from megatron_mm.checkpoint.paths import newest, step_directory, step_of
from megatron_mm.checkpoint.retention import Remover, superfluous
from megatron_mm.checkpoint.snapshot import Planner, Snapshot
from megatron_mm.checkpoint.store import content_of
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import CheckpointConfig
from megatron_mm.models.vlm import VisionLanguageModel
from megatron_mm.parallel.state import TIMEOUT_SECONDS, host_group

logger = logging.getLogger(__name__)


class Saver:
    """Saves checkpoints of a run; all ranks call each method together.

    What saves and removals of an earlier start have left is removed. A save that fails is told on rank 0, and the last
    checkpoint stays; the next save tries again.

    Args:
        run_dir: directory that gets `checkpoints/`.
        config: when to write in the background, and what to keep.
        timeout_seconds: longest that ranks wait for each other.

    Attributes:
        last_saved: step of the newest complete checkpoint.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, timeout_seconds: float = TIMEOUT_SECONDS):
        self.last_saved: int | None = None
        self._run_dir, self._config = run_dir, config
        # On the host: no wait for what the GPU computes.
        group = self._group = host_group(timeout_seconds)
        self._planner = Planner(group)
        self._pending: tuple[int, Snapshot, BackgroundWrite] | None = None
        # The ranks' question whether any of them still writes, asked at one poll and read at the next.
        self._question: tuple[dist.Work, torch.Tensor] | None = None
        self._remover = Remover()
        if dist.get_rank() == 0:
            remove_partials(run_dir)
        dist.barrier(group=group)
        latest = newest(run_dir)
        self.last_saved = None if latest is None else step_of(latest)

    def save(
        self,
        step: int,
        chunks: Sequence[VisionLanguageModel],
        optimizer: ChainedOptimizer,
        progress: dict[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Save after `step` steps; an earlier unfinished write is finished first.

        Args:
            progress: plain values, lists and dicts of them, the same on all ranks, which `resume` returns.
            wait: have a complete checkpoint on return. Otherwise, with config.asynchronous, it returns as soon as the
                model may change.

        Raises:
            InputError: `wait`, and it could not be written.
        """
        self._finish_write()
        partial, fault = begin(self._run_dir, step, self._group)
        if fault:
            self._tell(step, fault, wait)
            return
        snapshot = self._planner.take(content_of(step, chunks, optimizer, progress), partial)
        if self._config.asynchronous and not wait:
            self._pending = (step, snapshot, BackgroundWrite(snapshot, self._config.stall_seconds))
        else:
            fault = commit(self._run_dir, step, snapshot, snapshot.write(), self._group)
            self._conclude(step, fault, wait)

    def poll(self) -> None:
        """Complete a write in the background that is done on all ranks; cheap, for after every step.

        While there is one, a number is summed over the ranks, on the host, and read at the next call: neither the GPU
        nor the network is waited for, and all ranks come to the same answer in the same step.
        """
        if self._pending is None:
            return
        if self._answer() == 0:
            self._complete()
            return
        writing = torch.tensor(int(not self._pending[2].is_done()))
        work = dist.all_reduce(writing, group=self._group, async_op=True)
        assert work is not None
        self._question = (work, writing)

    def finish(self) -> None:
        """Wait for writes in the background and complete them; also needed before going back to a checkpoint."""
        self._finish_write()
        self._remover.finish()

    def _finish_write(self) -> None:
        if self._pending is not None:
            self._answer()
            self._complete()

    def _answer(self) -> int | None:
        """How many ranks were still writing at the last poll, None where that was not asked."""
        if self._question is None:
            return None
        work, writing = self._question
        self._question = None
        work.wait()
        return int(writing.item())

    def _complete(self) -> None:
        assert self._pending is not None
        step, snapshot, write = self._pending
        self._pending = None
        fault = commit(self._run_dir, step, snapshot, write.outcome(), self._group)
        self._conclude(step, fault, wait=False)

    def _conclude(self, step: int, fault: str, wait: bool) -> None:
        if fault:
            self._tell(step, fault, wait)
            return
        self.last_saved = step
        if dist.get_rank() == 0:
            try:
                self._remover.remove(superfluous(self._run_dir, self._config))
            except OSError as error:
                logger.warning("old checkpoints of %s could not be removed: %s", self._run_dir, error)

    def _tell(self, step: int, fault: str, wait: bool) -> None:
        final = step_directory(self._run_dir, step)
        if wait:
            raise InputError(
                f"checkpoint {final} could not be written: {fault}; make room or mend the disk, and start the run "
                f"again: it goes on from {self._kept()}"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "checkpoint %s could not be written: %s; training goes on, %s is kept, and the next save tries again",
                final,
                fault,
                self._kept(),
            )

    def _kept(self) -> str:
        return "no checkpoint" if self.last_saved is None else step_directory(self._run_dir, self.last_saved).name
