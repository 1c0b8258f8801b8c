"""A prepared data set on disk: tar shards of texts and pictures, the index, and the tokenizer that counted tokens.

    ocr-00000.tar      00000000.json, 00000000.0.jpg, 00000000.1.png, ...: see records.py (WebDataset's naming)
    index.arrow        see index.py
    tokenizer/
    manifest.json      what it was made of, and counts that add up
    rejects.jsonl      records that were left out, with the reason

Shards hold plain pictures only: 8-bit RGB or grey, upright, opaque (see sources/pictures.py).
"""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data.index import INDEX, TOKENIZER, Index
from megatron_mm.data.records import StoredContent
from megatron_mm.data.storage import open_storage

TOKENIZER_FILES = tuple(
    f"{TOKENIZER}/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
)
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A picture as it is stored; `extension` names its format, such as jpg."""

    content: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class StoredSample:
    """What a row of the index stands for.

    Attributes:
        name: where it lies, for messages.
        origin: the record it was made of.
    """

    name: str
    origin: str
    content: StoredContent
    pictures: list[bytes]


class ShardWriter:
    """Writes one tar file of samples; nothing is left of it where the block ends with an error."""

    def __init__(self, path: Path):
        self._path = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._count = 0

    def add(self, content: StoredContent, pictures: Sequence[EncodedPicture], origin: str) -> tuple[int, int]:
        """Append a sample.

        Returns:
            Offset and size of its JSON.
        """
        key = f"{self._count:08d}"
        self._count += 1
        text = json.dumps({**content.to_json(), "origin": origin}, ensure_ascii=False).encode()
        offset = self._append(f"{key}.json", text)
        for number, picture in enumerate(pictures):
            self._append(f"{key}.{number}.{picture.extension}", picture.content)
        return offset, len(text)

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def _append(self, name: str, content: bytes) -> int:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # after the member's header
        self._tar.addfile(member, BytesIO(content))
        return offset


class PreparedData:
    """Reads a prepared data set.

    Args:
        path: directory, or URL that fsspec opens.

    Raises:
        InputError: there is none, it is damaged, or its tokenizer is not the one that the index was made with.
    """

    def __init__(self, path: str):
        self._storage = open_storage(path)
        local = self._storage.local(INDEX, *TOKENIZER_FILES)
        self.path = path
        self.index = Index(local / INDEX)
        self.tokenizer_directory = local / TOKENIZER
        found = tokenizer_fingerprint(self.tokenizer_directory)
        if found != self.index.tokenizer:
            raise InputError(
                f"{path}/{TOKENIZER} is not the tokenizer that {INDEX} was made with (fingerprint {found}, not "
                f"{self.index.tokenizer}): its counts of tokens are wrong; prepare the data again"
            )

    def tokenizer(self) -> ChatTokenizer:
        """What the tokens were counted with."""
        return ChatTokenizer(self.tokenizer_directory)

    def read(self, row: int) -> StoredSample:
        """Read the sample of a row, in one piece, and check it.

        Raises:
            InputError: the shard is missing, cut off, or changed.
        """
        index = self.index
        shard, offset = index.shards[index.shard[row]], int(index.offset[row])
        sizes = [int(index.text_bytes[row])]
        sizes += index.picture_bytes[index.picture_starts[row] : index.picture_starts[row + 1]].tolist()
        # Each member is padded to whole blocks, and the next one's header is one more.
        starts, place = [], 0
        for size in sizes:
            starts.append(place)
            place += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
        num_bytes = starts[-1] + sizes[-1]
        content = self._storage.read(shard, offset, num_bytes)
        name = f"{self.path}/{shard} at byte {offset}"
        if len(content) < num_bytes:
            raise InputError(f"shard {self.path}/{shard} ends before byte {offset + num_bytes}; prepare the data again")
        text, *pictures = (content[start : start + size] for start, size in zip(starts, sizes, strict=True))
        try:
            tree = json.loads(text)
            stored = StoredSample(name, tree["origin"], StoredContent.from_json(tree), pictures)
        except (ValueError, KeyError, TypeError):
            stored = None
        if stored is None or stored.content.digest(pictures) != index.digest(row):
            raise InputError(f"sample {name} has changed since it was written (checksum); prepare the data again")
        return stored


def tokenizer_fingerprint(directory: Path) -> str:
    """Of a tokenizer directory.

    Raises:
        InputError: there is no tokenizer in it.
    """
    try:
        return hashlib.blake2b((directory / "tokenizer.json").read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise InputError(f"no tokenizer in {directory}: {error.strerror}; prepare the data again") from None
