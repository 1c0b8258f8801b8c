"""Headers of tar files: which samples they hold, and where their members' bytes are."""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mm.config.errors import InputError
from megatron_mm.data.sources.base import FileRange

# WebDataset's rule: the key, with its directory, ends at the first dot of the file's name; other members are no data.
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


def scan(path: Path) -> tuple[list[TarSample], str | None]:
    """Read the headers of a tar file.

    Returns:
        Its samples, in the order of their first members, and what is wrong with the archive's end, if anything is.

    Raises:
        InputError: it is no tar file, or a compressed one.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members, end = _members(tar)
        size = path.stat().st_size
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} is no tar file, or a compressed one ({error}); unpack it, or copy it again if it is cut off"
        ) from None
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
    return list(samples.values()), None if is_cut else _fault_at(path, end)


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


def _fault_at(path: Path, offset: int) -> str | None:
    """What is wrong at the byte where the headers end: there should be an empty one."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "archive has no end: it was cut off"
    return f"archive is damaged or cut off at byte {offset}: what follows is not read" if any(block) else None
