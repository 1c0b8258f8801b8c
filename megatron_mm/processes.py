"""Child processes that do not outlive their parent."""

import ctypes
import os
import signal

# Of Linux's prctl.h.
PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is killed; it would work, or wait for work, for ever.

    Args:
        parent: process id, taken before this process was started.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before
        os.kill(os.getpid(), signal.SIGKILL)
