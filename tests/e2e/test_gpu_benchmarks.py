"""benchmarks/gpu with --dry: everything that a GPU will be asked, in miniature; and what becomes of a crash."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.figure import Figure
from benchmarks.gpu.ratios import DECODING, STEP, ratios
from benchmarks.gpu.run import MEASUREMENTS, RATIOS, Measurement, measure_all, print_table
from benchmarks.gpu.setting import DRY, Setting
from benchmarks.run import RESULTS, ROOT

# Figures that have a bar: where they are, and what they say.
BARS = {
    ("step-bf16", "share of the bf16 ceiling"): (0.45, "at least"),
    ("sync", "weight sync"): (0.35, "at most"),
    (RATIOS, f"{STEP}, best FP8 recipe over bf16"): (1.2, "at least"),
    **{
        (RATIOS, f"{DECODING}, {number} sequences, with CUDA graphs over eager"): (2.0, "at least")
        for number in DRY.num_sequences
    },
}
# What a measurement cannot go without.
NAMES = {
    "ceilings": ["bf16 product of matrices", "fp8 product of matrices", "copy in the device's memory"],
    "sync": ["copy in the device's memory", "parameters", "weight sync", "weight sync without its check"],
    "bpo_step": ["a step", *(f"a step: {phase}" for phase in ("rollout", "score", "update", "exchange", "offload"))],
    **{
        f"step-{recipe}": [STEP, "operations of the model alone", "a step", "peak memory"]
        for recipe in ("bf16", "tensorwise", "blockwise", "delayed")
    },
    **{
        f"rollout-{kind}": [f"{DECODING}, {number} sequences" for number in DRY.num_sequences]
        for kind in ("eager", "graphs")
    },
}


def _written(results: Path) -> dict[str, list[Figure]]:
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in results.glob("*.json")}
    assert all(content["name"] == f"gpu/{name}" for name, content in files.items())
    assert all(content["machine"] and content["versions"]["torch"] for content in files.values())
    return {name: [Figure(**figure) for figure in content["figures"]] for name, content in files.items()}


def test_a_dry_run_takes_every_measurement(tmp_path: Path) -> None:
    before = sorted(RESULTS.rglob("*"))
    results = tmp_path / "results"
    command = [sys.executable, "benchmarks/gpu/run.py", "--dry", "--results", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-6000:]
    assert sorted(RESULTS.rglob("*")) == before
    written = _written(results)
    assert written.keys() == {RATIOS, *(name for name, one in MEASUREMENTS.items() if one.by_default)}
    rows = run.stdout[run.stdout.index("\n\n") :].splitlines()
    for name, figures in written.items():
        assert not [name for name, count in Counter(figure.name for figure in figures).items() if count > 1]
        for figure in figures:
            assert math.isfinite(figure.value), figure
            assert any(row.startswith(f"{name} ") and f"  {figure.name}  " in row for row in rows), figure
    found = {(name, figure.name): figure for name, figures in written.items() for figure in figures}
    assert {key: (one.bar, one.side) for key, one in found.items() if one.bar is not None} == BARS
    assert not [(name, figure) for name, figures in NAMES.items() for figure in figures if (name, figure) not in found]
    profiles = {file.name for file in results.glob("*.profile.txt")}
    assert profiles == {f"{name}.profile.txt" for name in written if name.startswith("step-")}


def test_what_crashes_or_hangs_is_named_and_the_others_still_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first one waits for what all are forked from.
    limits = {"well": 300.0, "raises": 300.0, "dies": 300.0, "hangs": 30.0, "well again": 300.0}
    chosen = {name: Measurement(f"tests.planted:{name.split()[0]}", seconds) for name, seconds in limits.items()}
    setting = Setting(sizes=DRY, work=tmp_path, results=tmp_path)
    outcomes = measure_all(chosen, setting, time.monotonic() + 600)
    outcomes |= {"late": measure_all({"late": chosen["well"]}, setting, time.monotonic())["late"]}
    print_table(outcomes, judge=True)
    said = capsys.readouterr().out
    problems = {name: outcome.problem for name, outcome in outcomes.items() if outcome.problem is not None}
    assert problems.keys() == {"raises", "dies", "hangs", "late"}
    assert "ValueError: the planted fault" in problems["raises"]
    assert "about to die" in problems["dies"]
    assert "took more than 30 s" in problems["hangs"]
    assert "no time was left" in problems["late"]
    assert all(f"{name} FAILED: {problem}" in said for name, problem in problems.items())
    # What was said before the end is kept.
    assert _written(tmp_path).keys() == {"well", "raises", "hangs", "well again"}


def test_a_ratio_without_one_of_its_sides_is_not_passed_over() -> None:
    fast, slow = [Figure(STEP, 3.0, "tokens/s")], [Figure(STEP, 2.0, "tokens/s")]
    figures, missing = ratios({"step-bf16": slow, "step-tensorwise": fast, "step-blockwise": []})
    assert (figures[-1].value, figures[-1].bar, missing) == (1.5, 1.2, [])
    assert ratios({"step-bf16": [], "step-tensorwise": fast}) == ([], ["step-bf16"])
    assert ratios({"step-bf16": slow, "step-tensorwise": []}) == ([], ["step-tensorwise"])
    assert ratios({"rollout-eager": [], "rollout-graphs": fast}) == ([], ["rollout-eager", "rollout-graphs"])
    # Nobody asked for the other side.
    assert ratios({"step-bf16": slow, "rollout-eager": []}) == ([], [])
