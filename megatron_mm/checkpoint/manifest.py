"""manifest.json: the size and checksum of each file of a checkpoint. Without torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mm.config.errors import InputError


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file was when it was written.

    Attributes:
        size_bytes: its length.
        sha256: its checksum (FIPS 180-4), in hexadecimal.
    """

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "FileRecord":
        """Of a file that is there."""
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(file.stat().st_size, digest)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of a checkpoint but this one, by name."""

    step: int
    files: Mapping[str, FileRecord]

    @staticmethod
    def of(checkpoint: Path) -> Path:
        """The file that holds it."""
        return checkpoint / "manifest.json"

    def to_json(self) -> str:
        """For manifest.json."""
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        return json.dumps({"step": self.step, "files": files}, indent=1) + "\n"

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """Of a checkpoint.

        Raises:
            InputError: it is missing or damaged.
        """
        file = cls.of(checkpoint)
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            files = {str(name): FileRecord(**record) for name, record in tree["files"].items()}
            if not all(isinstance(record.size_bytes, int) for record in files.values()):
                raise ValueError("a size is not a number")
            return cls(int(tree["step"]), files)
        except FileNotFoundError:
            raise InputError(f"{file.name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file.name} cannot be read: {error}") from None


def size_faults(checkpoint: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is missing or of another size, a line each."""
    return [fault for name, record in files.items() if (fault := _size_fault(checkpoint / name, record))]


def content_faults(checkpoint: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is missing, of another size or of another content, a line each. Reads every byte."""
    return [fault for name, record in files.items() if (fault := _content_fault(checkpoint / name, record))]


def _size_fault(file: Path, record: FileRecord) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    size_bytes = file.stat().st_size
    if size_bytes != record.size_bytes:
        return f"{file.name} has {size_bytes} bytes, {record.size_bytes} were written"
    return ""


def _content_fault(file: Path, record: FileRecord) -> str:
    fault = _size_fault(file, record)
    if fault:
        return fault
    try:
        found = FileRecord.of(file)
    except OSError as error:
        return f"{file.name} cannot be read: {error}"
    if found.sha256 != record.sha256:
        return f"{file.name} has other content than was written (sha256 {found.sha256}, written {record.sha256})"
    return ""
