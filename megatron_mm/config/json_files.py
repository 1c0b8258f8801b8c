"""Reading a JSON file that somebody else wrote: one object, or one message that names the file."""

import json
from pathlib import Path
from typing import Any

from megatron_mm.config.errors import InputError

# What Git LFS leaves in place of a file whose content was not downloaded (git-lfs/docs/spec.md).
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file holds the name of its content instead of the content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, is a Git LFS pointer, cut off, no JSON, or no object.
    """
    try:
        if is_lfs_pointer(path):
            raise InputError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; it may be cut off, so copy it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, not an object with fields; copy it again")
    return found
