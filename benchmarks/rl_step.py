"""What a step of reinforcement learning costs beyond what it is for.

- Rollout: responses a second through rl/sampler.py, grading and all, against plain `vllm.LLM.generate` with the same
  prompts, pictures and seeds, in the same process; both begin with empty caches, they alternate, and the ratio is the
  median over pairs.
- Exchange: bytes a second into the engine's weights, against a copy of the same tensors in memory, of a model large
  enough that the bytes are what costs. Told apart: what loading into vLLM alone takes of whole tensors that lie ready
  in memory, and what comparing the weights takes afterwards.
- Step: the share of mini/bpo's steps that is not spent in drawing, forward and backward passes, or exchange, on two
  ranks, from its metrics.

The model is the quickstart's annealed one, but for the exchange.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.figure import Figure
from benchmarks.mini_rl import Arm, quickstart, reinforce
from benchmarks.run import ROOT
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.config.load import load_config
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Colocation, Engine, Sampling
from megatron_mm.grading.workers import Graders
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.rl.exchange import WeightExchange
from megatron_mm.rl.questions import Questions
from megatron_mm.rl.sampler import Sampler
from megatron_mm.train.initial import load_initial
from megatron_mm.weights.export import write_description
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table
from tests.ranks import run_on_ranks

RUN = ROOT / "runs" / "rl_step"
PAIRS = 7
STEPS = 12
DTYPE = torch.bfloat16
# 0.4 B parameters, 0.8 GB in bf16.
LARGE = (
    "model.language.hidden_size=1024",
    "model.language.ffn_hidden_size=3072",
    "model.language.num_layers=24",
    "model.language.num_heads=16",
    "model.language.num_kv_heads=8",
    "model.language.head_dim=64",
    "model.language.vocab_size=16384",
)


def measure() -> list[Figure]:
    """A few minutes."""
    start = quickstart()
    (rollout,) = run_on_ranks(_rollout, 1, start)
    (exchange,) = run_on_ranks(_exchange, 1, start)
    return [*rollout, *exchange, *_shares(start)]


def _rollout(start: Path) -> list[Figure]:
    config = load_config("mini/bpo", overrides=[f"data.path={start / 'data'}"])
    assert config.rl is not None
    data, platform = PreparedData(str(start / "data")), get_platform("cpu")
    tokenizer = data.tokenizer()
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        load_initial(config, start / "anneal", chunks)
        engine = Engine(start / "model", "bfloat16", config.rl.rollout.max_sequences, colocation=Colocation(1))
        exchange = WeightExchange(chunks, model_table(config.model), engine, platform)
        graders = Graders.of_config(config.rl.reward)
        questions = Questions(config, data, tokenizer)
        sampler = Sampler(engine, 1, questions, tokenizer, graders, 0)
        modes = (Mode.THINKING,) * 8 + (Mode.NON_THINKING,) * 8
        # Every pair has questions of its own.
        asked: list[tuple[Any, ...]] = []
        generate: Callable[..., Any] = engine._llm.generate

        def noted(*arguments: Any, **keywords: Any) -> Any:
            asked.append((arguments, keywords))
            return generate(*arguments, **keywords)

        engine._llm.generate = noted
        pairs, speeds = [], []
        for pair in range(PAIRS + 2):
            exchange()  # empties the caches
            began = time.monotonic()
            groups_of = sampler.draw(questions.rows(pair), modes, Sampling(64, 1.0), pair)
            ours = time.monotonic() - began
            exchange()
            arguments, keywords = asked[-1]
            began = time.monotonic()
            generate(*arguments, **keywords)
            pairs.append((ours, time.monotonic() - began))
            speeds.append(sum(len(one.drawn) for group in groups_of for one in group) / ours)
    warm = pairs[2:]  # the first answers of a process are slow
    return [
        Figure("rollout and grading", round(statistics.median(speeds[2:])), "tokens/s"),
        Figure(
            "rollout and grading, against LLM.generate alone",
            round(statistics.median(plain / ours for ours, plain in warm), 3),
            "ratio",
            0.9,
            "at least",
        ),
    ]


def _exchange(start: Path) -> list[Figure]:
    config = load_config("mini/bpo", overrides=list(LARGE))
    platform, tokenizer = get_platform("cpu"), PreparedData(str(start / "data")).tokenizer()
    with (
        tempfile.TemporaryDirectory() as folder,
        state.process_group(platform),
        state.model_parallel(config.parallel, 0) as groups,
    ):
        directory = Path(folder) / "model"
        write_description(directory, config.model, tokenizer, DTYPE)
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        table, engine = model_table(config.model), Engine(directory, "bfloat16", colocation=Colocation(1))
        exchange = WeightExchange(chunks, table, engine, platform)
        ready = [(name, tensor.clone()) for name, tensor in to_hf(chunks, table)]
        parameters = [parameter.detach() for chunk in chunks for parameter in chunk.parameters()]
        copies = [parameter.clone() for parameter in parameters]
        exchange()
        loads, floors, checks, plains, num_bytes = [], [], [], [], 0
        for _ in range(PAIRS):
            report = exchange()
            began = time.monotonic()
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.copy_(parameter)
            plains.append(time.monotonic() - began)
            began = time.monotonic()
            engine.load(iter(ready), engine.parts({n: tuple(t.shape) for n, t in ready}))
            floors.append(time.monotonic() - began)
            loads.append(report.load_seconds)
            checks.append(report.check_seconds)
            num_bytes = report.num_bytes
        moved = sum(parameter.nbytes for parameter in parameters)
    load, plain = statistics.median(loads), statistics.median(plains)
    ratios = [num_bytes / one / (moved / other) for one, other in zip(loads, plains, strict=True)]
    return [
        Figure("exchange", round(num_bytes / 2**20), "MiB"),
        Figure("exchange: into the engine", round(num_bytes / load / 1e9, 3), "GB/s"),
        Figure("copy of the same tensors", round(moved / plain / 1e9, 3), "GB/s"),
        Figure("exchange, against a copy", round(statistics.median(ratios), 3), "ratio", 0.3, "at least"),
        Figure("vLLM's loading alone, over the exchange", round(statistics.median(floors) / load, 2), "ratio"),
        Figure("comparing what arrived, over the exchange", round(statistics.median(checks) / load, 2), "ratio"),
    ]


def _shares(start: Path) -> list[Figure]:
    """Of the steps of a run, but for the first ones and those with held-out questions."""
    shutil.rmtree(RUN, ignore_errors=True)
    stages = f"rl.stages=[{{steps: {STEPS}, max_response_tokens: 64, group_size: 8}}]"
    given = (f"train.steps={STEPS}", "train.validate_every=null", stages)
    arm = Arm(RUN, "mini/bpo", start / "anneal", 0, given)
    reinforce(arm, 2)
    lines = arm.metrics()[2:]
    step = sum(line["time/step"] for line in lines)
    parts = ("rollout", "score", "update", "exchange", "batches", "other")
    seconds = {part: sum(line[f"time/{part}"] for line in lines) for part in parts}
    beyond = seconds["batches"] + seconds["other"]
    return [
        Figure("a step of mini/bpo on two ranks", round(step / len(lines), 3), "s"),
        *(Figure(f"share of a step: {part}", round(taken / step, 4), "share") for part, taken in seconds.items()),
        Figure("share of a step beyond rollout, passes and exchange", round(beyond / step, 4), "share", 0.05),
    ]
