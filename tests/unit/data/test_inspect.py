"""What is shown of a data set is what the model sees of it, and the numbers are those of its samples."""

import base64
import dataclasses
import io
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Rendering, Sample, render_ids, render_sample
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data import plan as plan_module
from megatron_mm.data import summary as summary_module
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.digits import build_tokenizer
from megatron_mm.data.index import INDEX, ROWS, Index, duplicates_of, write_index
from megatron_mm.data.inspect import choose_rows, inspect_data, visible
from megatron_mm.data.plan import Plan
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.shards import TOKENIZER, EncodedPicture, PreparedData, ShardWriter, tokenizer_fingerprint
from megatron_mm.data.summary import open_plan, summarise, tables_of
from tests.tiny import random_picture, tiny_config

NASTY = "<script>alert('x & y')</script> <image> <|im_end|> 你好 🦊 \ufffd tab\there \x1b[31m [bold]no[/bold]"
SHARD = "all-00000.tar"
Entry = tuple[str, str, StoredContent, list[EncodedPicture]]


def _encoded(shape: tuple[int, int], random: np.random.Generator) -> EncodedPicture:
    content = io.BytesIO()
    random_picture(shape, random).save(content, format="PNG")
    return EncodedPicture(content.getvalue(), "png", *shape)


def _entries() -> list[Entry]:
    """(split, source, content, pictures) of every kind, with duplicates, a long sample, and pictures side by side."""
    random = np.random.default_rng(0)
    entries: list[Entry] = []
    for number in range(14):
        turn = StoredTurn([0, f"\nHow many? {NASTY * (number % 3 == 0)}"], f"answer {number} 🦊", "one, two, 三")
        shape = (int(random.integers(8, 90)), int(random.integers(8, 90)))
        entries.append(("train", "demo", StoredContent((turn,)), [_encoded(shape, random)]))
        turns = (StoredTurn(["Hello?"], NASTY), StoredTurn([f"And {number % 7}?"], "x" * (5 * (number % 7) + 1)))
        entries.append(("train", "demo", StoredContent(turns, "Be brief."), []))
        document = StoredContent(document=[f"Page {number} ", 0, 1, f" shows {NASTY}"])
        entries.append(("train", "notes", document, [_encoded((40, 64), random), _encoded((20, 16), random)]))
    entries.append(("train", "notes", StoredContent(document=[0, "No end. " * 500]), [_encoded((30, 30), random)]))
    entries.append(("heldout", "demo", StoredContent((StoredTurn(["Hi?"], "hi"),)), []))
    return entries


def _texts(content: StoredContent) -> list[str]:
    texts = [part for part in content.parts if isinstance(part, str)]
    return texts + [text for turn in content.turns for text in (turn.answer, turn.reasoning) if text]


