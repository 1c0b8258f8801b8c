"""Our training step against transformers' LlavaOnevision with torch's fused AdamW, on the same cores.

Both sides take the same model, samples and dtype, one process and two threads; their steps alternate, and a ratio is
the median over pairs. Tokens are those of the samples, padding not counted. A row's peak memory is what the process
grew by at most from before the model was made, imports done and process groups open, each side in a process of its own;
once with blocks above 256 KiB given back when they are freed, and once on glibc's default heap, holes and all.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.figure import Figure
from benchmarks.high_water import GIVES_BACK, growth
from megatron_mm.chat.images import TileRules, tiles_of, tilings_of
from megatron_mm.chat.render import Sample
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.loader import Form, collate
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.megatron_config import DTYPES
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.assemble import build_trainee
from megatron_mm.train.step import train_step
from megatron_mm.weights.stream import from_hf
from megatron_mm.weights.tables import model_table
from tests.onevision import onevision_config, reference_model, reference_processor
from tests.ranks import run_alone
from tests.tiny import r4b_tensors, random_picture, reference_models

THREADS = 2
PAIRS = 15
LENGTHS = Path(__file__).with_name("lengths.json")
MINI: dict[str, object] = {}
WIDE: dict[str, object] = {
    "model__language__hidden_size": 256,
    "model__language__ffn_hidden_size": 768,
    "model__language__num_heads": 8,
    "model__language__num_kv_heads": 4,
    "model__language__vocab_size": 4096,
}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: overrides of the miniature model.
        lengths: text tokens of each sample of a step; every step has the same number of samples.
        pictures: sizes (width, height) that each sample's picture is drawn from; none for text.
        trained: share of the text that is trained.
        packed: ours, against transformers' padded batches.
        bar: of the tokens/s ratio; None where it only informs.
    """

    name: str
    model: dict[str, object]
    lengths: tuple[tuple[int, ...], ...]
    pictures: tuple[tuple[int, int], ...]
    trained: float
    packed: bool
    precision: str
    bar: float | None


def cases() -> list[Case]:
    """Unpacked samples of one length, then the mix of captions and thoughts."""
    wide, square = ((64, 32),), ((32, 32), (64, 32), (64, 64))
    mix = mixed_lengths(num_steps=8, num_samples=16)
    rows = []
    for name, model in (("mini", MINI), ("hidden 256, vocabulary 4096", WIDE)):
        rows += [
            # 52 placeholders a picture
            Case(f"{name}, pictures, 8 x 128 tokens", model, ((77,) * 8,), wide, 0.7, False, "fp32", 0.95),
            Case(f"{name}, pictures, 16 x 256 tokens", model, ((205,) * 16,), wide, 0.7, False, "fp32", 0.95),
            Case(f"{name}, pictures, 8 x 128 tokens", model, ((77,) * 8,), wide, 0.7, False, "bf16", None),
            Case(f"{name}, text, 8 x 128 tokens", model, ((129,) * 8,), (), 1.0, False, "fp32", 0.95),
            Case(f"{name}, text, 16 x 256 tokens", model, ((257,) * 16,), (), 1.0, False, "fp32", 0.95),
            Case(f"{name}, packed mix", model, mix, square, 1.0, True, "fp32", 1.5),
        ]
    return rows


def mixed_lengths(num_steps: int, num_samples: int) -> tuple[tuple[int, ...], ...]:
    """Text lengths drawn from the kinds of lengths.json, as many of each; the shares are our choice."""
    kinds = json.loads(LENGTHS.read_text(encoding="utf-8"))["kinds"].values()
    random = np.random.default_rng(0)
    grid = np.linspace(0, 1, 21)
    each = num_steps * num_samples // len(kinds)
    drawn = [np.interp(random.random(each), grid, kind["quantiles"]) for kind in kinds]
    lengths = random.permutation(np.concatenate(drawn)).astype(int).clip(4)
    return tuple(map(tuple, lengths.reshape(num_steps, num_samples).tolist()))


