"""What the tests on a GPU measure, as a table at the end and in benchmarks/results/gpu/tests.json."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.run import RESULTS, described

_MEASURED, _ON_GPU = "measured", "on GPU"
Measured = Callable[[str, float, float], None]


@pytest.fixture
def measured(record_property: Callable[[str, Any], None]) -> Measured:
    """Note a measured value, and fail unless it is at most a limit: `measured(name, value, limit)`."""

    def note(name: str, value: float, limit: float) -> None:
        record_property(_MEASURED, [name, value, limit])
        assert value <= limit, f"{name}: {value:.4g} is above {limit:.4g}"

    return note


@pytest.fixture(autouse=True)
def _told_apart(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """Have the report of a test on a GPU say so; its keywords cannot, since the directory's name is one of them."""
    if request.node.get_closest_marker("gpu") is not None:
        record_property(_ON_GPU, True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, and write it where the tests ran on a GPU."""
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if (_ON_GPU, True) in getattr(report, "user_properties", ())
    ]
    rows = [
        {
            "test": report.nodeid.removeprefix("tests/gpu/"),
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "measured": [value for name, value in report.user_properties if name == _MEASURED],
        }
        for report in reports
        if report.when == "call" or report.failed
    ]
    if not rows:
        return
    terminalreporter.section("measured on this GPU")
    for row in rows:
        terminalreporter.write_line(f"{row['outcome']:6}  {row['seconds']:6.1f} s  {row['test']}")
        for name, value, limit in row["measured"]:
            terminalreporter.write_line(f"{'':18}{name}: {value:.4g}, at most {limit:.4g}")
    result = described("gpu/tests", "python -m pytest -m gpu tests/gpu") | {"tests": rows}
    (RESULTS / "gpu").mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu" / "tests.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
