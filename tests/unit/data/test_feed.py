"""The feed: one sequence of global batches for any ranks and workers; damaged samples, and killed workers."""

import hashlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.index import INDEX, Index
from megatron_mm.data.loader import Batch, Feed, MicroBatches
from megatron_mm.data.sources.base import RawSample
from tests.datasets import encoded, plan_for, synthetic_index, turn, write_dataset
from tests.tiny import tiny_config

STEPS = 6
RANKS = (1, 2, 3, 4, 8)


def _config(path: Path, *, packed: bool, num_workers: int = 0, **overrides: object) -> RunConfig:
    values: dict[str, object] = {"data__path": path, "data__blend": "{}", "data__packed": str(packed).lower()}
    values |= {"data__max_sequence_tokens": 192, "model__language__vocab_size": 384, "train__steps": STEPS}
    values |= {"train__global_batch": 24, "train__micro_batch": 1, "data__num_workers": num_workers}
    return tiny_config(**{**values, **overrides})


def _cut(batch: Batch, pad: int) -> list[list[int]]:
    """The samples' ids of a micro-batch, padding left out."""
    starts = batch.starts.tolist() if batch.starts is not None else [0, batch.ids.shape[1]]
    (ids,) = batch.ids.tolist()
    return [[token for token in ids[start:end] if token != pad] for start, end in itertools.pairwise(starts)]


def _bytes(batch: Batch) -> bytes:
    """Everything of a micro-batch that reaches the model."""
    tensors: list[Tensor | None] = [batch.ids, batch.labels, batch.trained, batch.starts, batch.tiles, batch.order]
    tensors += [downscale.plane for downscale in batch.downscales]
    return b"".join(b"-" if tensor is None else tensor.numpy().tobytes() for tensor in tensors)


def _global_batches(config: RunConfig, tokenizer: ChatTokenizer, ranks: int, first_step: int = 0) -> list[str]:
    """Fingerprint of each step's global batch: micro-batches of all ranks, in the order of their units."""
    datasets = [MicroBatches(config, tokenizer, rank, ranks) for rank in range(ranks)]
    steps = [list(Feed(dataset, first_step, config)) for dataset in datasets]
    digests = []
    for number in range(STEPS - first_step):
        units = datasets[0].plan.global_batch(first_step + number)
        whole: dict[int, bytes] = {}
        for rank in range(ranks):
            share = datasets[0].plan.share(units, rank, ranks)
            whole |= dict(zip(share, map(_bytes, steps[rank][number]), strict=True))
        assert sorted(whole) == list(range(len(units)))
        digests.append(hashlib.sha256(b"|".join(whole[unit] for unit in sorted(whole))).hexdigest())
    assert len(set(digests)) == len(digests)
    return digests


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_any_number_of_ranks_sees_the_same_bytes(digits: Path, tokenizer: ChatTokenizer, packed: bool) -> None:
    expected = _global_batches(_config(digits, packed=packed), tokenizer, 1)
    for ranks in RANKS[1:]:
        assert _global_batches(_config(digits, packed=packed), tokenizer, ranks) == expected


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_sees_the_same_bytes(digits: Path, tokenizer: ChatTokenizer, num_workers: int) -> None:
    expected = _global_batches(_config(digits, packed=True), tokenizer, 2)
    assert _global_batches(_config(digits, packed=True, num_workers=num_workers), tokenizer, 2) == expected


@pytest.mark.parametrize(("first_step", "ranks", "num_workers"), [(1, 3, 0), (4, 8, 0), (5, 1, 2)])
def test_resuming_with_other_ranks_goes_on_with_the_same_bytes(
    digits: Path, tokenizer: ChatTokenizer, first_step: int, ranks: int, num_workers: int
) -> None:
    expected = _global_batches(_config(digits, packed=True), tokenizer, 2)[first_step:]
    config = _config(digits, packed=True, num_workers=num_workers)
    assert _global_batches(config, tokenizer, ranks, first_step) == expected


