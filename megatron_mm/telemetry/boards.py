"""TensorBoard and W&B behind one interface."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig

TENSORBOARD = "logs"
WANDB_ID = "wandb_id"


class BoardError(Exception):
    """A board takes nothing any more; says which and why."""


class Board(Protocol):
    """Takes the metrics of steps.

    Raises:
        BoardError: from each method, when it takes nothing any more.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take those of a step."""
        ...

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, which come again."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_boards(config: RunConfig, first_step: int) -> list[Board]:
    """Those that the config asks for, going on after `first_step`.

    Raises:
        InputError: W&B refuses.
        OSError: the run directory cannot be written.
    """
    boards: list[Board] = (
        [TensorBoard(config.run_dir / TENSORBOARD, first_step)] if config.telemetry.tensorboard else []
    )
    return [*boards, Wandb(config)] if config.telemetry.wandb != "off" else boards


class TensorBoard:
    """Event files. A file's beginning says from which step on those before it do not count."""

    def __init__(self, directory: Path, first_step: int):
        self._directory = directory
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            # Its writing thread has ended and does not come back.
            raise BoardError(f"TensorBoard's event file cannot be written ({error})") from error

    def rewind(self, step: int) -> None:
        self.close()
        try:
            self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)
        except OSError as error:
            raise BoardError(f"TensorBoard's event file cannot be written ({error})") from error

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise BoardError(f"TensorBoard's event file cannot be written ({error})") from error


class Wandb:
    """A run of W&B's, the same one at each start: its id is kept in the run directory.

    W&B keeps what it has been given. So steps that come again, after a kill or a roll-back, are there twice, over an
    axis of our own; over W&B's, it would drop the newer ones.

    Raises:
        InputError: W&B cannot be started, for example without an account.
    """

    def __init__(self, config: RunConfig):
        import wandb  # takes two seconds to import, and is off by default

        self._error: type[Exception] = wandb.Error
        mode = config.telemetry.wandb
        try:
            self._run: Any = wandb.init(
                project=config.telemetry.wandb_project,
                name=config.recipe,
                id=_wandb_id(config.run_dir),
                # Offline nothing can be asked for; `wandb sync` joins what has one id.
                resume="allow" if mode == "online" else None,
                mode=mode,  # pyright: ignore[reportArgumentType]
                dir=config.run_dir,
                config=config.model_dump(mode="json"),
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise InputError(
                f"telemetry.wandb={mode}: {error}; log in by `wandb login`, or set telemetry.wandb=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._run.log({"step": step, **metrics})
        except (OSError, self._error) as error:
            raise BoardError(f"W&B takes no more metrics ({error})") from error

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        try:
            self._run.finish()
        except (OSError, self._error) as error:
            raise BoardError(f"W&B takes no more metrics ({error})") from error


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / WANDB_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
