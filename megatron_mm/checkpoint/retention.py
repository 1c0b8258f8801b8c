"""Which checkpoints of a run stay."""

import logging
import os
import shutil
import threading
import uuid
from pathlib import Path

from megatron_mm.checkpoint.paths import partial_of, step_of, up_to_latest
from megatron_mm.config.schema import CheckpointConfig

logger = logging.getLogger(__name__)


def superfluous(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """The checkpoints that may go: neither one of the newest `keep_last` nor a multiple of `keep_every`.

    `latest` names the newest of them. Those newer than that are not looked at: whoever set it back may want them.
    """
    return [
        checkpoint
        for checkpoint in up_to_latest(run_dir)[config.keep_last :]
        if not _kept_for_ever(checkpoint, config.keep_every)
    ]


def _kept_for_ever(checkpoint: Path, keep_every: int | None) -> bool:
    step = step_of(checkpoint)
    return keep_every is not None and step is not None and step % keep_every == 0


class Remover:
    """Takes checkpoints away without keeping training waiting; on one rank."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def remove(self, checkpoints: list[Path]) -> None:
        """Take their names at once, and their files in a thread."""
        self.finish()
        away = []
        for checkpoint in checkpoints:
            away.append(partial_of(checkpoint, f"removed-{uuid.uuid4().hex[:12]}"))
            os.replace(checkpoint, away[-1])
        if away:
            self._thread = threading.Thread(target=_remove_files, args=(away,), name="remove checkpoints")
            self._thread.start()

    def finish(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _remove_files(directories: list[Path]) -> None:
    for directory in directories:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("%s could not be removed: %s; the next start of the run tries again", directory, error)
