"""Micro-batches: labels, masks, where features go, and the same samples for any number of ranks."""

import itertools
import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from megatron_mm.chat.images import TileRules, feature_order
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, Sample, render_sample
from megatron_mm.chat.tokenizer import IMAGE, PAD, TURN_END, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.handover import pack, unpack
from megatron_mm.data.index import INDEX
from megatron_mm.data.loader import Batch, Form, MicroBatches, collate
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.sources.base import RawSample
from tests.datasets import encoded, turn, write_dataset
from tests.tiny import random_picture, tiny_config

BLEND = "{digits/easy/thinking: 1, digits/hard/non_thinking: 1, digits/caption/non_thinking: 2}"


def _dataset(digits: Path, tokenizer: ChatTokenizer, rank: int, ranks: int, **overrides: object) -> MicroBatches:
    values = {"data__path": digits, "data__blend": BLEND}
    values |= {"model__language__vocab_size": 384, "train__global_batch": 8, "train__micro_batch": 2}
    return MicroBatches(tiny_config(**{**values, **overrides}), tokenizer, rank, ranks)


def _sample(
    text: str, pictures: tuple[Image.Image, ...], response: Response, tokenizer: ChatTokenizer, rules: TileRules
) -> Sample:
    content = Conversation.of(Question.about(text, pictures), response)
    return render_sample(content, Rendering.PRETRAIN, tokenizer, rules)


def _picture(digits: Path) -> list[Image.Image]:
    data = PreparedData(str(digits))
    row = next(part.first for part in data.index.parts if part.part == "digits/caption/non_thinking")
    return decode_with_pillow(data.read(row).pictures, "")


def test_labels_follow_the_ids_and_padding_is_not_trained(digits: Path, tokenizer: ChatTokenizer) -> None:
    for batch in _dataset(digits, tokenizer, 0, 1).step(0):
        # The last target of a sample, the end of its turn, is not an input.
        inner = (batch.trained[:, :-1] > 0) & (batch.labels[:, :-1] != tokenizer.control(TURN_END))
        assert inner.any()
        assert torch.equal(batch.ids[:, 1:][inner], batch.labels[:, :-1][inner])
        padding = batch.labels == tokenizer.control(PAD)
        assert not batch.trained[padding].any()
        assert int((batch.ids == tokenizer.control(IMAGE)).sum()) == len(batch.order)
        assert batch.tiles is not None
        assert batch.tiles.shape == (4, 32, 32, 3)


def test_the_trained_labels_are_the_trained_tokens_of_the_samples(tokenizer: ChatTokenizer) -> None:
    rules = TileRules(((1, 1),), 32, 4)
    answers = [Response("7", "3+4=7"), Response("12"), Response("1", "a longer thought")]
    samples = [_sample("How many?", (), answer, tokenizer, rules) for answer in answers]
    batch = collate(samples, tokenizer.control(PAD), patches_per_tile=16)
    for sample, labels, trained in zip(samples, batch.labels, batch.trained, strict=True):
        assert labels[trained > 0].tolist() == sample.ids[sample.trained].tolist()


@pytest.mark.parametrize(("sample_multiple", "sequence_multiple"), [(1, 1), (4, 4), (6, 12)])
def test_a_pack_holds_what_the_padded_batch_holds(
    tokenizer: ChatTokenizer, sample_multiple: int, sequence_multiple: int
) -> None:
    rules, pad = TileRules(((1, 1),), 32, 4), tokenizer.control(PAD)
    answers = [Response("7", "3+4=7"), Response("12"), Response("1", "a longer thought")]
    samples = [_sample("How many?", (), answer, tokenizer, rules) for answer in answers]
    padded = collate(samples, pad, 16)
    pack = collate(samples, pad, 16, Form(True, sample_multiple, sequence_multiple))
    assert pack.starts is not None
    assert pack.starts[0] == 0
    assert pack.starts[-1] == pack.ids.shape[1]
    assert pack.ids.shape[1] % sequence_multiple == 0
    assert pack.num_tokens == padded.num_tokens
    for row, (start, end) in enumerate(itertools.pairwise(pack.starts.tolist())):
        assert (end - start) % sample_multiple == 0
        length = len(samples[row].ids) - 1
        inside = slice(start, start + length)
        for ours, theirs in ((pack.ids, padded.ids), (pack.labels, padded.labels), (pack.trained, padded.trained)):
            assert torch.equal(ours[0, inside], theirs[row, :length])
        assert not pack.trained[0, start + length : end].any()


def test_downscaled_features_are_numbered_behind_all_others(tokenizer: ChatTokenizer) -> None:
    random = np.random.default_rng(0)
    rules = TileRules(((1, 1), (2, 2)), 32, 4, max_tiles=1)
    sets = [(random_picture((64, 64), random),), (random_picture((32, 32), random), random_picture((64, 60), random))]
    samples = [_sample("What?", pictures, Response("7"), tokenizer, rules) for pictures in sets]
    batch = collate(samples, tokenizer.control(PAD), 16)
    grids = [grid for sample in samples for grid in sample.tilings]
    assert [grid.downscaled is not None for grid in grids] == [True, False, True]
    newline = 16 * (5 + 2 + 5)
    assert len(batch.downscales) == 2
    extra = [downscale.size[0] * downscale.size[1] for downscale in batch.downscales]
    assert batch.order[batch.order > newline].tolist() == list(range(newline + 1, newline + 1 + sum(extra)))
    # The planes take the tiles of their own picture.
    assert 16 <= int(batch.downscales[0].plane.min()) < int(batch.downscales[0].plane.max()) < 16 * 5
    assert int(batch.downscales[1].plane.min()) >= 16 * 8


