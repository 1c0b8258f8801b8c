"""A mix of samples like R-4B's stage 3, from which synthetic indices are made.

The paper gives 37M samples of 145B tokens (3,900 a sample), 13.3% of them text and 22.9% mathematics and K12, the rest
captions, OCR, documents, grounding, tables and charts (arXiv 2508.21113v2, appendix B.2). The shares within the rest,
the pictures' sizes and the lengths of the texts are ours: texts are drawn from measured lengths (lengths.json beside
this file), pictures from common shapes, each side scaled by 0.8 to 1.25. So a sample has 3,711 tokens on average.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_mm.data.index import ROWS, write_index

LENGTHS = Path(__file__).parent / "lengths.json"
# Tokens of the ChatML around one question and its answer, the empty thought or tags included.
FRAME_TOKENS = 16
PHOTOS = ((640, 480), (480, 640), (1024, 768), (768, 1024), (500, 375), (800, 600))
PAGES = ((1240, 1754), (1654, 2339), (850, 1100), (1600, 1200))
FIGURES = ((300, 250), (450, 300), (600, 400), (350, 350))
SCREENS = ((1280, 720), (1920, 1080), (900, 700), (700, 500))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of sample.

    Attributes:
        share: of the samples.
        pictures: shapes to choose from; empty for text.
        text: kinds of lengths.json whose lengths are added up.
        mode: of the part.
    """

    share: float
    pictures: tuple[tuple[int, int], ...]
    text: tuple[str, ...]
    mode: str = "non_thinking"


KINDS = {
    "text": Kind(0.133, (), ("short captions", "long thoughts", "long thoughts"), "thinking"),
    "math": Kind(0.229, FIGURES, ("short thoughts", "long thoughts"), "thinking"),
    "caption": Kind(0.20, PHOTOS, ("short captions", "dense captions")),
    "ocr": Kind(0.12, (*PAGES, *SCREENS), ("short captions", "dense captions")),
    "document": Kind(0.12, PAGES, ("short captions", "long thoughts")),
    "grounding": Kind(0.06, PHOTOS, ("short captions", "short thoughts")),
    "table": Kind(0.138, SCREENS, ("short captions", "short thoughts")),
}


def text_lengths(kind: Kind, count: int, random: np.random.Generator) -> np.ndarray:
    """Tokens of the texts of `count` samples: float64 [count]."""
    measured = json.loads(LENGTHS.read_text(encoding="utf-8"))["kinds"]
    tokens = np.zeros(count)
    for text in kind.text:
        quantiles = measured[text]["quantiles"]
        tokens += np.interp(random.random(count), np.linspace(0, 1, len(quantiles)), quantiles)
    return tokens


def write_stage3_index(path: Path, num_samples: int, seed: int = 0) -> None:
    """Write an index of `num_samples` samples that exist in it alone."""
    random = np.random.default_rng(seed)
    tables = []
    counts = np.diff(np.round(np.cumsum([0, *(kind.share for kind in KINDS.values())]) * num_samples)).astype(int)
    for (name, kind), count in zip(KINDS.items(), counts, strict=True):
        tokens = FRAME_TOKENS + text_lengths(kind, count, random)
        num_pictures = count if kind.pictures else 0
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) if num_pictures else np.zeros(count + 1, np.int32))
        shapes = np.array(kind.pictures or ((1, 1),))[random.integers(max(len(kind.pictures), 1), size=num_pictures)]
        sides = (shapes * random.uniform(0.8, 1.25, (num_pictures, 2))).astype(np.int32)
        lists = {
            "picture_bytes": np.full(num_pictures, 100_000, np.int32),
            "picture_width": sides[:, 0],
            "picture_height": sides[:, 1],
        }
        values = {
            "split": _same("train", count),
            "part": _same(f"{name}/{kind.mode}", count),
            "shard": pa.DictionaryArray.from_arrays(
                (np.arange(count) // 2048).astype(np.int32),
                [f"{name}-{shard:05d}.tar" for shard in range(count // 2048 + 1)],
            ),
            "offset": (np.arange(count) % 2048) * 110_000,
            "text_bytes": np.full(count, 2000, np.int32),
            "text_tokens": tokens.astype(np.int32),
            "cold_start_tokens": np.full(count, -1, np.int32),
            **{
                field: pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(sides)))
                for field, sides in lists.items()
            },
            "digest": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(16), count, [None, pa.py_buffer(random.bytes(16 * count))]
            ),
        }
        tables.append(pa.table({field: values[field] for field in ROWS.names}))
    write_index(path, pa.concat_tables(tables).unify_dictionaries(), "synthetic")


def _same(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [text])
