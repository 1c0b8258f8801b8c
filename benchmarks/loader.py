"""The loader against a bare loop, what a training loop waits for it, and 37 million samples from a random step.

1. Samples a second of the feed with two workers, R-4B's tiles and packs of 16,384 tokens, against two processes that
   only decode the same pictures by Pillow and resize them by Pillow to the same sizes. Both sides in turn, one run.
2. The share of its time that the miniature stage 3 waits for batches, on two ranks with one worker each.
3. An index of 37 million rows, each of which stands for one of the real samples of 1.: from nothing to the whole of a
   first step (16 packs), a random one of rank 3 of 64, and the memory that takes.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.figure import Figure
from benchmarks.stage3_mix import KINDS, text_lengths
from megatron_mm.chat.images import TileRules, tilings_of
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.load import load_config
from megatron_mm.config.prepare import PrepareConfig, SourceConfig
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.digits import build_tokenizer, prepare_digits
from megatron_mm.data.index import INDEX, ROWS, write_index
from megatron_mm.data.loader import Feed, MicroBatches
from megatron_mm.data.prepare import NamedTask, run_tasks
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.shards import TOKENIZER, PreparedData
from megatron_mm.data.sources.base import ListedTask, RawSample

SAMPLES = 500
# Packs of one round; rounds of each side.
PACKS, ROUNDS = 48, 3
WORKERS = 2
ROWS_OF_LARGE = 37_000_000
TRAINING_STEPS = 150
RESUMES = 3


def measure() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_samples(root / "data")
        return [*_speed(root / "data"), *_waiting(root), *_resuming(root / "data", root / "large")]


def loader_config(path: Path, **overrides: object) -> RunConfig:
    """R-4B's model and packs; only its sizes count here."""
    values: dict[str, object] = {"run_dir": "unused", "data.path": path, "data.packed": "true"}
    values |= {"data.num_workers": WORKERS, "train.steps": PACKS, "train.global_batch": 1, "train.micro_batch": 1}
    values |= {"optim.lr": 1, "model.language.vocab_size": 384, **overrides}
    return load_config("r4b/base", overrides=[f"{key}={value}" for key, value in values.items()])


def write_samples(directory: Path) -> None:
    """A prepared data set of `SAMPLES` samples in the shares, shapes and lengths of stage3_mix.py.

    Its pictures are JPEGs of stretches of scikit-learn's two photographs.
    """
    random = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # pyright: ignore
    sources = []
    for name, kind in KINDS.items():
        count = round(kind.share * SAMPLES)
        lengths = text_lengths(kind, count, random)
        samples = [_sample(int(length), kind.pictures, photos, random) for length in lengths]
        sources.append((name, samples))
    with tempfile.TemporaryDirectory() as scratch:
        build_tokenizer(["a picture of something"], 384).save_pretrained(scratch)
        named = [SourceConfig(name=name, format="chat", path=directory) for name, _ in sources]
        config = PrepareConfig(tokenizer=Path(scratch), sources=tuple(named))
        tasks = [
            NamedTask(name, source, ListedTask(samples), 1.0)
            for (name, samples), source in zip(sources, named, strict=True)
        ]
        run_tasks(config, ChatTokenizer(Path(scratch)), tasks, directory, "benchmark", 0, lambda _: None)


