"""The figures of a log line: what the steps since the last one learned, how fast, and how evenly shared out.

docs/telemetry.md defines each. A step costs a few additions on the host; ranks meet for a logged step alone.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from megatron_mm.config.flops import recomputed_flops, training_flops
from megatron_mm.config.schema import MODULES, RunConfig
from megatron_mm.data.loader import Batch
from megatron_mm.models.freeze import module_of
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import StepResult
from megatron_mm.train.timing import PARTS

GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True)
class Mishaps:
    """What has gone wrong since the run began.

    Attributes:
        skipped_updates: steps whose update was not made.
        rollbacks: to a checkpoint.
        broken_samples: of this data-parallel rank.
    """

    skipped_updates: int = 0
    rollbacks: int = 0
    broken_samples: int = 0


class Meter:
    """Collects what a log line needs over the steps since the last one. Every rank has one.

    Args:
        part_names: of the parts of the data whose losses are told apart, such as "ocr/thinking".
    """

    def __init__(self, config: RunConfig, platform: Platform, part_names: Sequence[str]):
        self._config, self._platform = config, platform
        self._part_names = tuple(part_names)
        self._flops = training_flops(config.model, config.train.trained)
        self._recomputed = recomputed_flops(config.model, config.train.trained, config.train.recompute)
        stated = config.telemetry.peak_tflops
        self._peak_tflops = platform.peak_tflops() if stated is None else stated
        self.restart()

    def restart(self) -> None:
        """Forget what is collected and start the clock anew: after a roll-back, whose steps are undone."""
        self._since = time.monotonic()
        self._loads: list[tuple[int, ...]] = []
        self._trained_tokens = 0
        self._waited_seconds = 0.0
        self._part_totals: Tensor | None = None

    def add(self, result: StepResult, batches: Sequence[Batch], waited_seconds: float) -> None:
        """Take in a step.

        Args:
            batches: this rank's micro-batches of the step.
            waited_seconds: for them.
        """
        self._loads.append(_load(batches))
        self._trained_tokens += result.trained_tokens
        self._waited_seconds += waited_seconds
        # One step of no finite loss, whose update is skipped, would hide all others.
        if math.isfinite(result.loss):
            self._part_totals = result.sums if self._part_totals is None else self._part_totals + result.sums

    def metrics(
        self,
        result: StepResult,
        *,
        part_seconds: Mapping[str, float],
        rates: Mapping[str, float],
        grad_norms: Mapping[str, float],
        mishaps: Mishaps,
    ) -> dict[str, float]:
        """The figures of a log line, the same on every rank; starts collecting anew. All ranks call it.

        Args:
            result: of the step that is logged.
            part_seconds: that it took, by part (StepTimer.take).
            rates: learning rate of each module (module_rates).
            grad_norms: gradient norm of each module (module_grad_norms).
        """
        assert self._loads, "no step since the last log line"
        learned = {
            "loss": result.loss,
            **self._part_losses(),
            "grad_norm": result.grad_norm,
            **{f"grad_norm/{module}": norm for module, norm in grad_norms.items()},
            "lr": max(rates.values()),
            **({f"lr/{module}": rate for module, rate in rates.items()} if len(set(rates.values())) > 1 else {}),
            "trained_tokens": result.trained_tokens,
        }
        whole = self._over_ranks(part_seconds, mishaps.broken_samples)
        measured = {
            **self._speed(whole),
            "data_wait": whole.waited_seconds / whole.seconds,
            "time/step": whole.seconds / len(whole.loads),
            **{f"time/{part}": taken for part, taken in whole.part_seconds.items() if taken > 0},
            **{f"memory/{kind}_gib": size / GIBIBYTE for kind, size in whole.memory_bytes.items()},
            **_shares(whole),
        }
        counted = {
            "skipped_updates": mishaps.skipped_updates,
            "rollbacks": mishaps.rollbacks,
            "broken_samples": whole.broken_samples,
        }
        self.restart()
        return {**learned, **{name: float(f"{value:.6g}") for name, value in measured.items()}, **counted}

    def _part_losses(self) -> dict[str, float]:
        totals = [] if self._part_totals is None else self._part_totals.tolist()
        named = zip(self._part_names, totals, strict=True) if totals else ()
        return {f"loss/{name}": loss_sum / num_tokens for name, (loss_sum, num_tokens) in named if num_tokens}

    def _speed(self, whole: "_Whole") -> dict[str, float]:
        done: dict[str, float] = dict(zip(_LOADS, whole.loads.sum(0), strict=True))
        amounts = done["tokens"], done["squared_tokens"], done["tiles"], self._trained_tokens
        tera_rank_seconds = 1e12 * dist.get_world_size() * whole.seconds
        tflops = self._flops.of(*amounts) / tera_rank_seconds
        figures = {
            "tokens_per_second": done["tokens"] / whole.seconds,
            "samples_per_second": done["samples"] / whole.seconds,
            "tflops": tflops,
        }
        if self._peak_tflops is not None:
            figures["mfu"] = tflops / self._peak_tflops
            if self._config.train.recompute != "none":
                again = self._recomputed.of(*amounts) / tera_rank_seconds
                figures["hfu"] = (tflops + again) / self._peak_tflops
        return figures

    def _over_ranks(self, part_seconds: Mapping[str, float], broken_samples: int) -> "_Whole":
        """What all ranks did, by two reductions."""
        num_ranks, num_data_ranks = dist.get_world_size(), state.data_ranks()
        # Ranks that share a sequence have the same batches, so a sum over all ranks counts each so many times.
        copies = num_ranks // num_data_ranks
        loads, memory = np.array(self._loads, dtype=np.float64), self._platform.peak_memory_bytes()
        device = self._platform.device()
        summed = _reduced(
            [loads / copies, [broken_samples / copies], [part_seconds[part] / num_ranks for part in PARTS]],
            dist.ReduceOp.SUM,
            device,
        )
        largest = _reduced(
            [loads, [time.monotonic() - self._since, self._waited_seconds], list(memory.values())],
            dist.ReduceOp.MAX,
            device,
        )
        return _Whole(
            loads=summed[0],
            mean_loads=summed[0] / num_data_ranks,
            largest_loads=largest[0],
            broken_samples=round(float(summed[1][0])),
            part_seconds=dict(zip(PARTS, summed[2].tolist(), strict=True)),
            seconds=float(largest[1][0]),
            waited_seconds=float(largest[1][1]),
            memory_bytes=dict(zip(memory, largest[2].tolist(), strict=True)),
        )


# What a rank's micro-batches of a step add up to: tokens of the language model, squares of the samples' lengths,
# tokens with the padding, samples, tiles.
_LOADS = ("tokens", "squared_tokens", "padded_tokens", "samples", "tiles")


@dataclass(frozen=True, slots=True)
class _Whole:
    """What all ranks did in the steps since the last line.

    Attributes:
        loads, mean_loads, largest_loads: [steps, loads], in all, and of the mean and the largest data-parallel rank.
        broken_samples: in all, since the run began.
        part_seconds: of the measured step, mean over the ranks.
        seconds, waited_seconds, memory_bytes: that passed, that batches were waited for, and memory; of the rank with
            most.
    """

    loads: np.ndarray
    mean_loads: np.ndarray
    largest_loads: np.ndarray
    broken_samples: int
    part_seconds: dict[str, float]
    seconds: float
    waited_seconds: float
    memory_bytes: dict[str, float]


def _load(batches: Sequence[Batch]) -> tuple[int, ...]:
    """The row of _LOADS of a rank's micro-batches."""
    return (
        sum(batch.num_tokens for batch in batches),
        sum(batch.squared_tokens for batch in batches),
        sum(batch.ids.numel() for batch in batches),
        sum(batch.num_samples for batch in batches),
        sum(len(batch.tiles) for batch in batches if batch.tiles is not None),
    )


