"""Child processes: they do not outlive their parent, and know the terminal that it shows them on."""

import ctypes
import os
import shutil
import signal
from typing import TextIO

# Of Linux's prctl.h.
PR_SET_PDEATHSIG = 1
# In the environment of a child whose output its parent passes on to a terminal: the terminal's columns.
TERMINAL_WIDTH = "MEGATRON_MM_TERMINAL_WIDTH"


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is killed; it would work, or wait for work, for ever.

    Args:
        parent: process id, taken before this process was started.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before
        os.kill(os.getpid(), signal.SIGKILL)


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream leads to, None where it leads elsewhere."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def parents_terminal_width() -> int | None:
    """Return the columns of the terminal that our output is passed on to, None where it is not."""
    width = os.environ.get(TERMINAL_WIDTH)
    return None if width is None else int(width)