def _sample(length: int, shapes: Any, photos: list[Image.Image], random: np.random.Generator) -> RawSample:
    # The tokenizer knows bytes: as many characters are about as many tokens.
    text = " ".join(f"{number:04d}" for number in random.integers(10_000, size=length // 5 + 1))
    content = StoredContent((StoredTurn([0, "\nWhat?"] if shapes else ["What?"], text),))
    if not shapes:
        return RawSample("text", content)
    width, height = (int(side * random.uniform(0.8, 1.25)) for side in shapes[random.integers(len(shapes))])
    photo = photos[random.integers(len(photos))]
    left, top = (int(random.integers(side // 3)) for side in photo.size)
    stretch = photo.crop((left, top, left + photo.width * 2 // 3, top + photo.height * 2 // 3))
    encoded = BytesIO()
    stretch.resize((width, height), Image.Resampling.BICUBIC).save(encoded, format="JPEG", quality=90)
    return RawSample("picture", content, (encoded.getvalue(),))


def _speed(data: Path) -> list[Figure]:
    config = loader_config(data)
    tokenizer = PreparedData(str(data)).tokenizer()
    dataset = MicroBatches(config, tokenizer, 0, 1)
    rows = [dataset.plan.global_batch(step).rows.tolist() for step in range(PACKS)]
    num_samples = sum(map(len, rows))

    def ours() -> None:
        assert sum(batch.num_samples for step in Feed(dataset, 0, config) for batch in step) == num_samples

    def bare() -> None:
        with multiprocessing.get_context("fork").Pool(WORKERS, _open_bare, (str(data),)) as pool:
            pool.map(_decode_and_resize, rows, chunksize=1)

    ours()  # compiles the packing, and brings the shards into memory for both
    times: dict[Callable[[], None], list[float]] = {ours: [], bare: []}
    for _ in range(ROUNDS):
        for side, seconds in times.items():
            started = time.monotonic()
            side()
            seconds.append(time.monotonic() - started)
    ratios = [theirs / mine for mine, theirs in zip(times[ours], times[bare], strict=True)]
    return [
        Figure(
            "feed against bare Pillow decode + resize, samples a second",
            statistics.median(ratios),
            "x",
            0.9,
            "at least",
        ),
        Figure("feed", num_samples / statistics.median(times[ours]), "samples/s"),
        Figure("bare loop", num_samples / statistics.median(times[bare]), "samples/s"),
        Figure("samples of a round", num_samples, "samples"),
    ]


_BARE: dict[str, Any] = {}


def _open_bare(path: str) -> None:
    _BARE["data"], _BARE["rules"] = PreparedData(path), TileRules.of_model(loader_config(Path(path)).model)


def _decode_and_resize(rows: list[int]) -> None:
    """What any loader has to do at least: decode, and resize to one tile and to the grid."""
    for row in rows:
        for content in _BARE["data"].read(row).pictures:
            picture = Image.open(BytesIO(content)).convert("RGB")
            (grid,) = tilings_of([picture], _BARE["rules"])
            for size in ((grid.tile_size, grid.tile_size), grid.resized):
                picture.resize(size, Image.Resampling.BICUBIC)


def _waiting(root: Path) -> list[Figure]:
    prepare_digits(root / "digits", num_train=2000, num_heldout=4, seed=0)
    run = [f"run_dir={root / 'run'}", f"data.path={root / 'digits'}", "init_from=null", "data.num_workers=1"]
    steps = [f"train.steps={TRAINING_STEPS}", f"train.log_every={TRAINING_STEPS // 3}", "optim.warmup_steps=5"]
    command = [sys.executable, "-m", "megatron_mm.cli", "train", "mini/stage3", *run, *steps, "--nproc", "2"]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The first third holds the start of the workers.
    waited = statistics.mean(line["data_wait"] for line in lines[1:])
    return [Figure("mini stage 3: share of its time that the loop waits for batches", waited, "", 0.02)]


def _resuming(data: Path, large: Path) -> list[Figure]:
    write_large(data, large)
    opened, started, peaks = [], [], []
    for number in range(RESUMES):
        before = time.monotonic()
        said = run_python(f"from benchmarks.loader import first_batch; first_batch({str(large)!r}, {number})")
        started.append(time.monotonic() - before)
        seconds, peak = map(float, said.split())
        opened.append(seconds)
        peaks.append(peak)
    what = "the whole first step (16 packs) of a rank, at a random step, longest"
    return [
        Figure(f"37M samples: from opening the data set to {what}", max(opened), "s", 10),
        Figure(f"37M samples: from the start of the process (its imports) to {what}", max(started), "s"),
        Figure("37M samples: memory of the process that plans, peak", max(peaks) / 2**20, "MiB", 2048),
    ]


def run_python(code: str) -> str:
    """What a fresh process prints."""
    environment = {**os.environ, "PYTHONPATH": "."}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def peak_bytes() -> int:
    """Most resident memory of this process so far, pages of mapped files included.

    Not getrusage's, which starts with what the process that started this one held.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_large(data: Path, large: Path) -> None:
    """An index of 37 million rows over the shards of `data`."""
    table = pa.ipc.open_file(str(data / INDEX)).read_all()
    index = PreparedData(str(data)).index
    all_sizes = [index.sizes_of(row) for row in range(len(index))]
    widths, heights = ([[size[side] for size in sizes] for sizes in all_sizes] for side in (0, 1))
    few = pa.table(
        {
            **{name: table[name] for name in ("split", "part", "offset", "text_bytes", "text_tokens")},
            **{name: table[name] for name in ("cold_start_tokens", "picture_bytes", "digest")},
            "shard": pa.array([index.shards[number] for number in index.shard]).dictionary_encode(),
            "picture_width": pa.array(widths, ROWS.field("picture_width").type),
            "picture_height": pa.array(heights, ROWS.field("picture_height").type),
        }
    ).select(ROWS.names)
    chosen = np.random.default_rng(0).integers(len(few), size=ROWS_OF_LARGE, dtype=np.int32)
    large.mkdir()
    write_index(large / INDEX, few.take(pa.array(chosen)).combine_chunks(), index.tokenizer)
    for entry in (*data.glob("*.tar"), data / TOKENIZER):
        (large / entry.name).symlink_to(entry)


def first_batch(path: str, seed: int) -> None:
    """Resume at a random step as rank 3 of 64 does, 1,024 packs a step; print seconds and peak memory in bytes."""
    started = time.monotonic()
    step = int(np.random.default_rng(seed).integers(1000, 8000))
    config = loader_config(Path(path), **{"train.global_batch": 1024, "train.steps": 8600})
    dataset = MicroBatches(config, PreparedData(path).tokenizer(), 3, 64)
    batches = next(iter(Feed(dataset, step, config)))
    assert sum(batch.num_tokens for batch in batches) > 15_000 * len(batches)
    print(time.monotonic() - started, peak_bytes())
