"""The commands that README, docs and the first lines of scripts tell, and what can be checked of each without a GPU.

`check` takes the words of one and raises `Lie` where the command could not do what it says: a script, an option, a
recipe or a setting that is not there. A command of a kind that is not known here is a lie as well, so that whoever
documents one says how it is to be checked.
"""

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.run import committed, measurable
from megatron_mm.cli import parse_arguments
from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/*.md")
# Whose first lines tell how they are called.
SCRIPTS = ("examples/*.sh", "slurm/*.sh", "tools/*.sh", "tests/run.sh", "benchmarks/run.py", "benchmarks/gpu/run.py")
TOOLS = {
    "convert_hf_to_megatron": ("import",),
    "convert_megatron_to_hf": ("export",),
    "prepare_data": ("data", "prepare"),
    "verify_checkpoint": ("verify",),
}
# What begins a command. In a block of commands every line has to begin with one of them.
PROGRAMS = (
    "megatron-mm", "bash", "sbatch", "srun", "python", "python3", "torchrun", "vllm", "wandb", "source", "cd", "export",
)  # fmt: skip
# Lines that are a shell's, or another program's whose options are checked here word for word.
SHELL = {
    "source .venv/bin/activate",
    "cd CHECKOUT",
    'source "$SLURM_SUBMIT_DIR/slurm/common.sh"',
    "srun --container-image",
    "srun --kill-on-bad-exit",
    "python3 -m pip install --no-index --no-deps --no-compile --target /tmp/site WHEELS/*.whl",
}
# A setting's value that stands for the reader's own: it need not be a value.
_PLACEHOLDER = re.compile(r"(DIR|RUN|\.\.\.)")
_ENVIRONMENT = re.compile(r"[A-Z_0-9]+=\S*")


class Lie(Exception):
    """A documented command cannot be called like that; says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command and where it is documented."""

    place: str
    text: str


def documented() -> list[Command]:
    """Return the commands of all pages and scripts, each text of a file once."""
    found = {}
    for pattern in PAGES:
        for file in sorted(ROOT.glob(pattern)):
            for text in commands_of_page(file.read_text(encoding="utf-8")):
                found[file.relative_to(ROOT), text] = None
    for pattern in SCRIPTS:
        for file in sorted(ROOT.glob(pattern)):
            for text in _usage_of(file.read_text(encoding="utf-8")):
                found[file.relative_to(ROOT), text] = None
    return [Command(place=str(file), text=text) for file, text in found]


def commands_of_page(page: str) -> Iterator[str]:
    """Yield the commands in the fenced blocks of a page, and those between back quotes that have arguments.

    A block holds commands if its first line begins with one; after `$ ` its other lines are what the command prints.
    """
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        if language in ("yaml", "python") or not lines:
            continue
        if lines[0].startswith("$ "):
            yield from (line.removeprefix("$ ") for line in lines if line.startswith("$ "))
        elif language in ("bash", "sh") or _begins_command(lines[0]):
            yield from (line.partition(" # ")[0].strip() for line in lines)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        text = " ".join(span.split())
        if _begins_command(text) and " " in text:
            yield text


def _begins_command(text: str) -> bool:
    words = [word for word in text.split() if not _ENVIRONMENT.fullmatch(word)]
    return bool(words) and words[0] in PROGRAMS


def _usage_of(script: str) -> Iterator[str]:
    """Yield the commands that the first lines of a script tell, as far as the explanation behind two spaces."""
    first_lines = re.match(r'(?:#.*\n|"""(?:.|\n)*?""")*', script)
    assert first_lines is not None
    for line in first_lines[0].splitlines():
        match = re.match(r"(?:#   |    )(\S.*?)(?:  .*)?$", line)
        if match is not None and _begins_command(match[1]):
            yield match[1]


def check(command: str) -> None:
    """Raise `Lie` if a command cannot be called as it is written."""
    if command in SHELL or command.startswith("export "):
        return
    # What stands for other arguments says nothing; nor does what may be left out.
    words = [word for word in shlex.split(command) if word not in ("...", "[overrides]", "[OVERRIDES]", "PYTEST_ARGS")]
    while words and _ENVIRONMENT.fullmatch(words[0]):
        del words[0]
    for beginning, checker in _CHECKERS.items():
        if " ".join(words).startswith(beginning):
            checker(words[len(beginning.split()) :])
            return
    raise Lie("a command of a kind that tests/documented.py does not know; say there how it is checked")


def _check_megatron_mm(words: list[str]) -> None:
    if words in (["plan"], ["import"], ["data", "inspect"], ["data", "prepare"]):
        words = [*words, "--help"]  # only named
    words = ["h200" if "|" in word else "8" if word == "N" else word for word in words]
    try:
        options = parse_arguments(words)
    except SystemExit as error:
        if error.code:
            raise Lie("its arguments are not understood") from None
        return
    recipe = getattr(options, "recipe", None)
    if recipe is None or recipe == "RECIPE":
        return
    overrides = [override for override in options.overrides if not _PLACEHOLDER.fullmatch(override.partition("=")[2])]
    if words[0] != "import":
        _check_recipe(recipe, overrides, getattr(options, "command", None))


def _check_recipe(recipe: str, overrides: list[str], command: str | None) -> None:
    try:
        config = load_config(recipe, overrides=overrides)
    except InputError as error:
        raise Lie(str(error)) from None
    if command is not None and (config.rl is not None) != (command == "rl"):
        raise Lie(f"{recipe} is not for {command}")


def _check_bash(words: list[str]) -> None:
    script, *arguments = words
    text = _file(script).read_text(encoding="utf-8")
    if Path(script).name == "reinforce.sh":
        return  # its own first lines name its arguments RECIPE, MINI_RECIPE ...
    started = re.search(r'reinforce\.sh" (\S+) (\S+)', text)
    for argument in arguments:
        if argument.startswith("-") and argument not in text:
            raise Lie(f"{script} knows no {argument}")
    if started is not None:
        overrides = [word for word in arguments if "=" in word and not _PLACEHOLDER.fullmatch(word.partition("=")[2])]
        _check_recipe(started[2] if "--mini" in arguments else started[1], overrides, "rl")


def _check_sbatch(words: list[str]) -> None:
    while words and words[0].startswith("--"):
        del words[0]
    if not words:
        return
    script, *arguments = words
    launched = re.search(r"^launch (\S+) (\S+)", _file(script).read_text(encoding="utf-8"), re.MULTILINE)
    if launched is None:
        raise Lie(f"{script} is no job")
    recipe = launched[2]
    if arguments[:1] == ["--recipe"]:
        recipe, arguments = arguments[1], arguments[2:]
    overrides = [word for word in arguments if not _PLACEHOLDER.fullmatch(word.partition("=")[2])]
    _check_recipe(recipe, overrides, launched[1])


def _check_tool(words: list[str]) -> None:
    script, *arguments = words
    _file(f"tools/{script}")
    _check_megatron_mm([*TOOLS[script.removesuffix(".py")], *arguments])


def _check_benchmark(words: list[str]) -> None:
    names = [word.removesuffix("...") for word in words if word != "--check"]
    known = [*committed(), "gpu/NAME"] if "--check" in words else measurable()
    unknown = [name for name in names if name not in known and name != "NAME"]
    if unknown or not names:
        raise Lie(f"no benchmark {unknown}")


def _check_gpu_benchmark(words: list[str]) -> None:
    text = _file("benchmarks/gpu/run.py").read_text(encoding="utf-8")
    for word in words:
        if f'"{word}"' not in text and not word.startswith("NAME"):
            raise Lie(f"benchmarks/gpu/run.py knows no {word}")


def _check_pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests"):
            _file(word)


def _check_vllm(words: list[str]) -> None:
    """`vllm serve DIR` is `python -m` of its module, which is there whatever the package is called."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    if not (package / "entrypoints" / "openai" / "api_server.py").is_file():
        raise Lie("vLLM has no such module")
    known = "".join((package / file).read_text(encoding="utf-8") for file in ("engine/arg_utils.py", "config/model.py"))
    for word in words:
        if word.startswith("--") and f'"{word}"' not in known:
            raise Lie(f"vLLM's server knows no {word}")


def _check_wandb(words: list[str]) -> None:
    if importlib.util.find_spec("wandb") is None or words[0] != "sync":
        raise Lie("W&B has no such command")


def _file(name: str) -> Path:
    if not (ROOT / name).exists():
        raise Lie(f"there is no {name}")
    return ROOT / name


_CHECKERS: dict[str, Callable[[list[str]], None]] = {
    "megatron-mm": _check_megatron_mm,
    "bash": _check_bash,
    "sbatch": _check_sbatch,
    "python benchmarks/gpu/run.py": _check_gpu_benchmark,
    "python3 benchmarks/gpu/run.py": _check_gpu_benchmark,
    "python benchmarks/run.py": _check_benchmark,
    "python -m vllm.entrypoints.openai.api_server": _check_vllm,
    "vllm serve": _check_vllm,
    "python3 -m pytest": _check_pytest,
    "wandb": _check_wandb,
    **{f"python tools/{tool}.py": lambda words, tool=tool: _check_tool([f"{tool}.py", *words]) for tool in TOOLS},
}
