"""Every command that README, docs and scripts tell can be called like that, and each of `megatron-mm` is run for real.

tests/documented.py finds the commands and checks each as far as that takes no weights, cluster or GPU.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.run import measurable
from megatron_mm.cli import main
from megatron_mm.config.load import recipe_names
from tests.documented import ROOT, Lie, check, commands_of_page, documented

# Where each command is run for real, and the words there that call it. Those that are not here are run below.
RUN_IN = {
    "data prepare": ("tests/e2e/test_data.py", '"data", "prepare"'),
    "train": ("tests/e2e/test_data.py", '"train"'),
    "rl": ("tests/e2e/test_reinforce.py", 'command="rl"'),
    "import": ("tests/e2e/test_verify.py", '"convert_hf_to_megatron"'),
    "export": ("tests/e2e/test_verify.py", '"convert_megatron_to_hf"'),
    "verify": ("tests/e2e/test_verify.py", '"verify_checkpoint"'),
    "data digits": ("tests/e2e/test_quickstart.py", "examples/quickstart.sh"),
    "evaluate": ("tests/e2e/test_quickstart.py", "examples/quickstart.sh"),
    "doctor": ("tests/e2e/test_bad_input.py", '"doctor"'),
    "plan": ("tests/plan_page.py", "main("),
}
COMMANDS = documented()


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{command.place}: {command.text}" for command in COMMANDS])
def test_a_documented_command_can_be_called(command: object) -> None:
    check(command.text)  # pyright: ignore[reportAttributeAccessIssue]


def test_enough_is_found() -> None:
    assert len(COMMANDS) > 80
    assert {"README.md", "docs/data.md", "docs/weights.md", "examples/quickstart.sh", "slurm/bpo.sh"} <= {
        command.place for command in COMMANDS
    }


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("`megatron-mm shew mini/stage2`", "not understood"),
        ("`megatron-mm show mini/stage2 optim.lr=1e-4`", "is above optim.lr"),
        ("`megatron-mm train mini/stage7 run_dir=DIR`", "no recipe"),
        ("`megatron-mm train mini/bpo run_dir=DIR`", "is not for train"),
        ("`megatron-mm export RUN DIR --form r4b`", "not understood"),
        ("```\nmegatron-mm data inspect r4b/base data.path=DIR --html page.html\n```", "train: missing"),
        ("```\nmegatron-mm doctor\nfrobnicate --all\n```", "does not know"),
        ("```\nbash tools/setup_env.sh --cpu   # quick\n```", "knows no --cpu"),
        ("```\nNPROC=2 sbatch --nodes=2 slurm/stage1.sh run_dir=DIR\n```", "there is no slurm/stage1.sh"),
        ("```\nsbatch slurm/bpo.sh --recipe mini/stage1 run_dir=DIR\n```", "is not for rl"),
        ("`python benchmarks/run.py speed`", "no benchmark"),
        ("`python -m megatron_mm.train`", "does not know"),
        ("`python -m vllm.entrypoints.openai.api_server --model DIR --enforce-lazy`", "knows no --enforce-lazy"),
    ],
)
def test_a_planted_lie_is_found(page: str, reason: str) -> None:
    with pytest.raises(Lie, match=reason):  # noqa: PT012 (whichever of them it is)
        for command in commands_of_page(page):
            check(command)


def test_each_command_is_run_somewhere() -> None:
    documented_ones = {
        " ".join(words[1:3] if words[1] == "data" else words[1:2])
        for command in COMMANDS
        if (words := command.text.split())[0] == "megatron-mm" and not words[1].startswith("-")
    }
    for name, (file, words) in RUN_IN.items():
        assert words in (ROOT / file).read_text(encoding="utf-8"), f"{name} is not run in {file} any more"
    assert documented_ones - RUN_IN.keys() == {"show", "data inspect"}, "run it in a test, and say where"


def test_shown_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        if command.text.startswith("megatron-mm show"):
            assert main(command.text.split()[1:]) == 0
            assert "max_sequence_tokens" in capsys.readouterr().out
    assert main(["show"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name in recipe_names() if not name.endswith("/base")]


def test_data_are_looked_at_as_documented(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On data that none of the recipes was made for."""
    monkeypatch.chdir(tmp_path)
    lines = {command.text for command in COMMANDS if command.text.startswith("megatron-mm data inspect ")}
    assert len(lines) >= 3
    for line in lines:
        (tmp_path / "page.html").unlink(missing_ok=True)
        words = line.replace("DIR", str(digits)).replace("'ocr/*'", "digits/easy/*").split()
        assert main(words[1:]) == 0
        shown = capsys.readouterr().out
        assert "digits/easy/thinking" in shown
        assert (tmp_path / "page.html").is_file() == ("--html" in line)
        assert shown.endswith("done: page.html, which any browser shows\n") == ("--html" in line)


def test_the_version_is_told_everywhere_alike() -> None:
    result = subprocess.run([sys.executable, "-m", "megatron_mm.cli", "--version"], capture_output=True, text=True)
    told = re.fullmatch(r"megatron_mm (\S+)\n", result.stdout)
    assert told is not None
    assert f'version="{told[1]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"## {told[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_names_every_benchmark() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in measurable() if f"`{name}`" not in readme] == []


@pytest.mark.parametrize(("option", "what"), [("--check", "committed figures of"), (None, "benchmark")])
def test_a_benchmark_that_there_is_none_of(option: str | None, what: str) -> None:
    arguments = [*([option] if option else []), "graders", "nothing"]
    result = subprocess.run([sys.executable, "benchmarks/run.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"no {what} 'nothing'; there are " in result.stderr
    assert "Traceback" not in result.stderr
