"""The rules of the tree, each seen to fail when it is broken."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_mm"
MACHINE_NAMES = {"cpu", "cuda", "gloo", "nccl"}
MACHINE_QUESTIONS = {"is_available", "device_count", "is_cpu", "is_cuda"}


def _copy(tmp_path: Path) -> Path:
    """The package and its settings, to be broken."""
    shutil.copytree(PACKAGE, tmp_path / "megatron_mm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=tree, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True)


def _ruff(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ruff")), "check", "--no-cache", "megatron_mm"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_layers_hold(tmp_path: Path) -> None:
    result = _lint_imports(_copy(tmp_path))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("models/vision.py", "import megatron_mm.train.step", "Imports point down the layers"),
        ("models/vision.py", "import megatron_mm.data.plan", "Imports point down the layers"),
        ("config/schema.py", "import torch", "The config is read without torch"),
        ("planning/memory.py", "import torch", "The config is read without torch"),
        ("grading/keeper.py", "import torch", "The config is read without torch"),
        ("train/loop.py", "import vllm", "vLLM is imported by generation alone"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, file: str, line: str, contract: str) -> None:
    tree = _copy(tmp_path)
    path = tree / "megatron_mm" / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    result = _lint_imports(tree)
    assert result.returncode == 1
    (broken,) = (output for output in result.stdout.splitlines() if output.endswith("BROKEN"))
    assert broken.startswith(contract)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("train/loop.py", "import megatron.training"),
        ("train/loop.py", "from megatron.training import get_args"),
        ("models/vlm.py", "from megatron.core import parallel_state"),
    ],
)
def test_a_planted_megatron_import_is_caught(tmp_path: Path, file: str, line: str) -> None:
    tree = _copy(tmp_path)
    assert _ruff(tree).returncode == 0
    path = tree / "megatron_mm" / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert "TID251" in _ruff(tree).stdout


def _machine_branches(source: str) -> Iterator[int]:
    """Lines of branches that ask which machine this is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            conditions = [node.test]
        elif isinstance(node, ast.Match):
            conditions = [node.subject, *(case.pattern for case in node.cases)]
        elif isinstance(node, ast.comprehension):
            conditions = node.ifs
        else:
            continue
        for part in (part for condition in conditions for part in ast.walk(condition)):
            names = {getattr(part, "value", None)} if isinstance(part, ast.Constant) else {getattr(part, "attr", None)}
            if names & (MACHINE_NAMES | MACHINE_QUESTIONS):
                yield node.test.lineno if isinstance(node, ast.If | ast.IfExp) else part.lineno  # pyright: ignore


@pytest.mark.parametrize(
    "source",
    [
        "if device == 'cpu': pass",
        "x = 1 if torch.cuda.is_available() else 2",
        "y = [a for a in b if a.is_cuda]",
        "match name:\n    case 'cuda': pass",
    ],
)
def test_the_machine_scan_finds_planted_branches(source: str) -> None:
    assert list(_machine_branches(source))


def test_only_the_platform_asks_which_machine_this_is() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "parallel" / "platform" not in path.parents
        for line in _machine_branches(path.read_text(encoding="utf-8"))
    ]
    assert not found


def _unlisted(package: Path) -> list[str]:
    """Modules that their package's first lines do not name, where these list modules."""
    found = []
    for init in sorted(package.rglob("__init__.py")):
        first_lines = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        names = {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}
        if any(name in first_lines for name in names):
            found += [str(init.parent / name) for name in sorted(names) if name not in first_lines]
    return found


def test_packages_say_what_their_modules_are_for() -> None:
    assert not _unlisted(PACKAGE)


def test_a_module_that_is_not_listed_is_found(tmp_path: Path) -> None:
    package = _copy(tmp_path) / "megatron_mm"
    (package / "data" / "extra.py").touch()
    assert _unlisted(package) == [str(package / "data" / "extra.py")]
