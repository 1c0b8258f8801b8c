"""Arguments that `megatron-mm` must refuse, with a part of what it must say, and a program that tries all of them.

    python -m tests.bad_arguments DIGITS     in an empty directory; prints a JSON list of `Outcome`s

DIGITS is a prepared data set. The program calls `main` for each, and says which heavy packages that imported.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

# Packages that take seconds to import.
HEAVY = ("torch", "transformers", "vllm", "megatron.core")
SOURCE = "sources: [{name: a, format: text, path: a.txt}]"

# Files of the directory that the commands are called in.
FILES = {
    "a.txt": b"A text.\n",
    "latin.yaml": "base: mini/stage1\nrun_dir: läufe\n".encode("latin-1"),
    "binary.yaml": b"PAR1\x15\x04\x15\x90\xff\xfe\x00",
    "self.yaml": b"base: self.yaml\n",
    "first.yaml": b"base: second.yaml\n",
    "second.yaml": b"base: first.yaml\n",
    "anchors.yaml": b"base: mini/stage1\ndata: &d {blend: *d}\n",
    "bomb.yaml": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + b"".join(
        f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]\n".encode() for m, n in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "deep.yaml": b"a: " + b"[" * 5000,
    "twice.yaml": b"base: mini/stage1\ntrain: {steps: 5, steps: 6}\n",
    "twice_deep.yaml": b"base: mini/stage1\noptim:\n  modules:\n    vision: {lr: 1e-4}\n    vision: {lr: 2e-4}\n",
    "list.yaml": b"- base: mini/stage1\n",
    "text.yaml": b"mini/stage1\n",
    "empty.yaml": b"",
    "comment.yaml": b"# nothing here\n",
    "tab.yaml": b"train:\n\tsteps: 5\n",
    "two.yaml": b"base: mini/stage1\n---\nbase: mini/stage2\n",
    "python.yaml": b"base: !!python/object/apply:os.system ['touch planted']\n",
    "tagged.yaml": b"base: mini/stage1\nseed: !!int ten\n",
    "numbers.yaml": b"base: mini/stage1\n3: 4\n",
    "base_list.yaml": b"base: [mini/stage1]\n",
    "base_number.yaml": b"base: 3\n",
    "base_missing.yaml": b"base: nowhere.yaml\n",
    "section_text.yaml": b"base: mini/stage1\ntrain: fast\n",
    "section_list.yaml": b"base: mini/stage1\nmodel: {vision: [1, 2]}\n",
    "preset_list.yaml": b"base: mini/stage1\nmodel: {vision: {preset: [a, b]}}\n",
    "preset_up.yaml": b"base: mini/stage1\nmodel: {vision: {preset: ../language/mini}}\n",
    "no_tokenizer.yaml": f"tokenizer: nowhere\n{SOURCE}\n".encode(),
    "no_sources.yaml": b"tokenizer: nowhere\nsources: []\n",
    "no_file.yaml": b"tokenizer: TOKENIZER\nsources: [{name: a, format: text, path: nowhere.txt}]\n",
    "no_pictures.yaml": b"tokenizer: TOKENIZER\nsources: [{name: a, format: chat, path: a.txt, pictures: nowhere}]\n",
    "good.yaml": f"tokenizer: TOKENIZER\n{SOURCE}\n".encode(),
    "same_names.yaml": f"tokenizer: TOKENIZER\n{SOURCE[:-1]}, {SOURCE[10:]}\n".encode(),
    "bad_name.yaml": b"tokenizer: TOKENIZER\nsources: [{name: 'a b', format: text, path: a.txt}]\n",
    "a_directory/keep": b"",
    "empty_model/config.json": b"",
    "no_checkpoint/config.yaml": b"model: {}\n",
    "latest_only/checkpoints/latest": b"step_00000010\n",
    "no_data/tokenizer/tokenizer.json": b"{}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call came to.

    Attributes:
        written: files that it made, changed or removed.
        imported: those of `HEAVY` that it imported.
        seconds: of the processor.
    """

    arguments: list[str]
    code: int | str
    stdout: str
    stderr: str
    written: list[str]
    imported: list[str]
    seconds: float