def _shares(whole: _Whole) -> dict[str, float]:
    """How full batches are and how evenly ranks are loaded: in each step all wait for the one with most."""
    total, mean, largest = (
        dict(zip(_LOADS, loads.sum(0), strict=True)) for loads in (whole.loads, whole.mean_loads, whole.largest_loads)
    )
    balance = {f"balance/{load}": largest[load] / mean[load] for load in ("tokens", "tiles") if mean[load]}
    padding = 1 - total["tokens"] / total["padded_tokens"]
    return {"padding": padding, "tiles": total["tiles"] / len(whole.loads), **balance}


def _reduced(values: Sequence[ArrayLike], operation: dist.ReduceOp.RedOpType, device: torch.device) -> list[np.ndarray]:
    """Each array with all ranks' counterparts, by one reduction."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    dist.all_reduce(flat, operation)
    pieces = np.split(flat.cpu().numpy(), np.cumsum([array.size for array in arrays])[:-1])
    return [piece.reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def module_rates(config: RunConfig, trainee: Trainee) -> dict[str, float]:
    """Learning rate of each trained module at the scheduler's step, the same on every rank."""
    rates = {}
    for module in config.train.trained:
        rate = config.optim.modules.get(module)
        bounds = {}
        if rate is not None:
            bounds = {"max_lr": rate.lr, "min_lr": rate.lr if rate.min_lr is None else rate.min_lr}
        rates[module] = trainee.scheduler.get_lr(bounds)
    return rates


