"""Samples as the model sees them, and a summary of their data set, in the terminal and as a page.

In the terminal trained tokens are green and masked ones dim. Where there are no colours, as in a file, trained tokens
stand between ⟦ and ⟧.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import groupby, zip_longest
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from megatron_mm.chat.images import Tiling
from megatron_mm.chat.render import Sample
from megatron_mm.chat.tokenizer import CONTROL_TOKENS, IMAGE, ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.index import Index, PartRange
from megatron_mm.data.page import Page, PagePicture, PageSample, PageToken, check_page, write_page
from megatron_mm.data.plan import Plan
from megatron_mm.data.reader import BrokenSample, SampleReader
from megatron_mm.data.shards import PreparedData
from megatron_mm.data.summary import Histogram, Summary, Table, open_plan, summary_of, tables_of

TRAINED_START, TRAINED_END = "⟦", "⟧"
BAR_WIDTH = 40
# Samples that are shown where nobody says how many.
FEWEST_SAMPLES, MOST_SAMPLES = 3, 12
FILE_WIDTH = 200
# Characters that would steer the terminal, turn the direction of a line, or cannot be written as UTF-8.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PICTURES_OF_CONTROL = 0x2400


class Kind(StrEnum):
    """What a token is."""

    TEXT = "text"
    CONTROL = "control"
    PICTURE = "picture"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind, all of them trained or none: a stretch of text, a control token, or a picture.

    Attributes:
        ids: of its tokens.
        text: what they stand for; what a picture is like.
    """

    kind: Kind
    trained: bool
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class View:
    """A sample as the model sees it.

    Attributes:
        row: of the index.
        name: where it lies.
        origin: the record it was made of.
        pictures: as they are stored, encoded.
        sample: ids, mask and tiles.
        runs: all of its tokens.
    """

    row: int
    part: str
    name: str
    origin: str
    pictures: Sequence[bytes]
    sample: Sample
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        """Inputs of the language model: the last token is only a label."""
        return len(self.sample.ids) - 1

    @property
    def num_trained(self) -> int:
        """Targets of the loss."""
        return sum(len(run.ids) for run in self.runs if run.trained)

    @property
    def header(self) -> str:
        """One line about it."""
        counts = f"{self.num_tokens:,} tokens, {self.num_trained:,} trained, {len(self.sample.tiles):,} tiles"
        return visible(f"row {self.row} · {self.part} · {counts} · {self.name} · from {self.origin}")


@dataclass(frozen=True, slots=True)
class BrokenView:
    """A sample that cannot be read, which training leaves out."""

    row: int
    part: str
    reason: str

    @property
    def header(self) -> str:
        """One line about it."""
        return visible(f"row {self.row} · {self.part} · broken")


def inspect_data(
    config: RunConfig,
    num_samples: int | None = None,
    part: str | None = None,
    html: Path | None = None,
    split: str = "train",
    *,
    rows: Sequence[int] | None = None,
    console: Console | None = None,
) -> Summary:
    """Print samples and the summary, and write both to a page.

    Args:
        config: of the run that would train on them.
        num_samples: how many to show, taken in turn from the parts that the blend mixes; or where `part` is given, as
            many of its samples, at even distances. Left out, one of each part, 3 to 12.
        part: pattern of parts such as "ocr/*".
        html: file of the page.
        split: "train" or "heldout".
        rows: of the index, shown instead.
        console: printed on; left out, standard output.

    Raises:
        InputError: no such data, split, part or row; a number of samples below 0; the page cannot be written; see
            `view_of`.
    """
    console = console or _console()
    if html is not None:
        check_page(html)
    data, plan = open_plan(config, split)
    if rows is None:
        rows = choose_rows(data.index, plan, split, num_samples, part)
    # By Pillow whatever data.decoder says: a look needs no DALI.
    reader = SampleReader(data, plan.sizes, config, data.tokenizer(), decode_with_pillow)
    views = [view_of(row, reader) for row in rows]
    summary = summary_of(data, plan, config, split)
    for view in views:
        _print_view(view, console)
    tables, histograms = tables_of(summary), (summary.lengths, summary.tiles)
    for shown in (*map(_terminal_table, tables), *map(_terminal_histogram, histograms)):
        console.print(shown)
    if html is not None:
        page = Page(
            title=visible(f"{data.path}, {split}"),
            facts=_facts(config, data),
            tables=tables,
            histograms=histograms,
            samples=[_page_sample(view, reader.tokenizer) for view in views],
        )
        write_page(html, page)
    return summary


