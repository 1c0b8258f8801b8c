"""A prepared data set on disk: tar shards of pictures and texts, a columnar index, and the tokenizer it was made with.

    train-00000.tar      00000000.png, 00000000.json, ...: a picture and its turns (WebDataset's naming)
    index.parquet        one row a turn: split, source, mode, and where picture and text lie
    tokenizer/

A turn is {"question", "answer", "reasoning" or null}. Its part, "source/mode", is what a blend names.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_mm.chat.images import read_picture
from megatron_mm.chat.modes import Mode
from megatron_mm.config.errors import InputError
from megatron_mm.files import appearing_whole

INDEX = "index.parquet"
TOKENIZER = "tokenizer"
PICTURES_PER_SHARD = 4096


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about a picture, and its answer; reasoning is None in a non-thinking turn."""

    source: str
    question: str
    answer: str
    reasoning: str | None = None

    @property
    def mode(self) -> Mode:
        """Thinking where there is reasoning."""
        return Mode.NON_THINKING if self.reasoning is None else Mode.THINKING


@dataclass(frozen=True, slots=True)
class Record:
    """A turn with its picture and the picture's caption."""

    name: str
    picture: Image.Image
    caption: str
    turn: Turn


class DatasetWriter:
    """Writes pictures with their turns into a directory; see `writing`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._rows: list[dict[str, object]] = []
        self._num_pictures: dict[str, int] = {}
        self._tars: dict[str, tarfile.TarFile] = {}

    def add(self, split: str, picture: Image.Image, caption: str, turns: list[Turn]) -> None:
        """Append a picture with its turns to a split."""
        number = self._num_pictures.get(split, 0)
        self._num_pictures[split] = number + 1
        shard = f"{split}-{number // PICTURES_PER_SHARD:05d}.tar"
        encoded = BytesIO()
        picture.save(encoded, format="PNG")
        texts = json.dumps({"caption": caption, "turns": [asdict(turn) for turn in turns]}).encode()
        row = {
            "split": split,
            "shard": shard,
            "picture_width": picture.width,
            "picture_height": picture.height,
            **self._append(shard, f"{number:08d}.png", encoded.getvalue(), "picture"),
            **self._append(shard, f"{number:08d}.json", texts, "text"),
        }
        for position, turn in enumerate(turns):
            self._rows.append({**row, "turn": position, "source": turn.source, "mode": str(turn.mode)})

    def finish(self) -> None:
        """Close the shards and write the index."""
        for tar in self._tars.values():
            tar.close()
        pq.write_table(pa.Table.from_pylist(self._rows), self.directory / INDEX)

    def _append(self, shard: str, name: str, content: bytes, kind: str) -> dict[str, int]:
        tar = self._tars.get(shard)
        if tar is None:
            tar = self._tars[shard] = tarfile.open(self.directory / shard, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        member = tarfile.TarInfo(name)
        member.size = len(content)
        offset = tar.offset + tarfile.BLOCKSIZE  # after the member's header
        tar.addfile(member, BytesIO(content))
        return {f"{kind}_offset": offset, f"{kind}_bytes": len(content)}


@contextmanager
def writing(directory: Path) -> Iterator[DatasetWriter]:
    """A writer whose directory appears under its name only when everything in it is complete.

    Raises:
        InputError: the directory exists already.
    """
    with appearing_whole(directory) as partial:
        writer = DatasetWriter(partial)
        yield writer
        writer.finish()


class PreparedData:
    """Reads one split of a prepared data set.

    Raises:
        InputError: there is no index, or the split is empty.
    """

    def __init__(self, directory: Path, split: str):
        index = directory / INDEX
        if not index.is_file():
            raise InputError(f"no prepared data in {directory} ({INDEX} is missing); make it with `megatron-mm data`")
        table = pq.read_table(index, filters=[("split", "=", split)])
        if not len(table):
            raise InputError(f"{index} holds no sample of split {split!r}")
        self.directory = directory
        self._columns = {name: table[name].to_numpy() for name in table.column_names}
        self.parts = np.char.add(
            np.char.add(self._columns["source"].astype(str), "/"), self._columns["mode"].astype(str)
        )

    def __len__(self) -> int:
        return len(self.parts)

    def rows_of(self, part: str) -> np.ndarray:
        """Row numbers of a part "source/mode": int64 [n].

        Raises:
            InputError: the data set has no such part.
        """
        rows = np.flatnonzero(self.parts == part)
        if not len(rows):
            known = ", ".join(sorted(set(self.parts.tolist())))
            raise InputError(f"data.blend names {part!r}, which {self.directory} does not hold; it holds {known}")
        return rows

    def read(self, row: int) -> Record:
        """Read the turn of a row with its picture.

        Raises:
            InputError: the shard is missing or cut off, or the picture cannot be decoded.
        """
        shard = str(self._columns["shard"][row])
        text = json.loads(self._bytes(shard, row, "text"))
        name = f"{self.directory / shard} at byte {self._columns['picture_offset'][row]}"
        picture = read_picture(BytesIO(self._bytes(shard, row, "picture")), name)
        return Record(name, picture, text["caption"], Turn(**text["turns"][self._columns["turn"][row]]))

    def _bytes(self, shard: str, row: int, kind: str) -> bytes:
        path = self.directory / shard
        offset, size = (int(self._columns[f"{kind}_{field}"][row]) for field in ("offset", "bytes"))
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise InputError(f"shard {path} cannot be read: {error.strerror}; prepare the data again") from None
        if len(content) < size:
            raise InputError(f"shard {path} ends before byte {offset + size}; it was cut off, prepare the data again")
        return content
