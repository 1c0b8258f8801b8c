"""The shipped recipes say what the papers say, and each starts from what another one leaves.

Values are those of R-4B (arXiv 2508.21113v2, Table I and Table 1) and of Vision-R1 (arXiv 2503.06749v4, and train.yaml
of its repository); docs/recipes.md lists them beside our own defaults.
"""

import fnmatch
import functools
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.config.load import RECIPES, load_config, recipe_names
from megatron_mm.config.schema import RunConfig, StageConfig

STAGES = [name for name in recipe_names() if not name.endswith("/base")]
# Recipes whose weights come from elsewhere: none (random), or a conversion that a comment in the recipe spells out.
STARTS: dict[str, Path | None] = {"mini/language": None, "r4b/stage1": Path("runs/r4b/start")}
EVERYTHING = {"vision", "projector", "language", "embeddings"}
# Items of R-4B's Table 1, non-reasoning and reasoning. The Math/K12 row's total is a misprint, these sum up.
TABLE_1 = {
    "general": (1_351_060, 1_365_693),
    "math": (1_908_486, 1_821_412),
    "code": (643_323, 161_085),
    "chart": (1_351_060, 1_088_858),
    "ocr": (1_366_849, 225_146),
    "grounding": (280_740, 148_710),
    "caption": (1_166_676, 133_741),
    "knowledge": (928_190, 359_778),
    "text": (1_875_174, 190_787),
}


def _stages(*stages: tuple[int, int, int]) -> tuple[StageConfig, ...]:
    return tuple(
        StageConfig(steps=steps, max_response_tokens=tokens, group_size=size) for steps, tokens, size in stages
    )