def measure() -> list[Figure]:
    """All rows: ratio of tokens/s, both sides' tokens/s, ratio of peak memory."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        prepare_digits(digits, num_train=4, num_heldout=4, seed=0)
        for case in cases():
            ours, theirs, ratio = run_alone(_speed, case, digits / TOKENIZER)
            name = f"{case.name}, {case.precision}"
            padded = " on padded batches" if case.packed else ""
            figures += [
                Figure(f"{name}: tokens/s, ours / transformers{padded}", ratio, "ratio", case.bar, "at least"),
                Figure(f"{name}: ours", ours, "tokens/s"),
                Figure(f"{name}: transformers", theirs, "tokens/s"),
            ]
            if case.precision == "fp32":
                figures += _memory(case, digits / TOKENIZER)
    return figures


def _memory(case: Case, tokenizer_directory: Path) -> list[Figure]:
    figures = []
    for heap, settings, bar in (("", GIVES_BACK, 1.2), (", default heap", {}, None)):
        os.environ.update(settings)  # read when a process starts
        ours, theirs = (run_alone(_peak, case, tokenizer_directory, side) / 2**20 for side in ("ours", "transformers"))
        for name in settings:
            del os.environ[name]
        name = f"{case.name}, {case.precision}: peak memory{heap}"
        figures += [
            Figure(f"{name}, ours / transformers", ours / theirs, "ratio", bar),
            Figure(f"{name}, ours", ours, "MiB"),
            Figure(f"{name}, transformers", theirs, "MiB"),
        ]
    return figures


def _speed(case: Case, tokenizer_directory: Path) -> tuple[float, float, float]:
    """Tokens/s of both sides and the median ratio of pairs of steps."""
    config, tokenizer = _config(case), ChatTokenizer(tokenizer_directory)
    steps = _steps(case, config, tokenizer)
    num_tokens = [sum(len(sample.ids) - 1 for sample in samples) for samples, _ in steps]
    warm_up = max(3, len(steps))  # every shape once
    with state.process_group(get_platform("cpu")), state.model_parallel(config.parallel, 0) as groups:
        our_step, their_step = _ours(config, tokenizer, steps, groups), _theirs(config, tokenizer, steps)
        times = np.array(
            [
                [_timed(step, number % len(steps)) for step in (our_step, their_step)]
                for number in range(warm_up + PAIRS)
            ]
        )[warm_up:]
    tokens = np.array([num_tokens[number % len(steps)] for number in range(warm_up, warm_up + PAIRS)])
    ours, theirs = tokens.sum() / times.sum(0)
    return float(ours), float(theirs), float(np.median(times[:, 1] / times[:, 0]))


def _timed(step: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def _peak(case: Case, tokenizer_directory: Path, side: str) -> int:
    """Bytes that the process grows by at most while it makes the model and trains some steps."""
    config, tokenizer = _config(case), ChatTokenizer(tokenizer_directory)
    steps = _steps(case, config, tokenizer)
    with state.process_group(get_platform("cpu")), state.model_parallel(config.parallel, 0) as groups:

        def run() -> None:
            made = _ours(config, tokenizer, steps, groups) if side == "ours" else _theirs(config, tokenizer, steps)
            for number in range(2 * len(steps)):
                made(number % len(steps))

        return growth(run)


def _config(case: Case) -> RunConfig:
    num_samples = len(case.lengths[0])
    return onevision_config(
        **case.model,
        model__language__max_positions=4096,
        data__max_sequence_tokens=4096,
        data__packed=str(case.packed).lower(),
        train__global_batch=num_samples,
        train__micro_batch=num_samples,
        train__steps=10000,
        optim__lr=1e-4,
        optim__min_lr=1e-5,
        precision=case.precision,
    )


Step = tuple[list[Sample], dict[str, torch.Tensor]]


def _steps(case: Case, config: RunConfig, tokenizer: ChatTokenizer) -> list[Step]:
    """Each step's samples, and the same as transformers takes them."""
    random = np.random.default_rng(0)
    rules, processor = TileRules.of_model(config.model), reference_processor(config, tokenizer)
    steps = []
    for lengths in case.lengths:
        samples, pictures = [], []
        for length in lengths:
            shapes = [case.pictures[random.integers(len(case.pictures))]] if case.pictures else []
            mine = [random_picture(shape, random) for shape in shapes]
            grids = tilings_of(mine, rules)
            side = rules.tile_size
            tiles = [np.zeros((0, side, side, 3), np.uint8)]
            tiles += [tiles_of(picture, grid) for picture, grid in zip(mine, grids, strict=True)]
            # Text of ids below the control tokens.
            ids = [tokenizer.control(IMAGE)] * sum(grid.num_features for grid in grids)
            ids += random.integers(1, 200, length).tolist()
            trained = np.arange(len(ids)) >= len(ids) - int(case.trained * length)
            samples.append(Sample(np.array(ids), trained, np.concatenate(tiles), grids))
            pictures.append(mine)
        steps.append((samples, _for_transformers(samples, pictures, processor, tokenizer.control(PAD))))
    return steps


def _for_transformers(samples: list[Sample], pictures: list, processor, pad: int) -> dict[str, torch.Tensor]:
    """The samples padded on the right, as its data collators do."""
    longest = max(len(sample.ids) for sample in samples)
    ids = np.full((len(samples), longest), pad)
    labels, seen = np.full_like(ids, -100), np.zeros_like(ids)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length], seen[row, :length] = sample.ids, 1
        labels[row, :length] = np.where(sample.trained, sample.ids, -100)
    inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if not seen.all():
        inputs["attention_mask"] = torch.from_numpy(seen)
    if pictures[0]:
        made = processor.image_processor(pictures, return_tensors="pt")
        inputs |= {name: made[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    return inputs


def _ours(
    config: RunConfig, tokenizer: ChatTokenizer, steps: list[Step], groups: ProcessGroupCollection
) -> Callable[[int], float]:
    platform, patches = get_platform("cpu"), config.model.vision.patches_per_tile
    torch.set_num_threads(THREADS)
    batches = [collate(samples, tokenizer.control(PAD), patches, Form.of_run(config)) for samples, _ in steps]
    chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
    tensors = r4b_tensors(config, *reference_models(config))
    dtype = DTYPES[config.precision]
    from_hf(chunks, model_table(config.model), {name: tensor.to(dtype) for name, tensor in tensors.items()})
    trainee = build_trainee(config, chunks, groups)
    return lambda number: train_step(trainee, [batches[number]], platform.device()).loss


def _theirs(config: RunConfig, tokenizer: ChatTokenizer, steps: list[Step]) -> Callable[[int], float]:
    torch.set_num_threads(THREADS)
    model = reference_model(config, tokenizer.control(IMAGE)).train()
    model.config.use_cache = False
    optim, bf16 = config.optim, config.precision == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True)

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**steps[number][1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
