"""What ranks measure together: gradient norms by module, the figures of a log line, the parts of a step's time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.config.flops import training_flops
from megatron_mm.config.schema import MODULES, RunConfig
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.meter import Meter, Mishaps, module_grad_norms, module_rates
from megatron_mm.train.step import CrossEntropy, forward_backward, train_step
from megatron_mm.train.timing import PARTS, StepTimer
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table
from tests.layouts import (
    EP2,
    EXPERTS,
    NUM_PARTS,
    PLAIN,
    PP2,
    SP,
    TP2,
    Overrides,
    gradients,
    layout,
    micro_batches,
    module_of,
    samples_of_step,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

BF16: Overrides = {"precision": "bf16"}
RATES: Overrides = {"optim__modules": "{vision: {lr: 2e-4}}"}
# Recomputation is no model FLOPs. The peak of an invented device.
PEAK: Overrides = {"telemetry__peak_tflops": 2, "train__recompute": "full"}
LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "unpacked": (1, {**PLAIN, **PEAK, "data__packed": "false"}),
    "bf16, plain": (1, {**BF16, **PLAIN}),
    "TP 2 + SP, plain": (2, {**SP, **PLAIN, **RATES}),
    "PP 2": (2, {**PP2, **RATES}),
    "DP 2, plain": (2, PLAIN),
    "DP 2, bf16": (2, BF16),
    "TP 2 x PP 2": (4, {**TP2, **PP2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "experts, EP 2": (2, EP2),
    "experts, EP 2, plain": (2, {**EP2, **PLAIN}),
    "experts, TP 2 + SP, EP 2": (2, {**EP2, **SP}),
    "experts, PP 2, EP 2": (4, {**EP2, **PP2}),
}


# Samples belong to the first ones in turn (tests/layouts.py), none to the last.
PARTS_OF_DATA = [*(f"source{number}/thinking" for number in range(NUM_PARTS)), "nothing/thinking"]


@dataclass(frozen=True)
class Measured:
    """Of a layout's first step.

    Attributes:
        norms, whole_norm: of the gradients by module, and Megatron-Core's of all.
        expected: norms made of the whole gradients; on rank 0.
        metrics: of the log line after it.
        tokens: of this rank's batches.
        losses: of the step with the timers attached and measuring, and of the same without.
        seconds: by part.
    """

    norms: dict[str, float]
    whole_norm: float
    expected: dict[str, float]
    metrics: dict[str, float]
    tokens: int
    losses: tuple[float, float]
    seconds: dict[str, float]


def _measured(configs: list[RunConfig], tensors: dict[str, torch.Tensor], tokenizer_directory: Path) -> list[Measured]:
    """Runs on every rank."""
    platform, tokenizer = get_platform("cpu"), ChatTokenizer(tokenizer_directory)
    with state.process_group(platform):
        return [_of_layout(config, platform, tensors, tokenizer) for config in configs]


def _of_layout(
    config: RunConfig, platform: Any, tensors: dict[str, torch.Tensor], tokenizer: ChatTokenizer
) -> Measured:
    with state.model_parallel(config.parallel, config.seed) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        of_precision = {name: tensor.to(DTYPES[config.precision]) for name, tensor in tensors.items()}
        from_hf(chunks, model_table(config.model), of_precision)
        trainee = build_trainee(config, chunks, groups)
        batches = micro_batches(config, samples_of_step(config, tokenizer, 0), tokenizer)
        (loss_sum, num_tokens), *_ = forward_backward(
            trainee, batches, platform.device(), CrossEntropy(len(PARTS_OF_DATA))
        ).tolist()
        optimizer: Any = trainee.optimizer
        optimizer.prepare_grads()
        norms, whole_norm = module_grad_norms(trainee), optimizer.get_grad_norm()
        expected: dict[str, float] = {}
        for name, tensor in gradients(config, trainee).items():
            module = module_of(name)
            expected[module] = (expected.get(module, 0.0) ** 2 + float(tensor.double().square().sum())) ** 0.5
        meter = Meter(config, platform, PARTS_OF_DATA)
        timer = StepTimer(platform.synchronize)
        timer.attach(trainee)
        timer.measure(True)
        result = train_step(trainee, batches, platform.device(), CrossEntropy(len(PARTS_OF_DATA)))
        seconds = timer.take()
        meter.add(result, batches, waited_seconds=0.0)
        metrics = meter.metrics(
            result,
            part_seconds=seconds,
            rates=module_rates(config, trainee),
            grad_norms=norms,
            mishaps=Mishaps(1, 2, broken_samples=state.data_rank() + 1),
        )
        tokens = sum(batch.num_tokens for batch in batches)
        return Measured(norms, whole_norm, expected, metrics, tokens, (result.loss, loss_sum / num_tokens), seconds)


def _check(name: str, config: RunConfig, ranks: list[Measured], single: Measured) -> None:
    data_ranks = len(ranks) // (config.parallel.tensor * config.parallel.pipeline)
    rounding = 1e-5 if config.precision == "fp32" else 0.05
    for measured in ranks:
        assert measured.norms.keys() == set(MODULES), name
        squares = sum(norm**2 for norm in measured.norms.values())
        assert squares**0.5 == pytest.approx(measured.whole_norm, rel=1e-6), name
        # Timers change nothing, and each part of the work is found.
        assert measured.losses[0] == measured.losses[1], name
        wanted = ["forward", "backward", "optimizer"] + ["communication"] * (len(ranks) > 1)
        assert all(measured.seconds[part] > 0 for part in wanted), (name, measured.seconds)
        assert measured.seconds.keys() == set(PARTS)
        metrics = measured.metrics
        assert metrics == ranks[0].metrics, name
        assert metrics["broken_samples"] == sum(range(1, data_ranks + 1)), name
        losses = [metrics[f"loss/{part}"] for part in PARTS_OF_DATA[:-1]]
        assert losses == pytest.approx([single.metrics[f"loss/{part}"] for part in PARTS_OF_DATA[:-1]], rel=rounding)
        assert min(losses) < metrics["loss"] < max(losses)
        assert f"loss/{PARTS_OF_DATA[-1]}" not in metrics
        # The same work, whoever does it. Figures have six digits.
        tokens = metrics["tokens_per_second"] * metrics["time/step"]
        assert tokens == pytest.approx(sum_of_tokens(ranks, data_ranks), rel=1e-4), name
        done = metrics["tflops"] * len(ranks) * metrics["time/step"]
        of_single = single.metrics["tflops"] * single.metrics["time/step"]
        assert done == pytest.approx(of_single, rel=1e-4), name
        assert metrics["tiles"] == single.metrics["tiles"]
        tokens_of_ranks = [measured.tokens for measured in ranks]
        balance = max(tokens_of_ranks) / (sum(tokens_of_ranks) / len(ranks))
        assert metrics["balance/tokens"] == pytest.approx(balance, rel=1e-5), name
        assert (metrics["balance/tokens"] > 1.05) == (data_ranks > 1), name
        assert 0 <= metrics["padding"] < 0.01 or not config.data.packed
        if config.telemetry.peak_tflops is None:
            assert "mfu" not in metrics
        else:
            assert metrics["padding"] > 0.1
            assert metrics["mfu"] == pytest.approx(metrics["tflops"] / config.telemetry.peak_tflops, rel=1e-4), name
            assert 1.2 < metrics["hfu"] / metrics["mfu"] < 4 / 3
        if config.optim.modules:
            assert (metrics["lr/vision"], metrics["lr/language"]) == (2e-4, metrics["lr"]), name
            assert 2e-4 < metrics["lr"] < config.optim.lr, name
        else:
            assert "lr/vision" not in metrics
    # Against the norms of the whole gradients, whose sums are of other orders; in bf16 of other roundings.
    assert ranks[0].expected == pytest.approx(ranks[0].norms, rel=1e-5), name
    assert ranks[0].norms == pytest.approx(single.norms, rel=rounding), name


def sum_of_tokens(ranks: list[Measured], data_ranks: int) -> float:
    """Of the global batch: each is counted by all ranks that share it."""
    return sum(measured.tokens for measured in ranks) * data_ranks / len(ranks)


def _run(layouts: dict[str, tuple[int, Overrides]], base: Overrides, tokenizer_directory: Path) -> None:
    single = layout(**base)
    arguments = (r4b_tensors(single, *reference_models(single)), tokenizer_directory)
    ((reference,),) = run_on_ranks(_measured, 1, [single], *arguments)
    _check("single", single, [reference], reference)
    flops = training_flops(single.model, single.train.trained)
    assert reference.metrics["tflops"] * reference.metrics["time/step"] * 1e12 > flops.token * reference.tokens
    for num_ranks in (1, 2, 4):
        named = {name: layout(**overrides) for name, (ranks, overrides) in layouts.items() if ranks == num_ranks}
        if named:
            results = run_on_ranks(_measured, num_ranks, list(named.values()), *arguments)
            for (name, config), *ranks in zip(named.items(), *results, strict=True):
                _check(name, config, ranks, reference)


def test_every_layout_measures_the_same(digits: Path) -> None:
    _run(LAYOUTS, {}, digits / TOKENIZER)


def test_models_with_experts(digits: Path) -> None:
    _run(EXPERT_LAYOUTS, EXPERTS, digits / TOKENIZER)
