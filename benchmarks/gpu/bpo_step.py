"""A step of R-4B's bi-mode policy optimization at full size on one GPU, split into its phases."""

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.figure import Figure
from benchmarks.gpu.photos import prepare_photos
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import peak_memory, seconds
from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform, get_platform
from megatron_mm.parallel.watchdog import watch
from megatron_mm.rl.job import ReinforceJob
from megatron_mm.rl.practice import Practice
from megatron_mm.rl.report import ROLLOUTS
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.guard import Guard
from megatron_mm.train.run import Place

# Of a step's metrics, time/...: docs/rl.md.
PHASES = ("rollout", "batches", "score", "update", "exchange", "offload", "other")


def measure(setting: Setting) -> Iterator[Figure]:
    """Yield the figures of the last step of a short run; in the first one kernels are compiled."""
    platform = get_platform(setting.sizes.platform)
    prepare_photos(setting.data, setting.sizes)
    config = setting.config("r4b/bpo", "bpo_step")
    with (
        state.process_group(platform),
        watch(config.guard.hang_seconds) as watchdog,
        state.model_parallel(config.parallel, config.seed) as groups,
    ):
        data = PreparedData(str(setting.data))
        tokenizer = data.tokenizer()
        job = ReinforceJob(config, platform, data, tokenizer)
        print(job.describe(), flush=True)
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        job.look_at_initial_weights(chunks)
        trainee = build_trainee(config, chunks, groups, overlap=platform.overlaps_collectives)
        practice = job.work(trainee, Guard(config.guard, job.spike_sigma), watchdog, print)
        practice.begin(Place(0, 0))
        line = [_step(practice, platform, number) for number in range(config.train.steps)][-1]
        yield Figure("a step", line["time/step"], "s")
        for phase in PHASES:
            yield Figure(f"a step: {phase}", line.get(f"time/{phase}", 0.0), "s")
        yield Figure("responses", line["responses"], "responses")
        yield Figure("tokens generated", line["tokens"], "tokens")
        yield Figure("tokens/s of a step", line["tokens"] / line["time/step"], "tokens/s")
        yield Figure("tokens/s of its rollouts", line["tokens"] / line["time/rollout"], "tokens/s")
        yield Figure("difference of log-probabilities, mean", line["logprob_difference/mean"], "nats")
        yield peak_memory(platform)


def _step(practice: Practice, platform: Platform, number: int) -> dict[str, float]:
    """Take a step as a run does; return its log line, and how much was generated in it."""
    results: list[Any] = []
    place = Place(number, number)
    seconds(platform, lambda: results.append(practice.take_step(place, is_logged=True)[0]))
    line = practice.metrics(Place(number + 1, number + 1), results[0])
    print(f"step {number + 1}: {line}", flush=True)
    file = practice.config.run_dir / ROLLOUTS / f"step_{number + 1:08d}.jsonl"
    rollouts = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    return {**line, "responses": len(rollouts), "tokens": sum(rollout["tokens"] for rollout in rollouts)}