def _facts(config: RunConfig, data: PreparedData) -> dict[str, str]:
    """What a page says of how it was made."""
    blend = ", ".join(f"{pattern}: {weight:g}" for pattern, weight in config.data.blend.items())
    return {
        "recipe": visible(config.recipe),
        "rendering": config.data.rendering,
        "blend": visible(blend) or "every sample once an epoch",
        "tokenizer": visible(f"{data.tokenizer_directory} (fingerprint {data.index.tokenizer})"),
        "sizes": "width x height",
        "made": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
    }


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that no name in a table is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def choose_rows(index: Index, plan: Plan, split: str, num_samples: int | None, part: str | None) -> list[int]:
    """Rows to show; see `inspect_data`. Fewer where there are fewer that fit.

    Raises:
        InputError: `num_samples` is negative; no part has such a name; none of its samples fits.
    """
    if num_samples is None:
        num_samples = min(max(len(plan.parts), FEWEST_SAMPLES), MOST_SAMPLES) if part is None else FEWEST_SAMPLES
    if num_samples < 0:
        raise InputError(f"{num_samples} samples cannot be shown; ask for 0 or more")
    if part is None:
        return _rows_in_turn(index, plan, num_samples)
    ranges = index.ranges(split)
    matching = [found for found in ranges if fnmatch.fnmatchcase(found.part, part)]
    if not matching:
        known = ", ".join(found.part for found in ranges)
        raise InputError(f"{index.path.parent} holds no part {part!r} in split {split!r}; it has {known}")
    fitting = np.concatenate([found.first + np.flatnonzero(_fits(plan, found)) for found in matching])
    if not len(fitting):
        raise InputError(
            f"none of the samples of {part!r} in {index.path.parent} can be trained on with this config; raise "
            "data.max_sequence_tokens or data.max_pack_tiles, or choose another data.rendering"
        )
    places = np.linspace(0, len(fitting) - 1, min(num_samples, len(fitting))).round().astype(np.int64)
    return fitting[places].tolist()


def _rows_in_turn(index: Index, plan: Plan, num_samples: int) -> list[int]:
    """Rows of the first steps, one of each part after the other, so that every part is seen.

    Of a part that is not in these steps the first sample that fits comes.
    """
    by_part: dict[str, list[int]] = {part.part: [] for part in plan.parts}
    # Once each: a small data set begins again.
    for row in dict.fromkeys(row for step in range(num_samples) for row in plan.global_batch(step).rows.tolist()):
        by_part[index.part_of(row)].append(row)
    for part in plan.parts:
        if not by_part[part.part]:
            by_part[part.part] = (part.first + np.flatnonzero(_fits(plan, part))[:1]).tolist()
    turns = zip_longest(*by_part.values())
    return [row for turn in turns for row in turn if row is not None][:num_samples]


def _fits(plan: Plan, part: PartRange) -> np.ndarray:
    """Which samples of a part are trained on: bool [samples]."""
    return plan.sizes.fits[part.first : part.first + part.count]


def view_of(row: int, reader: SampleReader) -> View | BrokenView:
    """The sample of a row as training sees it.

    Raises:
        InputError: there is no such row; the index says something else of it.
    """
    index = reader.data.index
    if not 0 <= row < len(index):
        raise InputError(f"{index.path} has no row {row}; its rows are 0 to {len(index) - 1}")
    part = index.part_of(row)
    try:
        stored, sample = reader.read(row)
    except BrokenSample as error:
        return BrokenView(row, part, str(error))
    runs = tuple(runs_of(sample, index.sizes_of(row), reader.tokenizer))
    return View(row, part, stored.name, stored.origin, stored.pictures, sample, runs)


def runs_of(sample: Sample, sizes: Sequence[tuple[int, int]], tokenizer: ChatTokenizer) -> list[Run]:
    """The sample's tokens by runs.

    Args:
        sample: rendered.
        sizes: (width, height) of its pictures, in the order they stand.
        tokenizer: that it was rendered with.
    """
    image = tokenizer.control(IMAGE)
    controls = {tokenizer.control(token) for token in CONTROL_TOKENS}
    ids, trained = sample.ids.tolist(), sample.trained.tolist()
    # Nothing comes before the first token that could predict it, so it is never a target.
    trained[0] = False
    pictures = enumerate(zip(sample.tilings, sizes, strict=True), start=1)
    runs, position = [], 0
    while position < len(ids):
        if ids[position] == image:
            # Counted by the picture: two of them may stand side by side.
            number, (grid, size) = next(pictures)
            end, kind, text = position + grid.num_features, Kind.PICTURE, _described(number, grid, size)
        elif ids[position] in controls:
            end, kind, text = position + 1, Kind.CONTROL, tokenizer.decode(ids[position : position + 1])
        else:
            end = position + 1
            while end < len(ids) and ids[end] not in controls and trained[end] == trained[position]:
                end += 1
            # Decoded together: a character's bytes may be several tokens.
            kind, text = Kind.TEXT, tokenizer.decode(ids[position:end])
        runs.append(Run(kind, trained[position], tuple(ids[position:end]), text))
        position = end
    return runs


