"""Samples and a summary as one HTML file, which needs nothing beside it: styles and pictures are inside."""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.config.errors import InputError
from megatron_mm.data.summary import Histogram, Table
from megatron_mm.files import refuse_unwritable_file

# Longest side of a tile, and of the picture that it is of, in the page; in pixels.
MOST_PIXELS = 192
MOST_ORIGINAL_PIXELS = 768
# Tiles up to this side stay without loss; larger ones are JPEG, a tenth of the size.
LOSSLESS_PIXELS = 64

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #222; --faint: #666; --line: #ddd; --rule: #888; --bar: #5b8fc9; --fault: #a00;
  --masked: #f1f1f1; --masked-ink: #666; --edge: rgba(0, 0, 0, .35); --trained: #bfe8cc; --trained-ink: #06381a;
  --control-ink: #7a2f9b; --picture: #ffe9b8; --picture-ink: #5a4300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #dcdcdc; --faint: #9a9a9a; --line: #3a3d42; --rule: #777; --bar: #4a7db5; --fault: #ff8a80;
    --masked: #24272b; --masked-ink: #a0a0a0; --edge: rgba(255, 255, 255, .3); --trained: #14472a;
    --trained-ink: #c9f2d6; --control-ink: #d9a5ef; --picture: #4d3d10; --picture-ink: #ffe3a1;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 75em; padding: 0 1em;
  color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.6em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1em; color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
div.scroll { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; }
caption { text-align: left; font-weight: bold; }
th, td { border-bottom: 1px solid var(--line); padding: .1em .7em; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 5em; }
.bar { width: 25em; min-width: 8em; padding: .1em 0; }
.bar div { background: var(--bar); height: .9em; }
th.bar { font-weight: normal; color: var(--faint); }
th.bar div { display: flex; justify-content: space-between; background: none; height: auto; }
section { border-top: 2px solid var(--rule); margin-top: 2em; }
h2 { font-size: 1em; overflow-wrap: anywhere; }
p.broken { color: var(--fault); }
figure { margin: .5em 0 1em; }
figcaption { color: var(--faint); }
div.tiles { display: flex; flex-wrap: wrap; gap: 12px; align-items: start; }
div.grid { display: grid; gap: 2px; }
img { display: block; outline: 1px solid var(--rule); }
img.original { max-width: min(100%, 24em); min-width: 64px; }
img.tile { width: 192px; image-rendering: pixelated; }
div.grid img.tile { width: min(192px, max(48px, calc(288px / var(--columns)))); }
div.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.9 ui-monospace, monospace; }
.token { border-left: 1px solid var(--edge); color: var(--masked-ink); background: var(--masked); }
.token.trained { color: var(--trained-ink); background: var(--trained); }
.token.control { font-weight: bold; color: var(--control-ink); }
.token.picture { background: var(--picture); color: var(--picture-ink); }
.token[data-ends]::before { content: attr(data-ends); opacity: .5; }
"""


@dataclass(frozen=True, slots=True)
class PageToken:
    """What stands between two borders.

    Attributes:
        text: shown.
        title: shown under the pointer.
        kinds: classes of `STYLE`.
    """

    text: str
    title: str
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PagePicture:
    """A picture as the model sees it.

    Attributes:
        caption: under it.
        original: the picture as it is stored, encoded.
        columns: of the grid of tiles behind the first one; 0 where there are none.
        tiles: uint8 [T, h, w, 3].
    """

    caption: str
    original: bytes
    columns: int
    tiles: np.ndarray


@dataclass(frozen=True, slots=True)
class PageSample:
    """A sample; `broken` says why there is nothing of it to show."""

    header: str
    pictures: tuple[PagePicture, ...] = ()
    tokens: tuple[PageToken, ...] = ()
    broken: str | None = None


def check_page(path: Path) -> None:
    """Raise `InputError` where the page could not be written."""
    refuse_unwritable_file(path, "page")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that a page shows.

    Attributes:
        facts: names and values under the title: what was looked at, how and when.
    """

    title: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    histograms: Sequence[Histogram]
    samples: Sequence[PageSample]


