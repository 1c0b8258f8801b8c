"""Where a prepared data set lies: a directory here, or anything that fsspec opens (s3://, gs://, ...)."""

import hashlib
import os
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from megatron_mm.config.errors import InputError

OPEN_FILES = 256
ATTEMPTS = 4


class Storage(Protocol):
    """Reads files of a data set by name."""

    name: str

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Bytes of a file; fewer where it ends.

        Raises:
            InputError: the file cannot be read.
        """
        ...

    def local(self, *files: str) -> Path:
        """A directory of this machine that holds the files, or as many of them as there are."""
        ...


def open_storage(path: str) -> Storage:
    """Storage of a directory or URL."""
    return RemoteStorage(path) if "://" in path else LocalStorage(Path(path))


class LocalStorage:
    """A directory; files are kept open, the longest unused one is closed first."""

    def __init__(self, directory: Path):
        self.name = str(directory)
        self._directory = directory
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """See Storage."""
        try:
            return os.pread(self._descriptor(file), num_bytes, offset)
        except OSError as error:
            path = self._directory / file
            raise InputError(f"shard {path} cannot be read: {error.strerror}; prepare the data again") from None

    def local(self, *files: str) -> Path:
        """The directory itself."""
        del files
        return self._directory

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self._directory / file, os.O_RDONLY)
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_directory": self._directory, "_open": OrderedDict()}


class RemoteStorage:
    """A URL. Ranges are read as they are asked for; index and tokenizer are copied to the temporary directory once."""

    def __init__(self, url: str):
        self.name = url.rstrip("/")
        self._filesystem: Any = None
        self._process = 0

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """See Storage. A failure is tried again, after 1, 2 and 4 seconds."""
        url = f"{self.name}/{file}"
        for attempt in range(ATTEMPTS):
            try:
                return self._opened().cat_file(url, start=offset, end=offset + num_bytes)
            except FileNotFoundError:
                raise InputError(f"shard {url} does not exist; prepare the data again") from None
            except OSError as error:
                if attempt == ATTEMPTS - 1:
                    raise InputError(f"shard {url} cannot be read, {ATTEMPTS} times: {error}") from None
                time.sleep(2**attempt)
        raise AssertionError

    def local(self, *files: str) -> Path:
        """Copies, made anew when what lies at the URL has changed."""
        filesystem = self._opened()
        try:
            found = {file: filesystem.info(f"{self.name}/{file}") for file in files if self._exists(file)}
        except (OSError, ImportError) as error:
            raise InputError(f"{self.name} cannot be read: {error}") from None
        kept = ("ETag", "size", "LastModified", "mtime", "created")
        state = str([(file, [str(info.get(key)) for key in kept]) for file, info in sorted(found.items())])
        key = hashlib.sha256(f"{self.name} {state}".encode()).hexdigest()[:16]
        directory = Path(tempfile.gettempdir()) / f"megatron_mm-{os.getuid()}-{key}"
        if not directory.is_dir():
            # Ranks that come at the same time each make a copy; the first one's takes the name.
            partial = Path(tempfile.mkdtemp(prefix="megatron_mm-"))
            for file in found:
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(f"{self.name}/{file}", str(partial / file))
            try:
                partial.rename(directory)
            except OSError:
                if not directory.is_dir():
                    raise
        return directory

    def _exists(self, file: str) -> bool:
        return self._opened().exists(f"{self.name}/{file}")

    def _opened(self) -> Any:
        """The file system of this process: its threads do not come along into a forked one."""
        if self._filesystem is None or self._process != os.getpid():
            import fsspec  # s3fs and the like come with it only where somebody asked for them

            try:
                self._filesystem = fsspec.filesystem(self.name.split("://", 1)[0], skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise InputError(f"{self.name} cannot be opened: {error}") from None
            self._process = os.getpid()
        return self._filesystem

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_filesystem": None, "_process": 0}