def _row(entry: Entry, place: tuple[int, int], tokenizer: ChatTokenizer) -> dict[str, object]:
    split, source, content, pictures = entry
    blank = [Image.new("RGB", (1, 1))] * len(pictures)
    no_features = [0] * len(pictures)
    try:
        cold_start = len(render_ids(content.content(blank), no_features, Rendering.COLD_START, tokenizer)[0])
    except InputError:
        cold_start = -1
    return {
        "split": split,
        "part": f"{source}/{content.mode}",
        "shard": SHARD,
        "offset": place[0],
        "text_bytes": place[1],
        "text_tokens": len(render_ids(content.content(blank), no_features, Rendering.PRETRAIN, tokenizer)[0]),
        "cold_start_tokens": cold_start,
        "picture_bytes": [len(picture.content) for picture in pictures],
        "picture_width": [picture.width for picture in pictures],
        "picture_height": [picture.height for picture in pictures],
        "digest": content.digest([picture.content for picture in pictures]),
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set."""
    directory = tmp_path_factory.mktemp("inspect") / "data"
    directory.mkdir()
    entries = _entries()
    texts = [text for _, _, content, _ in entries[:3] for text in _texts(content)]
    build_tokenizer(texts, 340).save_pretrained(directory / TOKENIZER)
    tokenizer = ChatTokenizer(directory / TOKENIZER)
    with ShardWriter(directory / SHARD) as writer:
        places = [writer.add(entry[2], entry[3], f"<b>file</b>.jsonl:{n}") for n, entry in enumerate(entries)]
    rows = [_row(entry, place, tokenizer) for entry, place in zip(entries, places, strict=True)]
    write_index(
        directory / INDEX, pa.Table.from_pylist(rows, schema=ROWS), tokenizer_fingerprint(directory / TOKENIZER)
    )
    return directory


def _config(directory: Path, **overrides: object) -> RunConfig:
    values = {"data__path": directory, "data__blend": "{}", "train__global_batch": 1}
    return tiny_config(**{**values, "model__language__max_positions": 100_000, **overrides})


def _samples(directory: Path, config: RunConfig, rows: Sequence[int]) -> list[Sample]:
    """Rendered as training does."""
    data = PreparedData(str(directory))
    tokenizer, rules = data.tokenizer(), TileRules.of_model(config.model)
    samples = []
    for row in rows:
        stored = data.read(row)
        content = stored.content.content(decode_with_pillow(stored.pictures, stored.name))
        samples.append(render_sample(content, Rendering(config.data.rendering), tokenizer, rules))
    return samples


def _shown(config: RunConfig, **arguments: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=250, force_terminal=False, color_system=None)
    inspect_data(config, console=console, **arguments)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _trained_spans(sample: Sample, tokenizer: ChatTokenizer) -> list[str]:
    """Decoded runs of targets; the first token is none."""
    targets = np.concatenate([[False], sample.trained[1:], [False]])
    edges = np.flatnonzero(targets[1:] != targets[:-1]) + 1
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [tokenizer.decode(sample.ids[first:end].tolist()) for first, end in pairs]


@pytest.mark.parametrize("rendering", ["pretrain", "anneal", "cold_start"])
def test_sums_over_parts_are_those_of_the_samples(prepared: Path, rendering: str) -> None:
    config = _config(prepared, data__rendering=rendering)
    summary, (data, plan) = summarise(config), open_plan(config, "train")
    image = data.tokenizer().control(IMAGE)
    for counts, part in zip(summary.parts, data.index.ranges("train"), strict=True):
        rows = [row for row in range(part.first, part.first + part.count) if plan.sizes.fits[row]]
        samples = _samples(prepared, config, rows)
        assert (counts.name, counts.samples) == (part.part, len(rows))
        assert counts.left_out == part.count - len(rows)
        assert counts.tokens == sum(len(sample.ids) - 1 for sample in samples)
        assert counts.placeholder_tokens == sum(int((sample.ids == image).sum()) for sample in samples)
        assert counts.pictures == sum(len(sample.tilings) for sample in samples)
        assert counts.tiles == sum(len(sample.tiles) for sample in samples)
    for field in (field.name for field in dataclasses.fields(summary.total) if field.name != "name"):
        sums = [sum(getattr(part, field) for part in group) for group in (summary.parts, summary.modes)]
        assert sums == [getattr(summary.total, field)] * 2
    assert [mode.name for mode in summary.modes] == ["document", "non_thinking", "thinking"]
    assert summary.total.left_out == (15 if rendering == "cold_start" else 1)


def test_histograms_hold_every_sample_in_its_bin(prepared: Path) -> None:
    config = _config(prepared)
    summary, (data, plan) = summarise(config), open_plan(config, "train")
    rows = [row for part in data.index.ranges("train") for row in range(part.first, part.first + part.count)]
    kept = [row for row in rows if plan.sizes.fits[row]]
    samples = _samples(prepared, config, kept)
    for histogram, values in (
        (summary.lengths, [len(sample.ids) - 1 for sample in samples]),
        (summary.tiles, [len(sample.tiles) for sample in samples]),
    ):
        assert sum(histogram.counts) == len(kept)
        for label, count in zip(histogram.labels, histogram.counts, strict=True):
            first, _, last = label.replace(",", "").rstrip("+").partition("-")
            end = int(last or first) if not label.endswith("+") else 2**31
            assert count == sum(int(first) <= value <= end for value in values), label
    assert summary.tiles.labels == ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33+")
    assert summary.longest == int(plan.sizes.tokens[rows].max()) > config.data.max_sequence_tokens


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blend", ["{}", "{demo/thinking: 3, notes/*: 1}"])
def test_packing_is_that_of_the_plans_units(prepared: Path, packed: bool, blend: str) -> None:
    config = _config(prepared, data__packed=packed, data__max_sequence_tokens=2048, data__blend=blend)
    summary, (data, plan) = summarise(config), open_plan(config, "train")
    num_units = sum(plan.num_units(window) for window in range(plan.epoch_windows()))
    # One unit a step.
    rows = [plan.global_batch(step).rows for step in range(num_units)]
    tokens = plan.sizes.tokens[np.concatenate(rows)].sum()
    packing = summary.packing
    assert (packing.units, packing.windows, packing.looked_at) == (num_units, 1, 1)
    assert packing.filled == pytest.approx(tokens / (num_units * 2048))
    assert packing.most_tiles == max(int(plan.sizes.tiles[unit].sum()) for unit in rows)
    assert packing.steps == num_units
    assert (num_units < len(np.concatenate(rows))) == packed
    assert summary.total.seen_tokens == tokens
    for counts, part in zip(summary.parts, data.index.ranges("train"), strict=True):
        seen = [row for unit in rows for row in unit if part.first <= row < part.first + part.count]
        assert counts.seen_tokens == plan.sizes.tokens[seen].sum()
    is_blended = {counts.name: counts.seen_tokens > 0 for counts in summary.parts}
    assert is_blended["demo/non_thinking"] == (blend == "{}")


def test_an_epoch_of_many_windows_is_estimated(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 8)
    config = _config(prepared, data__packed=True, data__max_sequence_tokens=2048)
    whole = summarise(config)
    exact = whole.packing
    monkeypatch.setattr(summary_module, "MOST_WINDOWS", 2)
    summary = summarise(config)
    assert (exact.windows, exact.looked_at, summary.packing.looked_at) == (6, 6, 2)
    assert summary.packing.units == pytest.approx(exact.units, rel=0.3)
    assert "estimated from 2 of 6 windows" in str(tables_of(summary))
    assert "estimated" not in str(tables_of(whole))


def test_duplicates_are_counted_in_groups_as_well(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PreparedData(str(prepared)).index
    ranges = index.ranges("train")
    digests = pa.array([index.digest(row) for part in ranges for row in range(part.first, part.first + part.count)])
    expected = int(duplicates_of(pa.chunked_array([digests])).sum())
    assert expected == 7
    assert summarise(_config(prepared)).duplicates == expected
    monkeypatch.setattr(summary_module, "STRETCH", 3)
    assert summarise(_config(prepared)).duplicates == expected


def test_stretches_change_nothing(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summarise(_config(prepared))
    monkeypatch.setattr(summary_module, "STRETCH", 3)
    assert summarise(_config(prepared)) == whole


@pytest.mark.parametrize("rendering", ["pretrain", "anneal"])
def test_trained_spans_are_the_decoded_targets(prepared: Path, rendering: str) -> None:
    config = _config(prepared, data__rendering=rendering, data__max_sequence_tokens=2048)
    data, plan = open_plan(config, "train")
    rows = choose_rows(data.index, plan, "train", 12, None)
    assert sorted(rows) == sorted(np.concatenate([plan.global_batch(step).rows for step in range(12)]).tolist())
    text, tokenizer = _shown(config, num_samples=12), data.tokenizer()
    spans = [span for sample in _samples(prepared, config, rows) for span in _trained_spans(sample, tokenizer)]
    # Tabs become spaces in a terminal.
    assert re.findall("⟦(.*?)⟧", re.sub(" +", " ", text), re.DOTALL) == [
        re.sub("[ \t]+", " ", visible(span)) for span in spans
    ]
    assert "\x1b" not in text
    assert "␛[31m [bold]no[/bold]" in text
    assert "你好 🦊" in text


def test_colours_take_the_place_of_marks(prepared: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, width=250, force_terminal=True, color_system="standard", _environ={})
    inspect_data(_config(prepared), 1, "demo/non_thinking", console=console)
    assert "⟦" not in file.getvalue()
    assert "\x1b[32mHello" not in file.getvalue()
    assert re.search("\x1b\\[32m[^\x1b]*<script>alert", file.getvalue())
    assert "\x1b[31m" not in file.getvalue()


def test_pictures_stand_as_one_line_each(prepared: Path) -> None:
    config = _config(prepared)
    text = _shown(config, num_samples=1, part="notes/*")
    (sample,) = _samples(prepared, config, choose_rows(*_chosen(config), "train", 1, "notes/*"))
    for number, (size, grid) in enumerate(zip(((40, 64), (20, 16)), sample.tilings, strict=True), start=1):
        cut = f"{grid.columns} x {grid.rows} tiles + whole, {grid.num_features} tokens]"
        assert f"[picture {number}: {size[0]} x {size[1]}, {cut}" in text
    assert f"{len(sample.ids) - 1:,} tokens, {sample.trained[1:].sum():,} trained, {len(sample.tiles)} tiles" in text
    # As text a user wrote, not as a control token: the two pictures' placeholders are not shown.
    assert text.count("<image>") == 1


def _chosen(config: RunConfig) -> tuple[Index, Plan]:
    data, plan = open_plan(config, "train")
    return data.index, plan


class _Page(HTMLParser):
    """Tags, text of the tokens by section, and pictures."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: set[str] = set()
        self.sources: defaultdict[str, list[str]] = defaultdict(list)
        self.sections: list[list[tuple[str, str, str]]] = []
        self._token: tuple[str, str] | None = None
        self._text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag == "section":
            self.sections.append([])
        elif tag == "img":
            self.sources[values["class"]].append(values["src"])
        elif tag == "span" and "class" in values:
            self._token, self._text = (values["class"], values["title"]), ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._token and self.sections:
            self.sections[-1].append((*self._token, self._text))
            self._token = None


@pytest.mark.parametrize("packed", [False, True])
def test_the_page_holds_tokens_and_tiles(prepared: Path, tmp_path: Path, packed: bool) -> None:
    config = _config(prepared, data__packed=packed, data__max_sequence_tokens=2048)
    file = tmp_path / "page.html"
    file.write_text("an older one")
    rows = choose_rows(*_chosen(config), "train", 8, None)
    _shown(config, num_samples=8, html=file)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = _Page(file.read_text(encoding="utf-8"))
    samples, tokenizer = _samples(prepared, config, rows), PreparedData(str(prepared)).tokenizer()
    assert page.tags & {"script", "b", "image"} == set()
    tiles = np.concatenate([sample.tiles for sample in samples])
    assert len(page.sources["tile"]) == len(tiles) > 0
    for source, tile in zip(page.sources["tile"], tiles, strict=True):
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), tile)
    sizes = [size for row in rows for size in PreparedData(str(prepared)).index.sizes_of(row)]
    assert [_shown_size(source) for source in page.sources["original"]] == sizes
    text = file.read_text(encoding="utf-8")
    assert text.count("<table>") == text.count('<div class="scroll"') > 0
    for part in ('name="viewport"', "prefers-color-scheme: dark", "<dt>recipe</dt><dd>tiny</dd>", "<dt>tokenizer</dt>"):
        assert part in text
    assert f"<dt>made</dt><dd>{datetime.now().year}-" in text
    assert re.search(r"<th>tokens</th>.*<span>0</span><span>\d+ samples</span>", text)
    for tokens, sample in zip(page.sections, samples, strict=True):
        _check_tokens(tokens, sample, tokenizer)


