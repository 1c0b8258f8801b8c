"""Measures what a machine with a GPU reaches, prints a table, and writes benchmarks/results/gpu/NAME.json.

    python benchmarks/gpu/run.py               everything, on one GPU, in at most 10 minutes
    python benchmarks/gpu/run.py NAME...       some of it
    python benchmarks/gpu/run.py --dry         the same code with tiny shapes on the CPU; nothing is kept

Each measurement runs in a process of its own with a limit of time, so that one that crashes or hangs costs no other.
docs/gpu.md says what each figure means. Exit code 1 where a measurement failed or, on a GPU, a figure falls short of
its bar.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.figure import Figure  # noqa: E402
from benchmarks.gpu.child import DEVICE, DONE, run_measurement  # noqa: E402
from benchmarks.gpu.ratios import ratios  # noqa: E402
from benchmarks.gpu.setting import DRY, GPU, Setting  # noqa: E402
from benchmarks.run import RESULTS, described  # noqa: E402

LOG_LINES = 8
RATIOS = "ratios"


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something that is measured in one process.

    Attributes:
        target: "module:function", see child.py.
        seconds: that it may take.
        by_default: whether it runs where no names are given.
    """

    target: str
    seconds: float
    by_default: bool = True


# In this order: what the others are compared with first, then what has bars.
MEASUREMENTS = {
    "ceilings": Measurement("benchmarks.gpu.ceilings:measure", 60),
    "step-bf16": Measurement("benchmarks.gpu.step:bf16", 150),
    "step-tensorwise": Measurement("benchmarks.gpu.step:tensorwise", 120),
    "sync": Measurement("benchmarks.gpu.sync:measure", 120),
    "rollout-graphs": Measurement("benchmarks.gpu.rollout:graphs", 150),
    "rollout-eager": Measurement("benchmarks.gpu.rollout:eager", 150),
    "step-blockwise": Measurement("benchmarks.gpu.step:blockwise", 120),
    "step-delayed": Measurement("benchmarks.gpu.step:delayed", 120),
    "bpo_step": Measurement("benchmarks.gpu.bpo_step:measure", 180),
    "step-mxfp8": Measurement("benchmarks.gpu.step:mxfp8", 120, by_default=False),  # Blackwell
}
# Forks of one process that has imported them need not import them again.
PRELOADED = ["benchmarks.gpu.step", "benchmarks.gpu.bpo_step", "megatron_mm.weights.export"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a measurement.

    Attributes:
        figures: that it said before it ended.
        problem: why it did not end well, with the last lines of its log; None where it did.
        device: that it ran on; None where it did not come so far.
    """

    figures: list[Figure]
    seconds: float
    problem: str | None
    device: str | None = None


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--minutes", type=float, default=10, help="for everything together (default %(default)g)")
    parser.add_argument("--results", type=Path, help="directory for the figures (default benchmarks/results/gpu)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(MEASUREMENTS))
    if unknown:
        parser.error(f"no measurement is called {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    chosen = {
        name: measurement
        for name, measurement in MEASUREMENTS.items()
        if (name in options.names if options.names else measurement.by_default)
    }
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        # Logs and data set of a real run stay where they can be looked at.
        work = Path(scratch) if options.dry else ROOT / "runs" / "gpu"
        results = options.results or (Path(scratch) / "results" if options.dry else RESULTS / "gpu")
        for directory in (work, results):
            directory.mkdir(parents=True, exist_ok=True)
        sizes = DRY if options.dry else GPU
        outcomes = measure_all(chosen, Setting(sizes=sizes, work=work, results=results), deadline)
    print_table(outcomes, judge=not options.dry)
    failed = any(outcome.problem is not None for outcome in outcomes.values())
    short = not all(figure.holds for outcome in outcomes.values() for figure in outcome.figures)
    return int(failed or (short and not options.dry))


def measure_all(chosen: Mapping[str, Measurement], setting: Setting, deadline: float) -> dict[str, Outcome]:
    """Run measurements one after the other, and write each one's figures as it ends.

    Args:
        deadline: of time.monotonic(); what has not begun by then is not begun, and what runs is ended.
    """
    outcomes = {}
    for name, measurement in chosen.items():
        print(f"{name} ...", end="", flush=True)
        outcome = _measured(name, measurement, setting, deadline)
        print(f" {outcome.seconds:.0f} s{'' if outcome.problem is None else ': FAILED'}", flush=True)
        outcomes[name] = outcome
        _write(setting.results, name, outcome)
    figures, missing = ratios({name: outcome.figures for name, outcome in outcomes.items()})
    problem = f"cannot be computed without {', '.join(missing)}" if missing else None
    device = next((outcome.device for outcome in outcomes.values() if outcome.device is not None), None)
    outcomes[RATIOS] = Outcome(figures=figures, seconds=0, problem=problem, device=device)
    _write(setting.results, RATIOS, outcomes[RATIOS])
    return outcomes


def _measured(name: str, measurement: Measurement, setting: Setting, deadline: float) -> Outcome:
    """Run a measurement in a process of its own."""
    began = time.monotonic()
    allowed = min(measurement.seconds, deadline - began)
    if allowed <= 0:
        return Outcome(figures=[], seconds=0, problem="not begun: no time was left; name it to measure it alone")
    file, log = setting.work / f"{name}.jsonl", setting.work / f"{name}.log"
    for old in (file, log):
        old.unlink(missing_ok=True)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context: Any = multiprocessing.get_context(setting.sizes.start_method)
    process = context.Process(target=run_measurement, args=(measurement.target, setting, file, log))
    process.start()
    process.join(allowed)
    hangs = process.is_alive()
    # With the processes that it has started and may have left running.
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    device = next((line[DEVICE] for line in lines if DEVICE in line), None)
    figures = [Figure(**line) for line in lines if DEVICE not in line and DONE not in line]
    problem = None
    if not any(DONE in line for line in lines):
        how = f"took more than {allowed:.0f} s" if hangs else f"ended with exit code {process.exitcode}"
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
        problem = "\n".join([f"{how}; the last lines of {log}:", *last])
    return Outcome(figures=figures, seconds=time.monotonic() - began, problem=problem, device=device)


def _write(results: Path, name: str, outcome: Outcome) -> None:
    if outcome.figures:
        result = described(f"gpu/{name}", f"python benchmarks/gpu/run.py {'' if name == RATIOS else name}".strip())
        result["machine"] += f", {outcome.device}"
        result["figures"] = [asdict(figure) for figure in outcome.figures]
        (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_table(outcomes: Mapping[str, Outcome], *, judge: bool) -> None:
    """Print every figure with its bar and verdict, and what failed with the end of its log.

    Args:
        judge: whether bars are held against the figures; those of a dry run say nothing.
    """
    rows = [("", "figure", "value", "", "bar", "")]
    for name, outcome in outcomes.items():
        rows += [(name, *_cells(figure, judge)) for figure in outcome.figures]
        if outcome.problem is not None:
            rows.append((name, "FAILED, see below", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, outcome in outcomes.items():
        if outcome.problem is not None:
            print(f"\n{name} FAILED: {outcome.problem}")


def _cells(figure: Figure, judge: bool) -> Iterable[str]:
    bar = "" if figure.bar is None else f"{figure.side} {figure.bar:g}"
    verdict = "" if figure.bar is None else ("ok" if figure.holds else "SHORT")
    return figure.name, f"{figure.value:.4g}", figure.unit, bar, verdict if judge or not bar else "not judged"


if __name__ == "__main__":
    sys.exit(main())
