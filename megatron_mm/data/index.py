"""The columnar index of a prepared data set: one Arrow IPC file, read by mapping it into memory.

Rows are ordered by split and part, so that a part is a range of rows. Columns:

    split, part         dictionary of text; a part is "source/mode"
    shard               int32, number of the shard in the metadata's list
    offset              int64, of the JSON's first byte in the shard; the pictures' tar members follow it
    text_bytes          int32, of the JSON
    text_tokens         int32, ids of the whole sample without placeholders, rendered for pretraining or annealing
    cold_start_tokens   int32, the same for the cold start; -1 where a response has no reasoning
    picture_bytes       list of int32, of each encoded picture
    picture_size        list of int32, number of the picture's (width, height) in the metadata's table
    digest              16 bytes, of texts and pictures, see records.py

Metadata: `megatron_mm` is JSON (version, tokenizer, fingerprint, shards, ranges of the parts), `picture_sizes` int32
[sizes, 2].
"""

import fnmatch
import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_mm.config.errors import InputError

INDEX = "index.arrow"
TOKENIZER = "tokenizer"
# Of a sample's content, see records.py.
DIGEST_BYTES = 16
VERSION = 2
METADATA = b"megatron_mm"
SIZES = b"picture_sizes"

# What a task of `prepare` writes for each of its samples.
ROWS = pa.schema(
    [
        ("split", pa.string()),
        ("part", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("text_bytes", pa.int32()),
        ("text_tokens", pa.int32()),
        ("cold_start_tokens", pa.int32()),
        ("picture_bytes", pa.list_(pa.int32())),
        ("picture_width", pa.list_(pa.int32())),
        ("picture_height", pa.list_(pa.int32())),
        ("digest", pa.binary(DIGEST_BYTES)),
    ]
)


@dataclass(frozen=True, slots=True)
class PartRange:
    """Rows [first, first + count) of the index."""

    split: str
    part: str
    first: int
    count: int


def write_index(path: Path, rows: pa.Table, tokenizer: str) -> None:
    """Order the rows and write the index.

    Args:
        path: file to write.
        rows: of `ROWS`, in the order in which samples of a part shall stand.
        tokenizer: fingerprint of the tokenizer that counted the tokens.
    """
    split, part, shard = (rows[name].combine_chunks().dictionary_encode() for name in ("split", "part", "shard"))
    names = [np.array(column.dictionary.to_pylist(), dtype=str) for column in (split, part)]
    codes = [np.asarray(column.indices) for column in (split, part)]
    # Parts in the order of their names, training first.
    order = np.lexsort((names[1].argsort().argsort()[codes[1]], -names[0].argsort().argsort()[codes[0]]))
    widths, heights = (rows[name].combine_chunks() for name in ("picture_width", "picture_height"))
    keys = np.asarray(widths.values).astype(np.int64) << 32 | np.asarray(heights.values)
    distinct, sizes = np.unique(keys, return_inverse=True)
    table = pa.table(
        {
            "split": split,
            "part": part,
            "shard": shard.indices.cast(pa.int32()),
            **{name: rows[name] for name in ("offset", "text_bytes", "text_tokens", "cold_start_tokens")},
            "picture_bytes": rows["picture_bytes"],
            "picture_size": pa.ListArray.from_arrays(widths.offsets, pa.array(sizes.astype(np.int32))),
            "digest": rows["digest"],
        }
    ).take(pa.array(order))
    table = table.combine_chunks()
    metadata = {
        "version": VERSION,
        "tokenizer": tokenizer,
        "fingerprint": _fingerprint(table, tokenizer),
        "shards": shard.dictionary.to_pylist(),
        "parts": [asdict(part) for part in _ranges(names, [code[order] for code in codes])],
    }
    table_of_sizes = np.stack([distinct >> 32, distinct & 0xFFFFFFFF], 1).astype("<i4")
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata), SIZES: table_of_sizes.tobytes()})
    # One batch, so that each column is one array in the mapped file.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(len(table), 1))