def _shown_size(source: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).size


def _check_tokens(tokens: list[tuple[str, str, str]], sample: Sample, tokenizer: ChatTokenizer) -> None:
    image, ids, trained, text = tokenizer.control(IMAGE), [], [], ""
    for kinds, title, shown in tokens:
        listed = re.fullmatch(r"(\d+) x (\d+), masked", title)
        found = [int(listed[2])] * int(listed[1]) if listed else [int(word) for word in title.split(",")[0].split()]
        ids += found
        trained += ["trained" in kinds.split()] * len(found)
        text += "" if listed else shown
        assert title.endswith("trained" if trained[-1] else "masked")
        # Only tokens of one character share a border; a sign that looks like a part of one takes the next along.
        assert listed or len(found) == 1 or len(shown) <= 2 or "\ufffd" in shown, shown
    assert ids == sample.ids.tolist()
    assert trained == [False, *sample.trained[1:].tolist()]
    assert text == visible(tokenizer.decode([token for token in ids if token != image]))


def test_large_tiles_are_made_small(prepared: Path, tmp_path: Path) -> None:
    config = _config(prepared, model__vision__image_size=512, data__max_sequence_tokens=100_000)
    _shown(config, num_samples=1, part="notes/*", html=tmp_path / "page.html")
    sources = _Page((tmp_path / "page.html").read_text(encoding="utf-8")).sources["tile"]
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(content)).size == (192, 192)
    assert sources