def _train(*overrides: str) -> tuple[str, ...]:
    return ("train", "mini/stage2", "init_from=null", *overrides, "--nproc", "2")


# Arguments, and what the message holds. DIGITS and TOKENIZER stand for a data set and its tokenizer.
CASES: tuple[tuple[tuple[str, ...], str], ...] = (
    # The command line.
    ((), "COMMAND"),
    (("trein",), "invalid choice: 'trein'"),
    (("data",), "DO"),
    (("data", "preparee", "a", "b"), "invalid choice: 'preparee'"),
    (("show", "mini/stage1", "--confg", "x.yaml"), "--confg"),
    (("show", "mini/stage1", "--config"), "expected one argument"),
    (("train",), "recipe"),
    (("train", "mini/stage1", "--nproc", "two"), "--nproc"),
    (("train", "mini/stage1", "--nproc", "0"), "--nproc"),
    (("train", "mini/stage1", "--nproc", "-2"), "--nproc"),
    (("train", "mini/stage1", "--nproc", "1.5"), "--nproc"),
    (("rl", "mini/bpo", "data.path=DIGITS", "init_from=null", "--nproc", "1000000"), "--nproc"),
    (("train", "mini/stage2", "data.path=DIGITS", "--nproc", "2", "--nodes", "0"), "--nodes"),
    (("train", "mini/stage2", "init_from=null", "data.path=DIGITS", "--nproc", "2", "--nodes", "2"), "--rendezvous"),
    (
        (
            "train",
            "mini/stage2",
            "init_from=null",
            "data.path=DIGITS",
            "--nproc",
            "2",
            "--nodes",
            "2",
            "--rendezvous",
            "host",
        ),
        "HOST:PORT",
    ),
    (("train", "mini/bpo", "--nproc", "2"), "megatron-mm rl"),
    (("rl", "mini/stage1", "--nproc", "2"), "megatron-mm train"),
    # Recipes and files.
    (("show", "mini/stge1"), "did you mean 'mini/stage1'"),
    (("show", "stage1"), "no recipe 'stage1'"),
    (("show", ""), "recipe"),
    (("show", "../recipes/mini/stage1"), "no recipe '../recipes/mini/stage1'"),
    (("show", "./nothing.yaml"), "nothing.yaml cannot be read: No such file"),
    (("show", "a_directory"), "no recipe 'a_directory'"),
    (("show", "train.steps=5"), "recipe"),
    (("show", "latin.yaml"), "latin.yaml is not UTF-8"),
    (("show", "binary.yaml"), "binary.yaml is not UTF-8"),
    (("show", "mini/stage1", "--config", "binary.yaml"), "binary.yaml is not UTF-8"),
    (("data", "prepare", "binary.yaml", "D"), "binary.yaml is not UTF-8"),
    (("data", "prepare", "nowhere.yaml", "D"), "nowhere.yaml cannot be read"),
    (("data", "prepare", "a_directory", "D"), "a_directory cannot be read"),
    (("show", "self.yaml"), "self.yaml"),
    (("show", "first.yaml"), "first.yaml -> second.yaml -> first.yaml"),
    (("show", "anchors.yaml"), "holds itself"),
    (("show", "bomb.yaml"), "bomb.yaml"),
    (("show", "deep.yaml"), "deep.yaml"),
    (("show", "twice.yaml"), "'steps' is given twice"),
    (("show", "twice_deep.yaml"), "'vision' is given twice"),
    (("show", "list.yaml"), "list.yaml holds a list"),
    (("show", "text.yaml"), "text.yaml holds a text"),
    (("show", "empty.yaml"), "empty.yaml is empty"),
    (("data", "prepare", "comment.yaml", "D"), "comment.yaml is empty"),
    (("show", "tab.yaml"), "tab.yaml is not YAML"),
    (("show", "two.yaml"), "two.yaml is not YAML"),
    (("show", "python.yaml"), "could not determine a constructor"),
    (("show", "tagged.yaml"), "tagged.yaml"),
    (("show", "numbers.yaml"), "3"),
    (("show", "base_list.yaml"), "base"),
    (("show", "base_number.yaml"), "base"),
    (("show", "base_missing.yaml"), "nowhere.yaml"),
    (("show", "section_text.yaml"), "train"),
    (("show", "section_list.yaml"), "model.vision"),
    (("show", "preset_list.yaml"), "model.vision.preset"),
    (("show", "preset_up.yaml"), "model.vision.preset"),
    # Overrides: their form, names, values.
    (("show", "mini/stage1", "train.steps"), "'train.steps' is not of the form a.b=value"),
    (("show", "mini/stage1", "=5"), "is not of the form a.b=value"),
    (("show", "mini/stage1", "train..steps=5"), "train..steps"),
    (("show", "mini/stage1", "train=5"), "train"),
    (("show", "mini/stage1", "train.steps.more=5"), "train.steps"),
    (("show", "mini/stage1", "train.steps=[5"), "not YAML"),
    (("show", "mini/stage1", "data.blend={a: 1, a: 2}"), "'a' is given twice"),
    (("show", "mini/stage1", "train.steps=" + "[" * 3000), "train.steps"),
    (("show", "mini/stage1", "train.steps=" + "9" * 5000), "train.steps"),
    (("show", "mini/stage1", "seed=&a [*a]"), "holds itself"),
    (("show", "mini/stage1", "lr=1e-4"), "optim.lr"),
    (("show", "mini/stage1", "optim.learning_rate=1"), "optim.lr"),
    (("show", "mini/stage1", "train.batch_size=1"), "train.global_batch"),
    (("show", "mini/bpo", "rl.group_size=4"), "rl.stages.0.group_size"),
    (("show", "mini/stage1", "optim.micro_batch=4"), "train.micro_batch"),
    (("show", "mini/stage1", "foo=1"), "no setting is called like it"),
    (("show", "mini/stage1", "train.xyzzy=1"), "no setting is called like it"),
    (("show", "mini/stage1", "train.steps=0"), "train.steps"),
    (("show", "mini/stage1", "train.steps=-1"), "train.steps"),
    (("show", "mini/stage1", "train.steps=true"), "train.steps: give a number (seen: true)"),
    (("show", "mini/stage1", "train.steps=1.5"), "train.steps"),
    (("show", "mini/stage1", "train.steps=many"), "train.steps"),
    (("show", "mini/stage1", "train.steps="), "train.steps"),
    (("show", "mini/stage1", "train.steps=null"), "train.steps"),
    (("show", "mini/stage1", "train.steps=99999999999999999999"), "train.steps"),
    (("show", "mini/stage1", "optim.lr=nan"), "optim.lr"),
    (("show", "mini/stage1", "optim.lr=.inf"), "optim.lr"),
    (("show", "mini/stage1", "optim.lr=1e30"), "optim.lr"),
    (("show", "mini/stage1", "parallel.tensor=1000000"), "parallel.tensor"),
    (("show", "mini/stage1", "model.language.hidden_size=1e9"), "model.language.hidden_size"),
    (("show", "mini/stage1", "model.tile_grids=[[1, 100000]]"), "tile_grids holds (1, 100000)"),
    (("show", "mini/stage1", "model.tile_grids=[[1]]"), "model.tile_grids"),
    (("show", "mini/stage1", "guard.hang_seconds=1e300"), "guard.hang_seconds"),
    (("show", "mini/stage1", "seed=1e18"), "seed"),
    (("show", "mini/stage1", "data.num_workers=100000"), "data.num_workers"),
    (("show", "mini/stage1", "precision=fp16"), "'fp32' or 'bf16'"),
    (("show", "mini/stage1", "telemetry.wandb=no"), "'off', 'online' or 'offline'"),
    (("show", "mini/stage1", "run_dir="), "run_dir"),
    (("show", "mini/stage1", "run_dir=[a]"), "run_dir"),
    (("show", "mini/stage1", 'run_dir="a\\0b"'), "run_dir"),
    (("show", "mini/stage1", "data.blend={digits/easy/thinking: -1}"), "remove the part instead"),
    (("show", "mini/stage1", "data.blend=[1]"), "data.blend"),
    (("show", "mini/stage2", "optim.lr=1e-5"), "is above optim.lr"),
    (("show", "mini/bpo", "train.steps=4"), "rl.stages.0.steps=4"),
    (("show", "r4b/base"), "train: missing"),
    # Runs: what is not there.
    (("train", "r4b/stage1", "init_from=null", "--nproc", "2"), "data.path is not given"),
    (_train("data.path=nowhere"), "no prepared data in nowhere"),
    (_train("data.path=a_directory"), "no prepared data in a_directory"),
    (_train("data.path=a.txt"), "no prepared data in a.txt"),
    (_train("data.path=no_data"), "no prepared data in no_data"),
    (_train("data.path=DIGITS", "run_dir=a.txt"), "run_dir a.txt"),
    (_train("data.path=DIGITS", "run_dir=a.txt/below"), "run_dir a.txt/below"),
    (_train("data.path=DIGITS", "train.global_batch=7"), "train.global_batch=7"),
    (_train("data.path=DIGITS", "parallel.tensor=3"), "parallel.tensor=3"),
    (("train", "mini/stage2", "data.path=DIGITS", "init_from=nowhere", "--nproc", "2"), "no checkpoint in nowhere"),
    (("train", "mini/stage2", "data.path=DIGITS", "init_from=a.txt", "--nproc", "2"), "no checkpoint in a.txt"),
    (
        ("train", "mini/stage2", "data.path=DIGITS", "init_from=latest_only", "--nproc", "2"),
        "no checkpoint in latest_only",
    ),
    (("rl", "mini/bpo", "data.path=nowhere", "init_from=null", "--nproc", "2"), "no prepared data in nowhere"),
    (("rl", "mini/bpo", "data.path=DIGITS", "init_from=null", "rl.reward.name=best", "--nproc", "2"), "no reward"),
    # Plans.
    (("plan", "r4b/stage3", "--gpus", "8"), "--gpu"),
    (("plan", "r4b/stage3", "--gpus", "8", "--gpu", "b300"), "--gpu b300 is not known; choose one of a100, h100, h200"),
    (("plan", "r4b/stage3", "--gpus", "0", "--gpu", "h100"), "--gpus"),
    (("plan", "r4b/stage3", "--gpus", "7", "--gpu", "h100"), "cannot run on 7 ranks"),
    (("plan", "r4b/stage3", "--gpus", "8", "--gpu", "h100", "--utilisation", "2"), "--utilisation"),
    (("plan", "r4b/stage3", "--gpus", "8", "--gpu", "h100", "--memory-share", "nan"), "--memory-share"),
    (("plan", "r4b/stage3", "--gpus", "8", "--gpu", "h100", "--tiles-per-pack", "inf"), "--tiles-per-pack"),
    (("plan", "r4b/stage3", "--gpus", "8", "--gpu", "h100", "--draw-rate", "3"), "--draw-rate"),
    # Data.
    (("data", "prepare", "no_tokenizer.yaml", "D"), "no tokenizer.json in nowhere"),
    (("data", "prepare", "no_sources.yaml", "D"), "sources"),
    (("data", "prepare", "no_file.yaml", "D"), "nowhere.txt"),
    (("data", "prepare", "no_pictures.yaml", "D"), "nowhere"),
    (("data", "prepare", "same_names.yaml", "D"), "give each a name of its own"),
    (("data", "prepare", "bad_name.yaml", "D"), "'a b'"),
    (("data", "prepare", "no_tokenizer.yaml", "D", "max_rejects=0.1"), "max_rejected"),
    (("data", "prepare", "no_tokenizer.yaml", "D", "max_rejected=5"), "max_rejected"),
    (("data", "prepare", "no_tokenizer.yaml", "D", "--workers", "-3"), "--workers"),
    (("data", "prepare", "good.yaml", "a.txt/D"), "a.txt/D"),
    (("data", "digits", "D", "--train", "0"), "--train"),
    (("data", "digits", "D", "--heldout", "-5"), "--heldout"),
    (("data", "digits", "D", "--seed", "-1"), "--seed"),
    (("data", "digits", "a_directory"), "a_directory exists already"),
    (("data", "inspect", "r4b/stage1"), "data.path is not given"),
    (("data", "inspect", "mini/stage3", "data.path=nowhere"), "no prepared data in nowhere"),
    (("data", "inspect", "mini/stage3", "data.path=DIGITS", "--samples", "-1"), "--samples"),
    (("data", "inspect", "mini/stage3", "data.path=DIGITS", "--split", "test"), "--split"),
    (("data", "inspect", "mini/stage3", "data.path=DIGITS", "--html", "nowhere/page.html"), "nowhere"),
    (("data", "inspect", "mini/stage3", "data.path=DIGITS", "--html", "a_directory"), "it is a directory"),
    # Weights.
    (("import", "R"), "--model, or --vision and --language"),
    (("import", "R", "--vision", "empty_model"), "--model, or --vision and --language"),
    (("import", "R", "--model", "nowhere"), "nowhere"),
    (("import", "a_directory", "--model", "empty_model"), "a_directory exists already"),
    (("import", "R", "--model", "empty_model", "--seed", "-1"), "--seed"),
    (("import", "R", "--model", "empty_model", "--dtype", "int8"), "--dtype"),
    (("export", "nowhere", "E"), "no checkpoint in nowhere"),
    (("export", "no_checkpoint", "E"), "no checkpoint in no_checkpoint"),
    (("export", "nowhere", "a_directory"), "a_directory exists already"),
    (("export", "nowhere", "E", "--format", "gguf"), "--format"),
    (("export", "nowhere", "E", "--shard-size", "nan"), "--shard-size"),
    (("export", "nowhere", "E", "--shard-size", "0"), "--shard-size"),
    (("verify", "nowhere", "empty_model"), "nowhere"),
    (("verify", "a_directory", "a_directory"), "a_directory"),
    (("evaluate", "nowhere", "DIGITS", "r.json"), "no model in nowhere"),
    (("evaluate", "empty_model", "nowhere", "r.json"), "no prepared data in nowhere"),
    (("evaluate", "empty_model", "DIGITS", "a_directory"), "a_directory"),
    (("evaluate", "empty_model", "DIGITS", "a.txt/r.json"), "a.txt"),
    (("evaluate", "empty_model", "DIGITS", "r.json", "--questions", "0"), "--questions"),
    (("evaluate", "empty_model", "DIGITS", "r.json", "--max-tokens", "-1"), "--max-tokens"),
)


def write_files(directory: Path, tokenizer: str) -> None:
    """Write `FILES`."""
    for name, content in FILES.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.replace(b"TOKENIZER", tokenizer.encode()))


def _listing() -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*") if not path.is_dir()
    } | {str(path): (0, 0) for path in Path().rglob("*") if path.is_dir()}


def _try(arguments: list[str]) -> Outcome:
    from megatron_mm.cli import main

    before, known, began = _listing(), set(sys.modules), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code: int | str = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else str(error.code)
        except Exception:  # noqa: BLE001 (it is what is looked for)
            code = traceback.format_exc()
    seconds, after = time.process_time() - began, _listing()
    return Outcome(
        arguments=arguments,
        code=code,
        stdout=stdout.getvalue(),
        stderr=stderr.getvalue(),
        written=sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)),
        imported=[name for name in HEAVY if name in sys.modules and name not in known],
        seconds=seconds,
    )


if __name__ == "__main__":
    digits = sys.argv[1]
    os.environ.pop("RANK", None)
    write_files(Path(), f"{digits}/tokenizer")
    outcomes = [_try([argument.replace("DIGITS", digits) for argument in arguments]) for arguments, _ in CASES]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