PAPER: list[tuple[str, str, Any, str]] = [
    ("r4b/stage1", "train.trained", {"projector"}, "R-4B Table I"),
    ("r4b/stage1", "train.global_batch", 512, "R-4B Table I"),
    ("r4b/stage1", "optim.schedule", "cosine", "R-4B Table I"),
    ("r4b/stage1", "optim.lr", 1e-3, "R-4B Table I"),
    ("r4b/stage1", "data.packed", True, "R-4B Table I"),
    ("r4b/stage1", "data.max_sequence_tokens", 8192, "R-4B Table I"),
    ("r4b/stage2", "train.trained", {"vision", "projector"}, "R-4B Table I"),
    ("r4b/stage2", "train.global_batch", 2048, "R-4B Table I"),
    ("r4b/stage2", "optim.schedule", "cosine", "R-4B Table I"),
    ("r4b/stage2", "optim.lr", 4e-5, "R-4B Table I"),
    ("r4b/stage2", "optim.min_lr", 4e-6, "R-4B Table I"),
    ("r4b/stage2", "data.packed", True, "R-4B Table I"),
    ("r4b/stage2", "data.max_sequence_tokens", 16384, "R-4B Table I"),
    (
        "r4b/stage2",
        "data.blend",
        {"ocr/*": 31.8, "knowledge/*": 33.7, "caption/*": 26.3, "math/*": 8.2},
        "R-4B Table I",
    ),
    ("r4b/stage3", "train.trained", EVERYTHING, "R-4B Table I"),
    ("r4b/stage3", "train.global_batch", 1024, "R-4B Table I"),
    ("r4b/stage3", "optim.schedule", "constant", "R-4B Table I"),
    ("r4b/stage3", "optim.lr", 4e-5, "R-4B Table I"),
    ("r4b/stage3", "optim.modules.vision.lr", 4e-6, "R-4B Table I"),
    ("r4b/stage3", "optim.modules.projector.lr", 4e-6, "R-4B Table I"),
    ("r4b/stage3", "data.packed", True, "R-4B Table I"),
    ("r4b/stage3", "data.max_sequence_tokens", 16384, "R-4B Table I"),
    ("r4b/stage3", "data.rendering", "pretrain", "R-4B appendix B.2: the empty thought is masked"),
    ("r4b/stage3", "data.blend.text/*", 13.3, "R-4B appendix B.2"),
    ("r4b/stage3", "data.blend.math/*", 22.9, "R-4B appendix B.2"),
    ("r4b/anneal", "train.trained", EVERYTHING, "R-4B Table I"),
    ("r4b/anneal", "train.global_batch", 1024, "R-4B Table I"),
    ("r4b/anneal", "optim.schedule", "cosine", "R-4B Table I"),
    ("r4b/anneal", "optim.lr", 4e-5, "R-4B Table I"),
    ("r4b/anneal", "optim.min_lr", 4e-6, "R-4B Table I"),
    ("r4b/anneal", "optim.modules.vision.lr", 4e-6, "R-4B Table I"),
    ("r4b/anneal", "optim.modules.projector.lr", 4e-6, "R-4B Table I"),
    ("r4b/anneal", "data.packed", True, "R-4B Table I"),
    ("r4b/anneal", "data.max_sequence_tokens", 16384, "R-4B Table I"),
    *[
        ("r4b/anneal", f"data.blend.{topic}*/{mode}", items, "R-4B Table 1")
        for topic, row in TABLE_1.items()
        for mode, items in zip(("non_thinking", "thinking"), row, strict=True)
    ],
    ("vision_r1/cold_start", "train.trained", {"language", "embeddings"}, "train.yaml, LLaMA-Factory's defaults"),
    ("vision_r1/cold_start", "train.global_batch", 32, "train.yaml"),
    ("vision_r1/cold_start", "train.steps", 2 * 260_994 // 32, "train.yaml: 2 epochs of the released samples"),
    ("vision_r1/cold_start", "optim.schedule", "cosine", "train.yaml"),
    ("vision_r1/cold_start", "optim.lr", 5e-6, "train.yaml"),
    ("vision_r1/cold_start", "optim.warmup_steps", round(0.05 * 16_312), "train.yaml"),
    ("vision_r1/cold_start", "optim.weight_decay", 0.0, "train.yaml, LLaMA-Factory's default"),
    ("vision_r1/cold_start", "data.packed", False, "train.yaml, LLaMA-Factory's default"),
    ("vision_r1/cold_start", "data.max_sequence_tokens", 16384, "train.yaml"),
    ("vision_r1/cold_start", "data.rendering", "cold_start", "Vision-R1 Figs. 4, 6, 7"),
    ("r4b/bpo", "rl.algorithm", "bpo", "R-4B section 3"),
    ("r4b/bpo", "rl.by_deviation", True, "R-4B section 3.1: advantages as in GRPO"),
    ("r4b/bpo", "rl.objective.kl", "loss", "R-4B eq. 1"),
    ("r4b/grpo", "rl.algorithm", "grpo", "R-4B Fig. 10"),
    ("vision_r1/ptst", "rl.stages", _stages((100, 4096, 16), (100, 8192, 8)), "Vision-R1 appendix A"),
    ("vision_r1/long", "rl.stages", _stages((300, 16384, 4)), "Vision-R1 Table 3"),
    ("vision_r1/zero", "rl.stages", _stages((300, 4096, 16)), "Vision-R1 appendix A"),
    ("vision_r1/ptst", "rl.reward.name", "hfrrf", "Vision-R1 section 3.4"),
    ("vision_r1/zero", "rl.reward.format_weight", 0.5, "Vision-R1: 1:1"),
    ("vision_r1/zero", "rl.reward.accuracy_weight", 0.5, "Vision-R1: 1:1"),
    *[
        (f"vision_r1/{recipe}", f"rl.{field}", value, "Vision-R1 eq. 1 and 2")
        for recipe in ("ptst", "long", "zero")
        for field, value in (
            ("algorithm", "grpo"),
            ("objective.clip_low", 0.2),
            ("objective.clip_high", 0.2),
            ("objective.kl", "loss"),
            ("objective.kl_estimator", "k3"),
            ("objective.kl_coef", 1e-2),
            ("reward.format", "vision_r1"),
        )
    ],
    *[
        (f"{recipe}", f"model.{field}", value, source)
        for recipe in (
            "r4b/stage1",
            "r4b/stage2",
            "r4b/stage3",
            "r4b/anneal",
            "r4b/bpo",
            "vision_r1/cold_start",
            "vision_r1/ptst",
        )
        for field, value, source in (
            ("vision.preset", "siglip2-so400m-patch14-384", "R-4B appendix B.1 and README"),
            ("language.preset", "qwen3-4b", "R-4B appendix B.1"),
        )
    ],
]


def _value(config: RunConfig, path: str) -> Any:
    """The value at a path; the names of a blend may hold anything."""
    first, _, rest = path.partition(".")
    if first == "data" and rest.startswith("blend."):
        return config.data.blend[rest.removeprefix("blend.")]
    value: Any = config
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return set(value) if path == "train.trained" else value


@functools.cache
def _config(recipe: str) -> RunConfig:
    return load_config(recipe)


def _id(value: Any) -> str:
    # A set is written in another order by every process, and those that share the tests out compare their names.
    return str(sorted(value) if isinstance(value, set) else value)[:40]


@pytest.mark.parametrize(("recipe", "path", "value", "source"), PAPER, ids=_id)
def test_a_recipe_says_what_its_paper_says(recipe: str, path: str, value: Any, source: str) -> None:
    assert _value(_config(recipe), path) == value, source


def test_every_stage_starts_from_the_run_of_another_or_from_a_documented_import() -> None:
    run_dirs = {recipe: _config(recipe).run_dir for recipe in STAGES}
    assert len(set(run_dirs.values())) == len(run_dirs)
    for recipe in STAGES:
        assert run_dirs[recipe] == Path("runs") / recipe
        start = _config(recipe).init_from
        if recipe in STARTS:
            assert start == STARTS[recipe]
            text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
            assert start is None or f"megatron-mm import {start} " in text
        else:
            assert start in run_dirs.values(), recipe


def test_no_recipe_starts_from_itself() -> None:
    starts = {_config(recipe).run_dir: _config(recipe).init_from for recipe in STAGES}
    for run_dir in starts:
        seen, start = [run_dir], starts[run_dir]
        while start in starts:
            assert start not in seen, seen
            seen.append(start)
            start = starts[start]


def test_the_steps_are_the_tokens_of_the_stage_over_those_of_a_batch() -> None:
    per_sample = 145e9 / 37e6  # stage 3's, docs/recipes.md
    for recipe, samples in (("stage1", 808e3), ("stage2", 25e6), ("stage3", 37e6), ("anneal", 16_366_767)):
        config = _config(f"r4b/{recipe}")
        tokens = config.train.global_batch * config.data.max_sequence_tokens * config.train.steps
        assert tokens == pytest.approx(samples * per_sample, rel=1e-3)
        assert config.optim.warmup_steps == pytest.approx(0.03 * config.train.steps, abs=0.5)


@pytest.mark.parametrize(
    "name", ["{topic}/thinking", "{topic}/non_thinking", "{topic}/a/b/thinking", "{topic}/a/non_thinking"]
)
def test_every_part_of_the_annealing_mix_falls_to_one_weight(name: str) -> None:
    blend = _config("r4b/anneal").data.blend
    for topic, (plain, reasoned) in TABLE_1.items():
        part = name.format(topic=topic)
        (weight,) = (weight for pattern, weight in blend.items() if fnmatch.fnmatchcase(part, pattern))
        assert weight == (plain if part.endswith("/non_thinking") else reasoned)


def test_the_mini_cold_start_is_two_epochs_of_the_miniature_data() -> None:
    # `megatron-mm data digits` makes 12,000 pictures, each with one easy and one hard question.
    train = _config("mini/cold_start").train
    assert train.steps * train.global_batch == 2 * 2 * 12_000
