"""A step of R-4B's stage 3 at full size on one GPU, in bf16 or by one FP8 recipe, with real images."""

import statistics
from collections.abc import Iterator
from typing import Any

from torch.profiler import profile

from benchmarks.figure import Figure
from benchmarks.gpu.ceilings import bf16_product
from benchmarks.gpu.photos import prepare_photos
from benchmarks.gpu.ratios import STEP
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import GIBIBYTE, peak_memory, seconds
from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.config.flops import training_flops
from megatron_mm.config.layout import check_layout
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform, get_platform
from megatron_mm.parallel.watchdog import watch
from megatron_mm.planning.load import Load, LoadOptions, assumed_load
from megatron_mm.planning.memory import worst_memory
from megatron_mm.planning.steptime import flops_done_again
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.guard import Guard
from megatron_mm.train.learning import Learning, LearningJob
from megatron_mm.train.run import Place
from megatron_mm.train.timing import PARTS

RECIPE = "r4b/stage3"
# Wanted of the measured bf16 ceiling.
LEAST_SHARE = 0.45
# Of the device's memory: a little less than a plan's 0.9, since a step that runs out of memory measures nothing.
MEMORY_SHARE = 0.88
PROFILE_ROWS = 30


def bf16(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a step in bf16, and its share of what the device reaches just before."""
    platform = get_platform(setting.sizes.platform)
    platform.prepare(0)
    ceiling = bf16_product(platform, setting.sizes.matrix_side)
    yield ceiling
    for figure in _step(setting, platform, "none"):
        yield figure
        if figure.unit == "TFLOP/s":
            yield Figure("share of the bf16 ceiling", figure.value / ceiling.value, "ratio", LEAST_SHARE, "at least")


def delayed(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a step whose 8-bit products are scaled by past maxima."""
    return _step(setting, get_platform(setting.sizes.platform), "delayed")


def tensorwise(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a step whose 8-bit products are scaled by each tensor's maximum."""
    return _step(setting, get_platform(setting.sizes.platform), "tensorwise")


def blockwise(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a step whose 8-bit products are scaled by blocks."""
    return _step(setting, get_platform(setting.sizes.platform), "blockwise")


def mxfp8(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of a step with MXFP8 products, which Hopper does not have."""
    return _step(setting, get_platform(setting.sizes.platform), "mxfp8")


def _step(setting: Setting, platform: Platform, fp8: str) -> Iterator[Figure]:
    sizes = setting.sizes
    prepare_photos(setting.data, sizes)
    config, load, planned = _that_fits(setting, platform, fp8)
    with (
        state.process_group(platform),
        watch(config.guard.hang_seconds) as watchdog,
        state.model_parallel(config.parallel, config.seed) as groups,
    ):
        check_layout(config, 1)
        data = PreparedData(str(setting.data))
        tokenizer = data.tokenizer()
        job = LearningJob(config, platform, data, tokenizer)
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        trainee = build_trainee(config, chunks, groups, overlap=platform.overlaps_collectives)
        learning = job.work(trainee, Guard(config.guard, job.spike_sigma), watchdog, print)
        learning.begin(Place(0, 0))
        steps = [_taken(learning, platform, number) for number in range(sizes.warm_up_steps + sizes.timed_steps)]
        timed = steps[sizes.warm_up_steps :]

        def median(metric: str) -> float:
            return statistics.median(step[metric] for step in timed)

        yield Figure(STEP, median("tokens_per_second"), "tokens/s")
        yield Figure("operations of the model alone", median("tflops"), "TFLOP/s")
        yield Figure("a step", median("time/step"), "s")
        yield Figure("share of a step that waits for data", median("data_wait"), "ratio")
        yield Figure("tokens in a pack", load.tokens, "tokens")
        yield Figure("tiles in a step", median("tiles"), "tiles")
        yield Figure("recomputed operations, over the model's", _recomputed(config, load), "ratio")
        split = _taken(learning, platform, len(steps), is_logged=True)
        for part in PARTS:
            yield Figure(f"a step with its clocks: {part}", split.get(f"time/{part}", 0.0), "s")
        yield peak_memory(platform)
        yield Figure("peak memory that was planned", planned / GIBIBYTE, "GiB")
        _write_profile(setting, learning, platform, len(steps) + 1, fp8)


def _that_fits(setting: Setting, platform: Platform, fp8: str) -> tuple[RunConfig, Load, float]:
    """Return the config of a step that the device holds, what a pack is assumed to hold, and the bytes planned.

    The recipe recomputes nothing, since its ranks share the optimizer's state out. One GPU has all of it; where that
    leaves too little for the recipe's packs, shorter ones are nearer to the recipe than recomputation.
    """
    sizes = setting.sizes
    backend = "te" if platform.layer_backend == "te" else "local"
    tried = [*((tokens, "none") for tokens in sizes.pack_tokens), (sizes.pack_tokens[0], "full")]
    planned = 0.0
    for tokens, recompute in tried:
        config = setting.config(
            RECIPE,
            f"step-{fp8}",
            f"fp8.recipe={fp8 if sizes.has_fp8 else 'none'}",
            f"data.max_sequence_tokens={tokens}",
            f"train.global_batch={sizes.step_tokens // tokens}",
            f"train.recompute={recompute}",
        )
        load = assumed_load(config, LoadOptions())
        planned = worst_memory(config, 1, load, backend)[1].total
        print(f"packs of {tokens}, recompute={recompute}: {planned / GIBIBYTE:.1f} GiB planned", flush=True)
        if planned <= MEMORY_SHARE * platform.memory_bytes():
            return config, load, planned
    raise RuntimeError(f"{platform.describe()} does not hold the step: {planned / GIBIBYTE:.1f} GiB are planned")


def _taken(learning: Learning, platform: Platform, number: int, *, is_logged: bool = False) -> dict[str, float]:
    """Take a step as a run does, and return its log line."""
    results: list[Any] = []
    place = Place(number, number)
    taken = seconds(platform, lambda: results.append(learning.take_step(place, is_logged=is_logged)[0]))
    metrics = learning.metrics(Place(number + 1, number + 1), results[0])
    print(f"step {number + 1}: {taken:.3f} s, loss {metrics['loss']:.4f}", flush=True)
    return metrics


def _recomputed(config: RunConfig, load: Load) -> float:
    """Return what a step does twice, as a share of what it has to do once."""
    amounts = load.tokens, load.squared_tokens, load.tiles, load.trained_tokens
    once = training_flops(config.model, config.train.trained)
    return flops_done_again(config, load).of(*amounts) / once.of(*amounts)


def _write_profile(setting: Setting, learning: Learning, platform: Platform, number: int, fp8: str) -> None:
    """Write where a step's time goes, kernel by kernel."""
    with profile() as profiler:
        _taken(learning, platform, number)
    order = "self_device_time_total" if platform.has_own_memory else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS, max_name_column_width=80)
    name = "bf16" if fp8 == "none" else fp8
    (setting.results / f"step-{name}.profile.txt").write_text(table + "\n", encoding="utf-8")