class Index:
    """An index, mapped into memory: opening takes no time, and only what is looked at is read.

    Attributes:
        path: of the file.
        fingerprint: changes with any sample, its place in the order, or the tokenizer.
        tokenizer: fingerprint of the tokenizer that counted.
        shards: names of the tar files.
        parts: ranges of rows.
        picture_sizes: int64 [sizes, 2], (width, height).
        shard, offset, text_bytes, text_tokens, cold_start_tokens: [rows], see above.
        picture_starts: int [rows + 1], where each row's pictures begin in the two arrays that follow.
        picture_bytes, picture_size: int32 [pictures].
        digests: of 16 bytes, [rows].

    Raises:
        InputError: the file is missing, cut off, of another version, or not an index.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                batch = reader.get_batch(0)
                metadata: dict[str, Any] = json.loads(reader.schema.metadata[METADATA])
                sizes = np.frombuffer(reader.schema.metadata[SIZES], "<i4")
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"no prepared data in {path.parent} ({INDEX} is missing); make it with `megatron-mm data prepare`"
            ) from None
        except (pa.ArrowInvalid, KeyError, TypeError, OSError) as error:
            raise InputError(f"{path} is not a whole index: {error}; prepare the data again") from None
        if metadata["version"] != VERSION:
            raise InputError(f"{path} has version {metadata['version']}, not {VERSION}; prepare the data again")
        self.fingerprint: str = metadata["fingerprint"]
        self.tokenizer: str = metadata["tokenizer"]
        self.shards: list[str] = metadata["shards"]
        self.parts = [PartRange(**part) for part in metadata["parts"]]
        self.picture_sizes = sizes.reshape(-1, 2).astype(np.int64)
        columns = ("shard", "offset", "text_bytes", "text_tokens", "cold_start_tokens")
        self.shard, self.offset, self.text_bytes, self.text_tokens, self.cold_start_tokens = (
            batch.column(name).to_numpy() for name in columns
        )
        pictures, sizes_of = batch.column("picture_bytes"), batch.column("picture_size")
        self.picture_starts = pictures.offsets.to_numpy()
        self.picture_bytes, self.picture_size = pictures.values.to_numpy(), sizes_of.values.to_numpy()
        self.digests = batch.column("digest")

    def __len__(self) -> int:
        return len(self.shard)

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        """Another process maps the file itself."""
        return Index, (self.path,)

    def digest(self, row: int) -> bytes:
        """Of a row."""
        return self.digests[row].as_py()

    def sizes_of(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of a row's pictures."""
        numbers = self.picture_size[self.picture_starts[row] : self.picture_starts[row + 1]]
        return [(int(width), int(height)) for width, height in self.picture_sizes[numbers]]

    def part_of(self, row: int) -> str:
        """Name of a row's part."""
        return next(part.part for part in self.parts if part.first <= row < part.first + part.count)

    def parts_like(self, pattern: str, split: str) -> list[PartRange]:
        """Parts of a split whose names match a pattern of a blend.

        Raises:
            InputError: there is none.
        """
        ranges = self.ranges(split)
        matching = [part for part in ranges if fnmatch.fnmatchcase(part.part, pattern)]
        if not matching:
            known = ", ".join(part.part for part in ranges)
            raise InputError(
                f"data.blend names {pattern!r}, which {self.path.parent} does not hold in its split {split!r}; it "
                f"holds {known}. Name some of these, or give data.blend={{}} to see every sample once an epoch"
            )
        return matching

    def ranges(self, split: str) -> list[PartRange]:
        """Parts of a split.

        Raises:
            InputError: there is none.
        """
        found = [part for part in self.parts if part.split == split]
        if not found:
            raise InputError(f"{self.path} holds no sample of split {split!r}")
        return found


def duplicates_of(digests: pa.ChunkedArray) -> np.ndarray:
    """Which rows repeat an earlier one: bool [rows]."""
    codes = np.asarray(digests.combine_chunks().dictionary_encode().indices)
    _, first = np.unique(codes, return_index=True)
    is_repeated = np.ones(len(codes), bool)
    is_repeated[first] = False
    return is_repeated


def _ranges(names: list[np.ndarray], codes: list[np.ndarray]) -> list[PartRange]:
    changes = np.flatnonzero(np.diff(codes[0]) | np.diff(codes[1])) + 1
    edges = [0, *changes.tolist(), len(codes[0])] if len(codes[0]) else [0]
    return [
        PartRange(str(names[0][codes[0][first]]), str(names[1][codes[1][first]]), first, end - first)
        for first, end in itertools.pairwise(edges)
    ]


def _fingerprint(table: pa.Table, tokenizer: str) -> str:
    hasher = hashlib.blake2b(f"{VERSION} {tokenizer}".encode(), digest_size=8)
    for name in ("digest", "text_tokens", "cold_start_tokens"):
        for chunk in table[name].chunks:
            hasher.update(chunk.buffers()[1])
    return hasher.hexdigest()
