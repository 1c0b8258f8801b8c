"""A 1B-parameter model through the converters and the live stream: peak memory, and speed against a plain copy."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.figure import Figure
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.convert.exporting import export_run
from megatron_mm.convert.importing import ImportOptions, import_model
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.export import SHARD_BYTES, write_directory
from megatron_mm.weights.mapping import hf_shapes
from megatron_mm.weights.source import open_source
from megatron_mm.weights.stream import BUCKET_BYTES, from_hf, to_hf
from megatron_mm.weights.tables import model_table
from tests.ranks import run_alone, run_on_ranks

# The bar: this many times a rank's share of the model and one bucket.
MEMORY_BAR = 1.3
MODEL = (
    "model.vision={preset: siglip2-base-patch16-384}",
    "model.language={num_layers: 28, hidden_size: 1536, num_heads: 16, num_kv_heads: 8, head_dim: 128, "
    "ffn_hidden_size: 4608, vocab_size: 49152, max_positions: 4096, tied_embeddings: false, preset: null}",
)


@dataclass(frozen=True)
class Measured:
    """What a process needed for a piece of work, beyond what it held before.

    Attributes:
        seconds: of the work, without starting the process.
        bytes: most memory that was resident at once, pages of files included.
    """

    seconds: float
    bytes: int


def measure() -> list[Figure]:
    """Import with one and two processes, export, and the live stream both ways at TP 2."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_digits(root / "digits", num_train=20, num_heldout=5, seed=0)
        config = _config()
        directory = root / "model"
        tensors = _random_tensors(config)
        write_directory(directory, config.model, ChatTokenizer(root / "digits" / TOKENIZER), tensors, torch.bfloat16)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        largest = max(torch.Size(shape).numel() for rule in model_table(config.model) for shape in rule.shapes) * 2
        figures = [Figure("parameters of the model, bf16", size / 2, "parameters")]
        for ranks in (1, 2):
            copy = _copy(directory, root)
            options = ImportOptions(root / f"run{ranks}", {"whole": directory}, overrides=["parallel.tensor=2"])
            one = [run_alone(_measured, import_model, options)] if ranks == 1 else []
            found = one or run_on_ranks(_measured, ranks, import_model, options)
            # The parameters are shared out evenly to within the largest.
            figures += _figures(f"import, {ranks} process(es)", found, size // ranks + largest, copy, size)
        copy = _copy(directory, root)
        found = [run_alone(_measured, export_run, root / "run1", root / "exported")]
        figures += _figures("export, 1 process", found, size + SHARD_BYTES, copy, size)
        copy = _copy(directory, root)
        into, out = zip(*run_on_ranks(_live, 2, config, directory), strict=True)
        share = size // 2  # is there before
        figures += _figures("files -> live model, TP 2", into, share + largest, copy, size, share)
        figures += _figures("live model -> stream, TP 2", out, share + BUCKET_BYTES, copy, size, share)
        return figures


def _config() -> RunConfig:
    needed = ["run_dir=unused", "recipe=convert", "train={steps: 1, global_batch: 1, micro_batch: 1}", "optim={lr: 1}"]
    return load_config("mini/language", overrides=[*needed, "optim.warmup_steps=0", "precision=bf16", *MODEL])


def _random_tensors(config: RunConfig) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in hf_shapes(model_table(config.model)).items():
        yield name, torch.randint(-(2**14), 2**14, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


@dataclass(frozen=True)
class Copied:
    """Seconds of a plain copy of the weights' files, and of one that waits for the disk, as both writers do."""

    plain: float
    synced: float


def _copy(directory: Path, root: Path) -> Copied:
    """The middle one of three times, since the disk's cache comes and goes."""
    plain, synced = ([_copy_once(directory, root / "copy", sync=sync) for _ in range(3)] for sync in (False, True))
    return Copied(median(plain), median(synced))


def _copy_once(directory: Path, target: Path, *, sync: bool) -> float:
    target.mkdir()
    started = time.perf_counter()
    for file in directory.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
        if sync:
            with (target / file.name).open("rb") as copied:
                os.fsync(copied.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _figures(
    name: str, found: Sequence[Measured], expected: int, copy: Copied, size: int, held_before: int = 0
) -> list[Figure]:
    seconds = max(each.seconds for each in found)
    peak = held_before + max(each.bytes for each in found)
    return [
        Figure(f"{name}: peak memory / (share + bucket)", peak / expected, "ratio", MEMORY_BAR),
        Figure(f"{name}: peak memory", peak / 2**20, "MiB"),
        Figure(f"{name}: speed / plain copy of the files", copy.plain / seconds, "ratio"),
        Figure(f"{name}: speed / copy that waits for the disk", copy.synced / seconds, "ratio"),
        Figure(f"{name}: speed", size / seconds / 2**20, "MiB/s"),
        Figure(f"{name}: plain copy in the same run", size / copy.plain / 2**20, "MiB/s"),
        Figure(f"{name}: copy that waits for the disk, in the same run", size / copy.synced / 2**20, "MiB/s"),
    ]


def _measured(work: Callable[..., Any], *arguments: Any) -> Measured:
    """Do a piece of work and say what it took. Runs on every rank."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    started = time.perf_counter()
    work(*arguments)
    return Measured(time.perf_counter() - started, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _live(config: RunConfig, directory: Path) -> tuple[Measured, Measured]:
    """Files into a model cut over two ranks, and its stream. Runs on every rank."""
    tokenizer, platform = ChatTokenizer(directory), get_platform("cpu")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 2})})
    table = model_table(config.model)

    def drain() -> None:
        for _ in to_hf(chunks, table):
            pass

    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
        source = open_source({"whole": directory}, config.model).tensors
        into = _measured(from_hf, chunks, table, source)
        return into, _measured(drain)
