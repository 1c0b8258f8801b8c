"""What the benchmarks of reinforcement learning share: runs in miniature, two side by side, and their curves."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import ROOT

QUICKSTART = ROOT / "runs" / "quickstart"
NUM_QUESTIONS = 400


@dataclass(frozen=True, slots=True)
class Arm:
    """A run.

    Attributes:
        run_dir: of the run; RUN_DIR-model and RUN_DIR-report.json lie beside it.
        start: run that the weights are taken from.
    """

    run_dir: Path
    recipe: str
    start: Path
    seed: int
    overrides: tuple[str, ...] = ()

    def metrics(self) -> list[dict[str, Any]]:
        """One line a step."""
        lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """The responses of a step."""
        lines = (self.run_dir / "rollouts" / f"step_{step:08d}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def quickstart() -> Path:
    """The models and data that examples/quickstart.sh makes, made unless they are there."""
    if not (QUICKSTART / "report.json").exists():
        subprocess.run(["bash", "examples/quickstart.sh"], cwd=ROOT, check=True)
    return QUICKSTART


def side_by_side(work: Callable[[Arm], object], arms: Iterable[Arm]) -> None:
    """Do something with all of them, with two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, arms))


def learn(arm: Arm) -> None:
    """Make the run, unless it was exported already."""
    model = model_of(arm.run_dir)
    if model.exists():
        return
    reinforce(arm, 1)
    command("export", str(arm.run_dir), str(model))


def reinforce(arm: Arm, num_ranks: int) -> None:
    """Make the run."""
    given = (f"init_from={arm.start}", f"run_dir={arm.run_dir}", f"seed={arm.seed}", *arm.overrides)
    command("rl", arm.recipe, f"data.path={QUICKSTART / 'data'}", *given, "--nproc", str(num_ranks))


def model_of(run_dir: Path) -> Path:
    """Where a run's exported weights are."""
    return run_dir.with_name(f"{run_dir.name}-model")


def scores(model: Path) -> dict[tuple[str, str], dict[str, float]]:
    """What `megatron-mm evaluate` says of a model, by source and mode."""
    report = model.with_name(f"{model.name}-report.json")
    if not report.exists():
        command("evaluate", str(model), str(QUICKSTART / "data"), str(report), "--questions", str(NUM_QUESTIONS))
    lines = json.loads(report.read_text(encoding="utf-8"))
    return {(line["source"].removeprefix("digits/"), line["mode"]): line for line in lines}


def draw_curves(
    file: Path,
    rows: dict[str, str],
    arms: dict[str, list[Arm]],
    place: Callable[[Arm, dict[str, Any]], float],
    unit: str,
    before: dict[str, float] | None = None,
) -> None:
    """Draw metrics of held-out questions: a field for each of `rows`, a line a run, a colour for each kind of run.

    Args:
        rows: what to call it -> the metric.
        arms: kind -> its runs.
        place: of a line of metrics on the horizontal axis.
        unit: of that axis.
        before: values of the metrics where the runs began.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Text stays text, and the same figures make the same file.
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": file.name, "font.size": 9})
    figure, fields = pyplot.subplots(1, len(rows), figsize=(3 * len(rows), 2.6), sharex=True, sharey=True)
    for field, (title, metric) in zip(fields, rows.items(), strict=True):
        for colour, (kind, runs) in enumerate(arms.items()):
            for number, run in enumerate(runs):
                points = [] if before is None else [(0.0, before[metric])]
                points += [(place(run, line), line[metric]) for line in run.metrics() if metric in line]
                label = kind if number == 0 else None
                field.plot(*zip(*points, strict=True), color=f"C{colour}", marker=".", alpha=0.7, label=label)
        field.set(title=title, xlabel=unit, ylim=(-0.05, 1.05))
    fields[0].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def command(*arguments: str) -> None:
    """Run megatron-mm."""
    subprocess.run([sys.executable, "-m", "megatron_mm.cli", *arguments], cwd=ROOT, check=True)
