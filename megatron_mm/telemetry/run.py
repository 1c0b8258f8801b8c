"""The run directory: config.yaml, metrics.jsonl, TensorBoard, W&B, and lines on the terminal."""

import json
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import to_yaml
from megatron_mm.config.schema import RunConfig


class Telemetry:
    """Takes the metrics of a run. Only the writing rank has a live one; on the others every call does nothing."""

    def __init__(self, config: RunConfig, *, writes: bool):
        self._writes = writes
        if not writes:
            return
        run_dir = config.run_dir
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another") from None
        self._label = config.recipe
        self._num_steps = config.train.steps
        self._started = time.monotonic()
        self._tensorboard = SummaryWriter(str(run_dir / "logs")) if config.telemetry.tensorboard else None
        self._wandb = _start_wandb(config) if config.telemetry.wandb != "off" else None

    def say(self, text: str) -> None:
        """Print a line on the writing rank."""
        if self._writes:
            print(text, flush=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step and print them."""
        if not self._writes:
            return
        seconds = time.monotonic() - self._started
        self._metrics.write(json.dumps({"step": step, "seconds": round(seconds, 3), **metrics}) + "\n")
        self._metrics.flush()
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self._label}  step {step}/{self._num_steps}  {shown}  {seconds:.0f} s")

    def close(self) -> None:
        """Flush and close every sink."""
        if not self._writes:
            return
        self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(config: RunConfig) -> Any:
    import wandb  # takes two seconds to import, and is off by default

    return wandb.init(
        project=config.telemetry.wandb_project,
        name=config.recipe,
        mode=config.telemetry.wandb,  # pyright: ignore[reportArgumentType]
        dir=config.run_dir,
        config=config.model_dump(mode="json"),
    )
