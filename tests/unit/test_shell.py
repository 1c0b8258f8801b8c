"""The shell scripts: shellcheck finds nothing, and every job begins the same way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.config.load import load_config

ROOT = Path(__file__).parents[2]
JOBS = sorted(file for file in (ROOT / "slurm").glob("*.sh") if file.name != "common.sh")
EXAMPLES = sorted(file for file in (ROOT / "examples").glob("*.sh") if file.name != "help.sh")
COMMON_LINES = (
    "#SBATCH --ntasks-per-node=1",
    # The whole node: Slurm would otherwise give the one task of a node one core, and a core's share of the memory.
    "#SBATCH --exclusive",
    "#SBATCH --mem=0",
    "#SBATCH --requeue",
    "#SBATCH --open-mode=append",
    "#SBATCH --output=slurm/logs/%x-%j.log",
)


def _shellcheck(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("shellcheck")), "--external-sources", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shellcheck_finds_nothing() -> None:
    scripts = [file for folder in ("slurm", "examples", "tools", "tests") for file in (ROOT / folder).glob("*.sh")]
    assert len(scripts) > len(JOBS)
    result = _shellcheck(*scripts)
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_a_planted_fault(tmp_path: Path) -> None:
    script = tmp_path / "fault.sh"
    script.write_text("#!/usr/bin/env bash\nrm -rf $1/*\n", encoding="utf-8")
    assert "SC2086" in _shellcheck(script).stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_holds_no_more_than_its_needs_and_its_recipe(job: Path) -> None:
    lines = job.read_text(encoding="utf-8").splitlines()
    assert set(COMMON_LINES) <= set(lines)
    # A step of reinforcement learning draws thousands of responses before it can be saved.
    assert f"#SBATCH --signal=B:USR1@{1800 if job.stem == 'bpo' else 300}" in lines
    assert f"#SBATCH --job-name={job.stem}" in lines
    commands = [line for line in lines if line and not line.startswith("#")]
    assert len(commands) == 2
    match = re.fullmatch(r'launch (train|rl) ([a-z0-9_]+/[a-z0-9_]+) "\$@"', commands[1])
    assert match is not None
    assert (load_config(match[2]).rl is not None) == (match[1] == "rl")


def _program(file: Path, content: str) -> None:
    """An executable shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{content}\n", encoding="utf-8")
    file.chmod(0o755)


