"""Headers of tar files: which samples they hold, and where their members' bytes are.

A file may be several archives one behind the other, as `cat` joins them: tar itself stops at the end of the first.
"""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_mm.config.errors import InputError
from megatron_mm.data.sources.base import FileRange
from megatron_mm.data.sources.picture_names import PICTURE_SUFFIXES

# WebDataset's rule: the key, with its directory, ends at the first dot of the file's name; other members are no data.
_TEXTS = {"txt", "json"}
_SKIP_BYTES = 2**20
_MEMBER = re.compile(r"(?:\./)?(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TarSample:
    """Members that share a key.

    Attributes:
        key: their name up to the first dot.
        members: by what follows the first dot, in small letters.
        fault: why the sample cannot be used, if its headers say so.
    """

    key: str
    members: dict[str, FileRange] = field(default_factory=dict)
    fault: str | None = None

    @property
    def merged(self) -> list[str]:
        """Names of the samples that became one because their names have dots; empty where it is one sample.

        Texts give them away that have pictures of the same name, or that are several where none has the sample's own
        name. Other members, such as `cat.detail.json` beside `cat.json`, are side data.
        """
        pairs = [extension.rpartition(".")[::2] for extension in self.members]
        owners = list(dict.fromkeys(stem for stem, last in pairs if last in _TEXTS))
        pictured = {stem for stem, last in pairs if f".{last}" in PICTURE_SUFFIXES}
        if "" in owners:
            owners = [stem for stem in owners if not stem or stem in pictured]
        if len(owners) < 2 or ("" in pictured and "" not in owners):
            return []
        return [f"{self.key}.{stem}".rstrip(".") for stem in owners]


def scan(path: Path) -> tuple[list[TarSample], str | None]:
    """Read the headers of a tar file.

    Returns:
        Its samples, in the order of their first members, and what is wrong with the archive's end, if anything is.

    Raises:
        InputError: it is no tar file, or a compressed one.
    """
    samples: list[TarSample] = []
    start: int | None = 0
    fault = None
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    members, end = _members(tar)
                found, is_cut = _samples(path, members, size)
                samples += found
                fault = None if is_cut else _fault_at(file, end)
                start = None if is_cut or fault else _next_archive(file, end)
    except (tarfile.TarError, OSError) as error:
        if start:
            return samples, f"what follows the archive's end at byte {start} is no archive: it is not read"
        raise InputError(
            f"{path} is no tar file, or a compressed one ({error}); unpack it, or copy it again if it is cut off"
        ) from None
    return samples, fault


def _samples(path: Path, members: list[tarfile.TarInfo], size: int) -> tuple[list[TarSample], bool]:
    """Samples of one archive's members, and whether the file ends within one of them."""
    samples: dict[str, TarSample] = {}
    is_cut = False
    for member in members:
        found = _MEMBER.fullmatch(member.name)
        is_past_end = member.offset_data + member.size > size and not member.isdir()
        is_cut = is_cut or (is_past_end and found is not None)
        if found is None or member.isdir():
            continue
        sample = samples.setdefault(found["key"], TarSample(found["key"]))
        extension = found["extension"].lower()
        fault = sample.fault
        if is_past_end:
            fault = f"archive ends before byte {member.offset_data + member.size}"
        elif not member.isreg() or member.issparse():
            fault = f"member {member.name} is a link or another special file"
        elif extension in sample.members:
            fault = f"two members {member.name}"
        sample.members[extension] = FileRange(path, member.offset_data, member.size)
        samples[sample.key] = TarSample(sample.key, sample.members, fault)
    return list(samples.values()), is_cut


def _members(tar: tarfile.TarFile) -> tuple[list[tarfile.TarInfo], int]:
    """Members up to the end or the first damage, and the byte where that is."""
    members: list[tarfile.TarInfo] = []
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            member = None
        if member is None:
            return members, tar.offset
        members.append(member)


def _next_archive(file: IO[bytes], end: int) -> int | None:
    """Where the first block that is not empty begins behind an archive's end; None where there is none."""
    file.seek(end)
    place = end
    while chunk := file.read(_SKIP_BYTES):
        if rest := chunk.lstrip(b"\0"):
            first = place + len(chunk) - len(rest)
            return first - (first - end) % tarfile.BLOCKSIZE
        place += len(chunk)
    return None


def _fault_at(file: IO[bytes], offset: int) -> str | None:
    """What is wrong at the byte where the headers end: there should be an empty one."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "archive has no end: it was cut off"
    return f"archive is damaged or cut off at byte {offset}: what follows is not read" if any(block) else None