def test_samples_of_every_part_are_shown_in_turn(prepared: Path) -> None:
    index, plan = _chosen(_config(prepared))
    parts = {part.part for part in index.ranges("train")}
    assert len(parts) == 3
    for number in (None, 3):
        rows = choose_rows(index, plan, "train", number, None)
        assert [index.part_of(row) for row in rows] == sorted(parts)
    assert len(choose_rows(index, plan, "train", 7, None)) == len(set(choose_rows(index, plan, "train", 7, None))) == 7
    assert {index.part_of(row) for row in choose_rows(index, plan, "train", 12, None)[:3]} == parts
    index, plan = _chosen(_config(prepared, data__blend="{demo/*: 1.0e6, notes/*: 1}"))
    rows = choose_rows(index, plan, "train", None, None)
    assert {index.part_of(row) for row in rows} == parts, "one that the first steps lack"
    index, plan = _chosen(_config(prepared, data__blend="{demo/*: 1}"))
    rows = choose_rows(index, plan, "train", None, None)
    assert len(rows) == 3
    assert {index.part_of(row) for row in rows} == {"demo/thinking", "demo/non_thinking"}


def test_a_part_is_shown_at_even_distances(prepared: Path) -> None:
    index, plan = _chosen(_config(prepared))
    first = next(part.first for part in index.ranges("train") if part.part == "notes/document")
    # The last row of the part is too long.
    assert choose_rows(index, plan, "train", 3, "notes/*") == [first, first + 6, first + 13]
    assert len(choose_rows(index, plan, "train", 99, "notes/*")) == 14
    assert choose_rows(index, plan, "train", 0, None) == []
    with pytest.raises(InputError, match=r"no part 'x/\*' in split 'train'; it has demo/non_thinking"):
        choose_rows(index, plan, "train", 3, "x/*")
    with pytest.raises(InputError, match="-1 samples"):
        choose_rows(index, plan, "train", -1, None)
    index, plan = _chosen(_config(prepared, data__rendering="cold_start"))
    with pytest.raises(InputError, match="can be trained on"):
        choose_rows(index, plan, "train", 3, "demo/non_thinking")