def visible(text: str) -> str:
    """Text with its control characters, but for ends of lines and tabs, replaced by signs that stand for them."""

    def sign(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(_PICTURES_OF_CONTROL + code) if code < 0x20 else f"\\u{code:04x}"

    return _UNSHOWABLE.sub(sign, text)


def _described(number: int, grid: Tiling, size: tuple[int, int]) -> str:
    """A picture in place of its placeholders; sizes are width x height, in pixels and in tiles."""
    cut = f"{grid.columns} x {grid.rows} tiles + whole" if grid.rows else "one square tile"
    scaled = " (scaled down)" if grid.downscaled else ""
    return f"[picture {number}: {size[0]} x {size[1]}, {cut}, {grid.num_features} tokens{scaled}]"


def _print_view(view: View | BrokenView, console: Console) -> None:
    console.print(Text(view.header, style="bold"), soft_wrap=True)
    if isinstance(view, BrokenView):
        console.print(Text(visible(view.reason), style="red"), soft_wrap=True)
    else:
        marked = console.color_system is None or console.no_color
        # Not wrapped by us: lines end where the sample's do.
        console.print(terminal_text(view.runs, marked=marked), soft_wrap=True)
    console.print()


def terminal_text(runs: Iterable[Run], *, marked: bool) -> Text:
    """Runs in colours; `marked`, with signs around what is trained as well."""
    text = Text()
    for trained, neighbours in groupby(runs, key=lambda run: run.trained):
        if marked and trained:
            text.append(TRAINED_START)
        for run in neighbours:
            text.append(visible(run.text), _style(run))
        if marked and trained:
            text.append(TRAINED_END)
    return text


def _style(run: Run) -> str:
    colour = "green" if run.trained else "dim"
    return {Kind.TEXT: colour, Kind.CONTROL: f"bold magenta {'underline' if run.trained else 'dim'}"}.get(
        run.kind, "yellow"
    )


def _terminal_table(table: Table) -> TerminalTable:
    # Text, not str, which rich would look for markup in.
    shown = TerminalTable(title=Text(visible(table.title)))
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    return shown


def _terminal_histogram(histogram: Histogram) -> TerminalTable:
    shown = TerminalTable(histogram.unit, "samples", "", title=histogram.title)
    shown.columns[1].justify = "right"
    bins = histogram.filled()
    most = max((count for _, count in bins), default=1)
    for label, count in bins:
        shown.add_row(label, f"{count:,}", "█" * -(-BAR_WIDTH * count // most))
    return shown


def _page_sample(view: View | BrokenView, tokenizer: ChatTokenizer) -> PageSample:
    if isinstance(view, BrokenView):
        return PageSample(view.header, broken=visible(view.reason))
    tokens = [token for run in view.runs for token in _page_tokens(run, tokenizer)]
    return PageSample(view.header, tuple(_page_pictures(view)), tuple(tokens))


def _page_pictures(view: View) -> list[PagePicture]:
    captions = [run.text for run in view.runs if run.kind is Kind.PICTURE]
    ends = np.cumsum([grid.num_tiles for grid in view.sample.tilings])[:-1]
    tiles = np.split(view.sample.tiles, ends) if captions else []
    return [
        PagePicture(caption, original, grid.columns, of_picture)
        for caption, original, grid, of_picture in zip(captions, view.pictures, view.sample.tilings, tiles, strict=True)
    ]


def _page_tokens(run: Run, tokenizer: ChatTokenizer) -> list[PageToken]:
    kinds = (run.kind.value, *(("trained",) if run.trained else ()))
    about = "trained" if run.trained else "masked"
    if run.kind is Kind.PICTURE:
        return [PageToken(run.text, f"{len(run.ids)} x {run.ids[0]}, {about}", kinds)]
    tokens, group = [], []
    for place, token in enumerate(run.ids, start=1):
        group.append(token)
        text = tokenizer.decode(group)
        # Cut inside of a character: shown with the tokens that hold the rest of its bytes.
        if text.endswith("\ufffd") and place < len(run.ids):
            continue
        tokens.append(PageToken(visible(text), f"{' '.join(map(str, group))}, {about}", kinds))
        group = []
    return tokens