@torch.no_grad()
def module_grad_norms(trainee: Trainee) -> dict[str, float]:
    """Gradient norm of each trained module over the whole model, the same on every rank.

    Call it between the optimizer's `prepare_grads` and clipping, on all ranks. The gradients are those that
    Megatron-Core's own norm is made of (no copies on other tensor-parallel ranks, no second tied embedding), so the
    squares add up to its square.
    """
    modules = {parameter: module_of(name) for chunk in trainee.chunks for name, parameter in chunk.named_parameters()}
    optimizer = trainee.optimizer
    parts = optimizer.chained_optimizers
    device = next(iter(modules)).device
    squares = [_squares_by_module(part, modules, device) for part in parts]
    if optimizer.grads_states_parallel_group_is_shared():
        # As Megatron-Core does: then ranks may differ in how many optimizers they chain.
        squares = [torch.stack(squares).sum(0)]
    for part, square in zip(parts, squares, strict=False):
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
    norms = torch.stack(squares).sum(0).sqrt().tolist()
    return {module: norm for module, norm in zip(MODULES, norms, strict=True) if trainee.num_trained[module]}


def _squares_by_module(optimizer: Any, modules: Mapping[Parameter, str], device: torch.device) -> Tensor:
    """Sum of squares of this rank's share of the gradients: float64 [modules]."""
    grads: list[Tensor] = [] if optimizer.is_stub_optimizer else optimizer.get_main_grads_for_grad_norm()
    # A gradient is the same object whoever asks for it.
    owners = {id(main.grad): modules[parameter] for parameter, main in _updated(optimizer)} if grads else {}
    of_module: dict[str, list[Tensor]] = {module: [] for module in MODULES}
    for grad in grads:
        of_module[owners[id(grad)]].append(grad)
    norms = [get_total_norm(of_module[module]).to(device) for module in MODULES]
    return torch.stack(norms).double().square()


def _updated(optimizer: Any) -> Iterator[tuple[Parameter, Tensor]]:
    """Each parameter of the model, and what is updated for it: itself, its fp32 copy, or this rank's part of either."""
    if isinstance(optimizer, DistributedOptimizer):
        of_model = optimizer.model_float16_groups + optimizer.model_fp32_groups
        updated = optimizer.shard_fp32_from_float16_groups + optimizer.shard_fp32_groups
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        of_model = optimizer.float16_groups + optimizer.fp32_from_fp32_groups
        updated = optimizer.fp32_from_float16_groups + optimizer.fp32_from_fp32_groups
    else:
        assert isinstance(optimizer, FP32Optimizer)
        of_model = updated = [optimizer.get_parameters()]
    for parameters, mains in zip(of_model, updated, strict=True):
        yield from zip(parameters, mains, strict=True)