def test_given_rows_and_the_heldout_split(prepared: Path) -> None:
    index, _ = _chosen(_config(prepared))
    heldout = index.ranges("heldout")[0].first
    text = _shown(_config(prepared), rows=[heldout], split="heldout")
    assert f"row {heldout} · demo/non_thinking" in text
    assert "from <b>file</b>.jsonl:43" in text
    with pytest.raises(InputError, match="has no row 99; its rows are 0 to 43"):
        _shown(_config(prepared), rows=[99])


def test_a_damaged_sample_is_named_and_the_others_are_shown(prepared: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    shutil.copytree(prepared, directory)
    config = _config(directory)
    index, plan = _chosen(config)
    damaged, whole = choose_rows(index, plan, "train", 2, "demo/thinking")
    with (directory / SHARD).open("r+b") as shard:
        shard.seek(int(index.offset[damaged]))
        shard.write(b"#")
    text = _shown(config, rows=[damaged, whole], html=tmp_path / "page.html")
    assert f"row {damaged} · demo/thinking · broken" in text
    assert text.count("has changed since it was written") == 1
    assert f"row {whole} · demo/thinking · " in text
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("has changed since it was written") == 1


def test_a_page_that_cannot_be_written_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no directory .*missing"):
        _shown(_config(prepared), html=tmp_path / "missing" / "page.html")
    with pytest.raises(InputError, match="is a directory"):
        _shown(_config(prepared), html=tmp_path)
    with pytest.raises(InputError, match=r"data\.path is not given"):
        summarise(tiny_config(data__path="null"))
