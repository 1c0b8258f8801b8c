"""Samples and a summary as one HTML file, which needs nothing beside it: styles and pictures are inside."""

import base64
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.config.errors import InputError
from megatron_mm.data.summary import Histogram, Table

# Longest side of a tile on the page, in pixels.
MOST_PIXELS = 192
# Tiles up to this side stay without loss; larger ones are JPEG, a tenth of the size.
LOSSLESS_PIXELS = 64

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
caption { text-align: left; font-weight: bold; }
th, td { border-bottom: 1px solid #ddd; padding: .1em .7em; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 25em; }
td.bar div { background: #5b8fc9; height: .9em; }
section { border-top: 2px solid #888; margin-top: 2em; }
h2 { font-size: 1em; overflow-wrap: anywhere; }
p.broken { color: #a00; }
figure { display: inline-block; margin: .5em 1.5em .5em 0; vertical-align: top; }
div.tiles { display: flex; gap: 12px; align-items: start; }
div.grid { display: grid; gap: 2px; }
img.tile { display: block; min-width: 64px; max-width: 192px; image-rendering: pixelated; outline: 1px solid #bbb; }
div.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.9 ui-monospace, monospace; }
.token { border-left: 1px solid rgba(0, 0, 0, .35); color: #777; background: #f1f1f1; }
.token.trained { color: #06381a; background: #bfe8cc; }
.token.control { font-weight: bold; color: #7a2f9b; }
.token.picture { background: #ffe9b8; color: #5a4300; }
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
        columns: of the grid of tiles behind the first one; 0 where there are none.
        tiles: uint8 [T, h, w, 3].
    """

    caption: str
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
    if not path.parent.is_dir():
        raise InputError(f"page {path} cannot be written: there is no directory {path.parent}; create it")
    if path.is_dir():
        raise InputError(f"page {path} cannot be written: it is a directory; name a file in it")


def write_page(
    path: Path, title: str, tables: Sequence[Table], histograms: Sequence[Histogram], samples: Sequence[PageSample]
) -> None:
    """Write the page; one that is there already is replaced when the new one is whole.

    Raises:
        InputError: it cannot be written.
    """
    check_page(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_page(title, tables, histograms, samples))
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"page {path} cannot be written: {error.strerror}; choose another file") from None
    finally:
        partial.unlink(missing_ok=True)


def _page(
    title: str, tables: Sequence[Table], histograms: Sequence[Histogram], samples: Sequence[PageSample]
) -> Iterator[str]:
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    yield f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
    yield from map(_table, tables)
    yield from map(_histogram, histograms)
    if samples:
        yield _legend()
    for sample in samples:
        yield from _sample(sample)
    yield "</body>\n</html>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<caption>{escape(table.title)}</caption>\n<tr>{head}</tr>\n{body}\n</table>\n"


def _histogram(histogram: Histogram) -> str:
    bins = histogram.filled()
    most, total = max((count for _, count in bins), default=1), sum(histogram.counts) or 1
    rows = [
        f"<tr><td>{escape(label)}</td><td>{count:,}</td><td>{count / total:.1%}</td>"
        f'<td class="bar"><div style="width: {100 * count / most:.1f}%"></div></td></tr>\n'
        for label, count in bins
    ]
    return f"<table>\n<caption>{escape(histogram.title)}</caption>\n{''.join(rows)}</table>\n"


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
    whole, *grid = map(_tile, picture.tiles)
    columns = f"grid-template-columns: repeat({picture.columns}, max-content)"
    inside = f'<div class="grid" style="{columns}">{"".join(grid)}</div>' if grid else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure><div class="tiles">{whole}{inside}</div>{caption}</figure>\n'


def _tile(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] as an element with the pixels in it."""
    tile = Image.fromarray(pixels)
    name = "PNG" if max(tile.size) <= LOSSLESS_PIXELS else "JPEG"
    tile.thumbnail((MOST_PIXELS, MOST_PIXELS))
    encoded = BytesIO()
    tile.save(encoded, format=name)
    content = base64.b64encode(encoded.getvalue()).decode("ascii")
    return f'<img class="tile" alt="tile" src="data:image/{name.lower()};base64,{content}">'


def _token(token: PageToken) -> str:
    kinds = escape(" ".join(("token", *token.kinds)))
    # Ends of lines have no width, and the number of them in one token is what decides the mode.
    ends = token.text.count("\n")
    shown = f' data-ends="{"↵" * ends}"' if ends else ""
    return f'<span class="{kinds}" title="{escape(token.title)}"{shown}>{escape(token.text)}</span>'