def _run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", *command], cwd=tree, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "last_call"),
    [
        ((), "hidden: -m pytest -m not slow and not gpu"),
        (("tests/unit", "-x"), "hidden: -m pytest tests/unit -x"),
        (("--slow",), "hidden: -m pytest -m slow and not gpu"),
        (("--gpu", "-x"), "0,1: -m pytest -m gpu tests/gpu -x"),
    ],
    ids=["all", "some", "slow", "gpu"],
)
def test_only_tests_of_the_gpu_see_it(tmp_path: Path, arguments: tuple[str, ...], last_call: str) -> None:
    """tests/run.sh among programs that say how they were called."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for script in ("tools/setup_env.sh", "tests/setup_slurm.sh"):
        _program(tmp_path / script, "")
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    for name in ("python", "ruff", "codespell", "lint-imports", "pyright"):
        _program(tmp_path / ".venv" / "bin" / name, 'echo "${CUDA_VISIBLE_DEVICES:-hidden}: $*" >>calls')
    result = _run(tmp_path, "tests/run.sh", *arguments, CUDA_VISIBLE_DEVICES="0,1")
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[-1].startswith(last_call)
    assert {call.split(":")[0] for call in calls} == {last_call.split(":")[0]}


@pytest.mark.parametrize(("gpus", "ranks", "mini_ranks"), [(0, None, 2), (1, 1, 1), (8, 8, 2)])
def test_an_example_starts_a_rank_for_each_gpu_that_torch_sees(
    tmp_path: Path, gpus: int, ranks: int | None, mini_ranks: int
) -> None:
    """CUDA_VISIBLE_DEVICES is torch's to read: nvidia-smi lists what it hides."""
    _program(tmp_path / "tools" / "setup_env.sh", "")
    _program(tmp_path / "examples" / "quickstart.sh", "mkdir -p runs/quickstart/model")
    for script in ("help.sh", "reinforce.sh"):
        shutil.copy(ROOT / "examples" / script, tmp_path / "examples")
    _program(tmp_path / "bin" / "nvidia-smi", "seq 16")
    _program(tmp_path / ".venv" / "bin" / "python", f"[[ $2 == *device_count* ]] && echo {gpus}")
    _program(tmp_path / ".venv" / "bin" / "megatron-mm", 'echo "$*"')
    script = ("examples/reinforce.sh", "r4b/bpo", "mini/bpo", "runs/start")
    result = _run(tmp_path, *script, "a=b")
    if ranks is None:
        assert result.returncode == 2
        assert "torch sees no GPU here (megatron-mm doctor says why)" in result.stderr
    else:
        assert result.stdout == f"rl r4b/bpo a=b --nproc {ranks}\n", result.stderr
    assert _run(tmp_path, *script, "--mini").stdout.endswith(f" --nproc {mini_ranks}\n")


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """The examples, among programs that only note that they were called."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    _program(tmp_path / "tools" / "setup_env.sh", "echo set up >>calls")
    for name in ("python", "megatron-mm"):
        _program(tmp_path / ".venv" / "bin" / name, f'echo "{name} $*" >>calls')
    return tmp_path


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--tiny", "--help"), ("--mini", "--help")], ids=" ".join)
def test_an_examples_help_sets_nothing_up_and_deletes_nothing(
    examples: Path, script: Path, arguments: tuple[str, ...]
) -> None:
    (examples / "runs" / "quickstart").mkdir(parents=True)
    (examples / "runs" / "quickstart-tiny").mkdir()
    result = _run(examples, f"examples/{script.name}", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"bash examples/{script.name}" in result.stdout
    assert "set -euo" not in result.stdout
    assert not (examples / "calls").exists()
    assert {path.name for path in (examples / "runs").iterdir()} == {"quickstart", "quickstart-tiny"}


@pytest.mark.parametrize(("arguments", "run"), [((), "quickstart"), (("--tiny",), "quickstart-tiny")])
def test_a_second_quickstart_deletes_only_when_it_is_told_to(
    examples: Path, arguments: tuple[str, ...], run: str
) -> None:
    kept = examples / "runs" / run / "an hour's work"
    kept.mkdir(parents=True)
    result = _run(examples, "examples/quickstart.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == f"quickstart: runs/{run} is there, from an earlier call; --force deletes it and begins anew\n"
    )
    assert kept.exists()
    assert not (examples / "calls").exists()
    result = _run(examples, "examples/quickstart.sh", *arguments, "--force")
    assert result.returncode == 0, result.stderr
    assert not kept.exists()
    assert "megatron-mm data digits" in (examples / "calls").read_text(encoding="utf-8")
    unknown = _run(examples, "examples/quickstart.sh", "--tyni")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "quickstart: unknown argument --tyni; --help lists what there is\n",
    )


@pytest.fixture
def gpu_machine(tmp_path: Path) -> Path:
    """tools/setup_env.sh where there is a GPU and a CUDA toolkit, with a Python whose pip only tells of itself."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_env.sh", tmp_path / "tools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    _program(tmp_path / "bin" / "nvidia-smi", "")
    # A header that it does not find, and where Python's and torch's are.
    _program(tmp_path / "bin" / "compiler", '! grep --quiet "<${LACKS:-nothing}>"')
    python = f"""case "$*" in
        "-m venv"*) mkdir -p .venv/bin && cp bin/a_python .venv/bin/python;;
        "-m pip"*) echo "$MAX_JOBS $CUDA_HOME $CPATH: $*" >>calls;;
        "-c import torch"*) exit 1;;
        *get_path*) echo "$HEADERS";;
        *) exec {sys.executable} "$@";;
    esac"""
    _program(tmp_path / "bin" / "a_python", python)
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "Python.h").touch()
    _program(tmp_path / "cuda" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (tmp_path / "cuda" / "include").mkdir()
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    return tmp_path


def _set_up(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {"CXX": "compiler", "HEADERS": str(tree / "headers"), "CUDA_HOME": str(tree / "cuda"), "PIP_FIND_LINKS": ""}
    whole |= {"PYTHON": "a_python", "MAX_JOBS": "", "CPATH": ""}
    result = _run(tree, "tools/setup_env.sh", **{**whole, **environment})
    assert result.returncode == 1, "there are no packages to import"
    return result


def test_what_transformer_engines_compilation_lacks_is_told_before_a_download(gpu_machine: Path) -> None:
    nowhere = str(gpu_machine / "nowhere")
    first, *lines = _set_up(gpu_machine, CXX="no-compiler", HEADERS=nowhere, CUDA_HOME=nowhere).stderr.splitlines()
    assert first == "setup: Transformer Engine is compiled here, which lacks"
    assert [line.strip() for line in lines] == [
        "a C++ compiler, no-compiler: on Debian install g++",
        f"{nowhere}/Python.h: on Debian install python3-dev",
        f"CUDA_HOME={nowhere} is no CUDA toolkit (bin/nvcc, include/cuda_runtime.h): unset it, for pip's",
    ]
    _program(gpu_machine / "cuda" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    assert "has CUDA 12.4, and torch 2.11 has 13: unset it, for pip's" in _set_up(gpu_machine).stderr
    (gpu_machine / "cuda" / "include" / "cuda_runtime.h").unlink()
    assert "cuda is no CUDA toolkit" in _set_up(gpu_machine).stderr
    assert not (gpu_machine / "calls").exists()


def test_transformer_engine_is_compiled_with_the_headers_of_torchs_packages(gpu_machine: Path) -> None:
    site = gpu_machine / "headers"
    result = _set_up(gpu_machine, CUDA_HOME="", MAX_JOBS="7")
    assert "setup: compiling Transformer Engine with MAX_JOBS=7 takes a while" in result.stdout
    torch, package = (gpu_machine / "calls").read_text(encoding="utf-8").splitlines()
    assert "torch==2.11.0 cuda-toolkit[nvcc,nvvm,crt]==13.0.2" in torch
    headers = ":".join(f"{site}/nvidia/{part}/include" for part in ("cu13", "cudnn", "nccl"))
    assert package.startswith(f"7 {site}/nvidia/cu13 {headers}: -m pip install --no-build-isolation")
    result = _set_up(gpu_machine, LACKS="cudnn.h")
    message = f"no cudnn.h in {gpu_machine / 'cuda'}/include or torch's packages ({site}/nvidia): name its directory"
    assert message in result.stderr
    jobs = re.search("MAX_JOBS=([0-9]+)", _set_up(gpu_machine).stdout)
    assert jobs is not None
    assert 1 <= int(jobs[1]) <= len(os.sched_getaffinity(0))


def test_with_a_wheel_of_transformer_engine_nothing_is_compiled(gpu_machine: Path) -> None:
    name = "transformer_engine_torch-2.11.0-{0}-{0}-linux_x86_64.whl"
    (gpu_machine / name.format("cp39")).touch()  # for another Python
    assert "no-compiler" in _set_up(gpu_machine, CXX="no-compiler", PIP_FIND_LINKS=str(gpu_machine)).stderr
    (gpu_machine / name.format(f"cp{sys.version_info[0]}{sys.version_info[1]}")).touch()
    result = _set_up(gpu_machine, CXX="no-compiler", PIP_FIND_LINKS=f"/else {gpu_machine}")
    assert "compil" not in result.stdout + result.stderr
    assert len((gpu_machine / "calls").read_text(encoding="utf-8").splitlines()) == 2


def test_the_contract_asks_for_a_python_that_is_not_there(gpu_machine: Path) -> None:
    result = _run(gpu_machine, "tools/setup_env.sh", "--gpu-contract", PYTHON312="false", HOME=str(gpu_machine))
    assert result.returncode == 1
    assert "Python 3.12, of which there is none here: install it" in result.stderr
    assert not (gpu_machine / ".cache").exists()


def test_what_an_installation_left_that_was_cut_off_is_not_taken_for_a_whole_one(gpu_machine: Path) -> None:
    (gpu_machine / ".venv").mkdir()
    (gpu_machine / ".venv" / "setup.stamp").write_text("of a whole one\n", encoding="utf-8")
    _set_up(gpu_machine)
    assert not (gpu_machine / ".venv" / "setup.stamp").exists()
