"""The tables of docs/plan.md are what the command prints; `python -m tests.plan_page` writes them anew."""

import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from megatron_mm.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
_TABLE = re.compile(r"```\n\$ megatron-mm (plan [^\n]*)\n.*?```\n", re.DOTALL)


def renewed(text: str) -> str:
    """The page with every table as the command prints it now."""
    return _TABLE.sub(lambda found: f"```\n$ megatron-mm {found[1]}\n{output(found[1])}```\n", text)


def output(command: str) -> str:
    """What a command prints, and its exit code where it refuses."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as refused:
        code = main(shlex.split(command))
    return printed.getvalue() + (f"{refused.getvalue()}exit code {code}\n" if code else "")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
