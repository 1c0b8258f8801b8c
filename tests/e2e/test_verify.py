"""What `verify` and `import` say about weights that somebody or something has changed."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint.paths import find
from megatron_mm.checkpoint.snapshot import Failed, Snapshot, Written
from megatron_mm.config.errors import InputError
from megatron_mm.convert.exporting import export_run
from megatron_mm.convert.importing import ImportOptions, import_model
from megatron_mm.convert.verify import Report, verify
from megatron_mm.weights import files
from megatron_mm.weights.export import Format
from tests.checkpoints import DAMAGES, flip_bit
from tests.conversion import R4B, conversion_config, save_with_transformers
from tests.mutations import FILES, VALUES
from tests.ranks import run_alone, run_on_ranks

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Weights:
    """The same weights as transformers wrote them, as a checkpoint, and as we export them."""

    saved: Path
    run: Path
    model: Path


@pytest.fixture(scope="module")
def weights(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Imported by two processes, exported in several files."""
    folder = tmp_path_factory.mktemp("weights")
    found = Weights(folder / "saved", folder / "run", folder / "model")
    save_with_transformers(found.saved, conversion_config(**R4B), tokenizer)
    run_on_ranks(import_model, 2, ImportOptions(found.run, {"whole": found.saved}, overrides=["parallel.tensor=2"]))
    run_alone(export_run, found.run, found.model, Format.R4B, None, 10**6)
    assert len(list(found.model.glob("model-*.safetensors"))) > 2
    return found


def _verdict(one: Path, other: Path) -> Report | str:
    try:
        return verify(one, other)
    except InputError as error:
        return str(error)


def _verdicts(pairs: list[tuple[Path, Path]]) -> list[Report | str]:
    """What `verify` says to each pair, or why it refuses. Runs in a process of its own."""
    return [_verdict(one, other) for one, other in pairs]


def _imported(directories: dict[str, Path], original: Path) -> dict[str, Report | str]:
    """What `verify` says to the original and each directory imported, or why it is not imported."""
    found: dict[str, Report | str] = {}
    for name, directory in directories.items():
        run = directory.with_name(directory.name + ".run")
        try:
            import_model(ImportOptions(run, {"whole": directory}))
        except InputError as error:
            assert not run.exists()
            assert not run.with_name(run.name + ".partial").exists()
            found[name] = str(error)
        else:
            found[name] = verify(original, run)
    return found


def _names(verdict: Report | str) -> set[str]:
    assert isinstance(verdict, Report), verdict
    return {difference.split(":")[0] for difference in verdict.differences}


def test_the_same_weights_are_equal_whatever_form_they_have(weights: Weights) -> None:
    pairs = [(weights.saved, weights.run), (weights.run, weights.model), (weights.model, weights.saved)]
    saved = [tensor for file in weights.saved.glob("*.safetensors") for tensor in load_file(file).values()]
    num_values = sum(tensor.numel() for tensor in saved)
    for verdict in run_alone(_verdicts, pairs):
        assert isinstance(verdict, Report), verdict
        assert not verdict.differences
        assert not verdict.notes
        assert verdict.num_tensors == 88
        assert verdict.num_values == num_values


def test_changed_values_are_found_and_named(weights: Weights, tmp_path: Path) -> None:
    mutants = {}
    for number, (name, (mutate, _)) in enumerate(VALUES.items()):
        mutants[name] = tmp_path / str(number)
        shutil.copytree(weights.model, mutants[name])
        mutate(mutants[name])
    pairs = [(original, mutant) for original in (weights.model, weights.run) for mutant in mutants.values()]
    verdicts = run_alone(_verdicts, pairs)
    imported = run_alone(_imported, mutants, weights.model)
    for number, (name, (_, expected)) in enumerate(VALUES.items()):
        for verdict in (verdicts[number], verdicts[len(VALUES) + number]):
            assert _names(verdict) == expected, name
        if name == "a dropped bias":
            assert "it lacks model.vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.bias" in imported[name]
        else:
            assert _names(imported[name]) == expected, name
    zeroed, *_ = verdicts
    assert isinstance(zeroed, Report)
    assert "all zero in the second; 49152 of 49152 values differ" in zeroed.differences[0]


def test_broken_files_are_refused(weights: Weights, tmp_path: Path) -> None:
    mutants = {}
    for number, (name, (mutate, _)) in enumerate(FILES.items()):
        mutants[name] = tmp_path / str(number)
        shutil.copytree(weights.model, mutants[name])
        mutate(mutants[name])
    runs = [tmp_path / name for name in DAMAGES]
    for run, (damage, _) in zip(runs, DAMAGES.values(), strict=True):
        shutil.copytree(weights.run, run)
        damage(find(run))
    directories = [*mutants.values(), *runs]
    verdicts = run_alone(_verdicts, [(weights.model, directory) for directory in directories])
    for (name, (_, expected)), verdict in zip(DAMAGES.items(), verdicts[len(mutants) :], strict=True):
        assert ("no checkpoint in" if name == "no manifest" else expected) in str(verdict), name
    imported = run_alone(_imported, mutants, weights.model)
    for verdict, (name, (_, message)) in zip(verdicts, FILES.items(), strict=False):
        assert message in str(verdict)
        assert message in str(imported[name])


def _written_wrongly(weights: Weights, folder: Path) -> list[str]:
    """What import and export say when the disk keeps other bits than it was given. Runs in a process of its own."""
    write, save_file = Snapshot.write, files.save_file

    def write_and_flip(self: Snapshot) -> Written | Failed:
        written = write(self)
        flip_bit(self.directory / "__0_0.distcp")
        return written

    def save_file_and_flip(content: Any, file: Path, **more: Any) -> None:
        save_file(content, file, **more)
        flip_bit(file)

    Snapshot.write, files.save_file = write_and_flip, save_file_and_flip
    found = []
    for work in (
        lambda: import_model(ImportOptions(folder / "run", {"whole": weights.saved})),
        lambda: export_run(weights.run, folder / "model"),
    ):
        try:
            work()
        except InputError as error:
            found.append(str(error))
    return found


def test_what_is_written_wrongly_is_noticed_and_left_behind_nowhere(weights: Weights, tmp_path: Path) -> None:
    imported, exported = run_alone(_written_wrongly, weights, tmp_path)
    assert "holds other values than were written for" in imported
    assert "holds other values than were written for" in exported
    assert not list(tmp_path.iterdir())


def _tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_tools_as_commands(weights: Weights, tmp_path: Path) -> None:
    run, model, halves = tmp_path / "run", tmp_path / "model", tmp_path / "bf16"
    imported = _tool("convert_hf_to_megatron", run, "--model", weights.saved, "parallel.tensor=2", "--nproc", 2)
    assert imported.returncode == 0, imported.stderr
    assert f"wrote {run} in float32" in imported.stdout
    exported = _tool("convert_megatron_to_hf", run, model)
    assert exported.returncode == 0, exported.stderr
    same = _tool("verify_checkpoint", weights.saved, model)
    assert same.returncode == 0, same.stderr
    assert "equal to the bit; compared 88 tensors" in same.stdout
    assert _tool("convert_megatron_to_hf", run, halves, "--dtype", "bfloat16", "--shard-size", "0.0005").returncode == 0
    different = _tool("verify_checkpoint", model, halves)
    assert different.returncode == 1
    assert "model.image_newline: type float32 against bfloat16" in different.stdout
    assert "88 differences; compared 88 tensors" in different.stdout
    again = _tool("convert_hf_to_megatron", run, "--model", weights.saved)
    assert again.returncode == 2
    assert f"{run} exists already" in again.stderr