def test_each_of_100_000_samples_is_seen_once_an_epoch(tmp_path: Path) -> None:
    """By digest, over ranks that change at every step."""
    lengths = np.random.default_rng(0).integers(5, 250, 100_000).tolist()
    index = synthetic_index(tmp_path, {"a/thinking": lengths[:70_000], "b/document": lengths[70_000:]})
    config = _config(tmp_path, packed=True, data__max_sequence_tokens=1024, model__language__max_positions=1024)
    plan = plan_for(index, config)
    num_units = sum(plan.num_units(window) for window in range(plan.epoch_windows()))
    seen: Counter[bytes] = Counter()
    left = num_units
    for step in range(-(-num_units // 24)):
        units = plan.global_batch(step)
        ranks = RANKS[step % len(RANKS)]
        for rank in range(ranks):
            # The last step goes on into the next epoch.
            mine = (unit for unit in plan.share(units, rank, ranks) if unit < left)
            seen.update(index.digest(int(row)) for unit in mine for row in units[unit])
        left -= len(units)
    assert len(seen) == 100_000
    assert set(seen.values()) == {1}


def test_packs_hold_what_single_samples_hold(digits: Path, tokenizer: ChatTokenizer) -> None:
    """An epoch of the packed feed against an epoch of the padded one, sample by sample."""

    def samples(packed: bool) -> Counter[tuple[bytes, ...]]:
        config = _config(digits, packed=packed, train__global_batch=1, data__blend="{digits/*: 1}")
        dataset = MicroBatches(config, tokenizer, 0, 1)
        windows = range(dataset.plan.epoch_windows())
        found: Counter[tuple[bytes, ...]] = Counter()
        for step in range(sum(dataset.plan.num_units(window) for window in windows)):
            for batch in dataset.step(step):
                found.update(_taken_apart(batch, tokenizer))
        return found

    singles = samples(packed=False)
    assert sum(singles.values()) == 5 * 60
    assert samples(packed=True) == singles


def _taken_apart(batch: Batch, tokenizer: ChatTokenizer) -> list[tuple[bytes, ...]]:
    """Ids, labels, mask, and the tiles that each sample's placeholders show, of every sample of a micro-batch."""
    starts = batch.starts.tolist() if batch.starts is not None else [0, batch.ids.shape[1]]
    assert batch.tiles is not None
    patches = 16
    num_newlines = len(batch.tiles) * patches
    is_placeholder = batch.ids[0] == tokenizer.control(IMAGE)
    place_of_feature = torch.cumsum(is_placeholder, 0) - 1
    found = []
    for start, end in itertools.pairwise(starts):
        ids, labels, trained = (tensor[0, start:end] for tensor in (batch.ids, batch.labels, batch.trained))
        order = batch.order[place_of_feature[start:end][is_placeholder[start:end]]]
        tile_of = order[order < num_newlines] // patches
        first, last = int(tile_of.min()), int(tile_of.max())
        local = torch.where(order < num_newlines, order - first * patches, -1)
        length = int((ids != tokenizer.control(PAD)).sum())
        parts = (ids[:length], labels[:length], trained[:length], local, batch.tiles[first : last + 1])
        found.append(tuple(part.numpy().tobytes() for part in parts))
    return found


def _written(directory: Path, tokenizer: ChatTokenizer, count: int) -> list[RawSample]:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]
    samples = [
        RawSample(f"sample {number}", turn("What?", str(number), num_pictures=1), (encoded(picture),))
        for number, picture in enumerate(pictures)
    ]
    write_dataset(directory, tokenizer, {"a": samples})
    return samples


def _damage(directory: Path, rows: Sequence[int]) -> None:
    index = Index(directory / INDEX)
    with (directory / "a.tar").open("r+b") as file:
        for row in rows:
            file.seek(int(index.offset[row]) + 1024 + 60)
            file.write(b"damage")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_left_out_named_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, capfd: pytest.CaptureFixture[str], packed: bool, num_workers: int
) -> None:
    _written(tmp_path / "data", tokenizer, 30)
    _damage(tmp_path / "data", [7])
    config = _config(
        tmp_path / "data", packed=packed, num_workers=num_workers, train__global_batch=6, data__max_broken=0.01
    )
    dataset = MicroBatches(config, tokenizer, 0, 1)
    feed = Feed(dataset, 0, config)
    batches = [batch for step in feed for batch in step]
    expected = Counter(int(row) for step in range(STEPS) for row in dataset.plan.global_batch(step).rows)
    assert feed.num_broken == expected[7] >= 1
    assert feed.num_samples == sum(expected.values())
    message = capfd.readouterr().err
    assert message.count("left out: sample") == expected[7]
    assert "a.tar at byte" in message
    # The others are all there, and nothing is learned in the place of the damaged one.
    whole = [ids for batch in batches for ids in _cut(batch, tokenizer.control(PAD)) if ids]
    assert len(whole) == sum(expected.values()) - expected[7]
    for batch in batches:
        if batch.broken and not any(_cut(batch, tokenizer.control(PAD))):
            assert not batch.trained.any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_damaged_samples_end_the_run(tmp_path: Path, tokenizer: ChatTokenizer, num_workers: int) -> None:
    _written(tmp_path / "data", tokenizer, 30)
    _damage(tmp_path / "data", range(30))
    config = _config(tmp_path / "data", packed=False, num_workers=num_workers, train__global_batch=6)
    with pytest.raises(InputError, match=r"2 of 2 samples cannot be used, more than data\.max_broken=0\.001"):
        list(Feed(MicroBatches(config, tokenizer, 0, 1), 0, config))


def test_a_killed_worker_is_started_again_and_nothing_is_lost(digits: Path, tokenizer: ChatTokenizer) -> None:
    plain = _config(digits, packed=True, train__steps=60)
    expected = [_bytes(batch) for step in Feed(MicroBatches(plain, tokenizer, 0, 1), 0, plain) for batch in step]
    config = _config(digits, packed=True, num_workers=2, train__steps=60)
    found, others = [], set(_children())
    for number, batches in enumerate(Feed(MicroBatches(config, tokenizer, 0, 1), 0, config)):
        found += [_bytes(batch) for batch in batches]
        if number == 3:
            os.kill(min(set(_children()) - others), signal.SIGKILL)
            time.sleep(0.5)  # the death must not be raised here
    assert found == expected


def test_workers_that_are_killed_again_and_again_end_the_run(
    digits: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mm.data.loader.MAX_RESTARTS", 0)
    config = _config(digits, packed=True, num_workers=1, train__steps=60)
    others = set(_children())

    def kill_always() -> None:
        for _ in Feed(MicroBatches(config, tokenizer, 0, 1), 0, config):
            os.kill(min(set(_children()) - others), signal.SIGKILL)

    with pytest.raises(InputError, match=r"loader workers were killed 1 times; .* Lower data\.num_workers"):
        kill_always()


def _children() -> list[int]:
    me = os.getpid()
    return [int(child) for child in Path(f"/proc/{me}/task/{me}/children").read_text(encoding="utf-8").split()]