def test_order_points_into_the_tiles_of_the_right_picture(digits: Path, tokenizer: ChatTokenizer) -> None:
    (picture,) = _picture(digits)
    rules = TileRules(((1, 1), (1, 2)), 32, 4)
    wide = picture.resize((64, 32))
    samples = [
        _sample("What?", pictures, Response("7"), tokenizer, rules) for pictures in ((picture,), (), (wide, picture))
    ]
    batch = collate(samples, tokenizer.control(PAD), patches_per_tile=16)
    assert batch.tiles is not None
    num_tiles = 2 + 3 + 2
    assert len(batch.tiles) == num_tiles
    first = [0, 2, 5]
    expected = [
        np.where(order < 0, num_tiles * 16, order + 16 * start)
        for start, order in zip(
            first, [feature_order(grid) for sample in samples for grid in sample.tilings], strict=True
        )
    ]
    assert np.array_equal(batch.order.numpy(), np.concatenate(expected))


def test_padding_can_be_cut_by_sequence_parallel_ranks(digits: Path, tokenizer: ChatTokenizer) -> None:
    dataset = _dataset(digits, tokenizer, 0, 1, parallel__tensor=2, parallel__sequence="true")
    assert all(batch.ids.shape[1] % 2 == 0 for step in range(3) for batch in dataset.step(step))


def test_an_index_that_counts_other_tokens_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    write_dataset(tmp_path / "data", tokenizer, {"a": [RawSample("one", turn("Why?", "because"))]})
    index = tmp_path / "data" / INDEX
    table = pa.ipc.open_file(str(index)).read_all()
    tokens = pc.add(table["text_tokens"], pa.scalar(1, pa.int32()))  # pyright: ignore[reportAttributeAccessIssue]
    table = table.set_column(table.schema.get_field_index("text_tokens"), "text_tokens", tokens)
    with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    dataset = _dataset(tmp_path / "data", tokenizer, 0, 1, data__blend="{}")
    with pytest.raises(InputError, match=r"a\.tar at byte 512 has \d+ tokens, but the index says"):
        dataset[0]


def test_too_small_a_vocabulary_is_named(digits: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError, match=r"more than model\.language\.vocab_size=128"):
        _dataset(digits, tokenizer, 0, 1, model__language__vocab_size=128)


@pytest.mark.parametrize("multi_image", ["anyres", "square"])
@pytest.mark.parametrize("packed", ["false", "true"])
def test_the_plan_counts_the_tokens_and_tiles_that_are_read(
    tmp_path: Path, tokenizer: ChatTokenizer, multi_image: str, packed: str
) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number in range(24):
        shapes = [tuple(random.integers(5, 90, 2).tolist()) for _ in range(number % 4)]
        pictures = tuple(encoded(random_picture((width, height), random)) for width, height in shapes)
        samples.append(RawSample(str(number), turn("What?", "x" * number or "x", None, number % 4), pictures))
    write_dataset(tmp_path / "data", tokenizer, {"a": samples})
    overrides = {"model__tile_grids": "[[1, 1], [1, 2], [2, 1], [2, 2]]", "model__multi_image": multi_image}
    overrides |= {"data__packed": packed, "train__global_batch": 1, "train__micro_batch": 1, "model__max_tiles": 2}
    config_overrides = {"data__blend": "{}", "data__max_sequence_tokens": 512, **overrides}
    dataset = _dataset(tmp_path / "data", tokenizer, 0, 1, **config_overrides)
    for step in range(dataset.plan.num_units(0)):
        (batch,), units = dataset.step(step), dataset.plan.global_batch(step)
        assert batch.num_tokens == dataset.plan.sizes.tokens[units.rows].sum()
        tiles = 0 if batch.tiles is None else len(batch.tiles)
        assert tiles == dataset.plan.sizes.tiles[units.rows].sum()


def test_a_dataset_can_be_sent_to_another_process(digits: Path, tokenizer: ChatTokenizer) -> None:
    """As loader workers that are not forked get it."""
    dataset = _dataset(digits, tokenizer, 1, 2)
    dataset.find(0)
    sent = pickle.loads(pickle.dumps(dataset))  # noqa: S301 (our own)
    for number in range(5):
        assert torch.equal(sent[number].ids, dataset[number].ids)


def test_a_batch_is_handed_over_as_one_block(digits: Path, tokenizer: ChatTokenizer) -> None:
    batch = replace(_dataset(digits, tokenizer, 0, 1).step(0)[0], tiles=None, order=torch.empty(0, dtype=torch.int64))
    packed = pack((batch, torch.arange(6).reshape(2, 3).T, torch.tensor(True)))
    # Tensors keep their type, shape and order, and can be written to.
    assert packed.block.dtype is torch.uint8
    for first, _ in packed.places:
        assert first % 64 == 0
    assert len(packed.description) < 2000 < len(packed.block)
    unpacked, turned, flag = unpack(packed)
    for field in fields(Batch):
        expected, found = getattr(batch, field.name), getattr(unpacked, field.name)
        if isinstance(expected, torch.Tensor):
            assert found.dtype is expected.dtype
            assert torch.equal(found, expected)
        else:
            assert found == expected
    assert torch.equal(turned, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert flag.item() is True
    unpacked.ids.add_(1)
    assert torch.equal(unpacked.ids, batch.ids + 1)