def write_page(path: Path, page: Page) -> None:
    """Write the page; one that is there already is replaced when the new one is whole.

    Raises:
        InputError: it cannot be written.
    """
    check_page(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_page(page))
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"page {path} cannot be written: {error.strerror}; choose another file") from None
    finally:
        partial.unlink(missing_ok=True)


def _page(page: Page) -> Iterator[str]:
    title = escape(page.title)
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in page.facts.items())
    yield f"<dl>\n{facts}</dl>\n"
    yield from map(_table, page.tables)
    yield from map(_histogram, page.histograms)
    if page.samples:
        yield _legend()
    for sample in page.samples:
        yield from _sample(sample)
    yield "</body>\n</html>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return _scrolling(f"<caption>{escape(table.title)}</caption>\n<tr>{head}</tr>\n{body}\n")


def _histogram(histogram: Histogram) -> str:
    bins = histogram.filled()
    most, total = max((count for _, count in bins), default=1), sum(histogram.counts) or 1
    rows = [
        f"<tr><td>{escape(label)}</td><td>{count:,}</td><td>{count / total:.1%}</td>"
        f'<td class="bar"><div style="width: {100 * count / most:.1f}%"></div></td></tr>\n'
        for label, count in bins
    ]
    axis = f'<th class="bar"><div><span>0</span><span>{most:,} samples</span></div></th>'
    head = f"<tr><th>{escape(histogram.unit)}</th><th>samples</th><th>share</th>{axis}</tr>\n"
    return _scrolling(f"<caption>{escape(histogram.title)}</caption>\n{head}{''.join(rows)}")


def _scrolling(rows: str) -> str:
    """A table that scrolls by itself where it is wider than the screen."""
    return f'<div class="scroll" tabindex="0"><table>\n{rows}</table></div>\n'


def _legend() -> str:
    tokens = [
        PageToken("trained", "a target of the loss", ("trained",)),
        PageToken("masked", "seen, but no target", ()),
        PageToken("control token", "never made of a text", ("control",)),
        PageToken("picture", "its run of placeholders", ("picture",)),
    ]
    return f'<div class="text">{"  ".join(map(_token, tokens))}</div>\n'


def _sample(sample: PageSample) -> Iterator[str]:
    yield f"<section>\n<h2>{escape(sample.header)}</h2>\n"
    if sample.broken is not None:
        yield f'<p class="broken">{escape(sample.broken)}</p>\n'
    yield from map(_picture, sample.pictures)
    yield f'<div class="text">{"".join(map(_token, sample.tokens))}</div>\n</section>\n'


def _picture(picture: PagePicture) -> str:
    whole, *grid = (_image(Image.fromarray(tile), "tile", MOST_PIXELS) for tile in picture.tiles)
    original = _image(Image.open(BytesIO(picture.original)), "original", MOST_ORIGINAL_PIXELS)
    columns = f"--columns: {picture.columns}; grid-template-columns: repeat({picture.columns}, max-content)"
    inside = f'<div class="grid" style="{columns}">{"".join(grid)}</div>' if grid else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure><div class="tiles">{original}{whole}{inside}</div>{caption}</figure>\n'


def _image(image: Image.Image, kind: str, most_pixels: int) -> str:
    """An image as an element with the pixels in it, made smaller where a side is longer than `most_pixels`."""
    name = "PNG" if max(image.size) <= LOSSLESS_PIXELS else "JPEG"
    image.thumbnail((most_pixels, most_pixels))
    encoded = BytesIO()
    image.save(encoded, format=name)
    content = base64.b64encode(encoded.getvalue()).decode("ascii")
    return f'<img class="{kind}" alt="{kind}" src="data:image/{name.lower()};base64,{content}">'


def _token(token: PageToken) -> str:
    kinds = escape(" ".join(("token", *token.kinds)))
    # Ends of lines have no width, and the number of them in one token is what decides the mode.
    ends = token.text.count("\n")
    shown = f' data-ends="{"↵" * ends}"' if ends else ""
    return f'<span class="{kinds}" title="{escape(token.title)}"{shown}>{escape(token.text)}</span>'
