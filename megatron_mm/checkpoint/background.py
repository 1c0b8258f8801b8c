"""Writing a snapshot in a forked process while this one trains on."""

import gc
import os
import signal
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from megatron_mm.checkpoint.snapshot import Failed, Snapshot, Written
from megatron_mm.processes import end_with_parent

# Whether a save is cut off is for the parent to say; a signal that a terminal or Slurm sends to all processes is not
# meant for this one.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WAKE_SECONDS = 0.05


class BackgroundWrite:
    """A process that writes a snapshot.

    Args:
        snapshot: whose tensors may change from now on.
    """

    def __init__(self, snapshot: Snapshot):
        self._outcome: Written | Failed | None = None
        parent = os.getpid()
        self._reader, sender = Pipe(duplex=False)
        try:
            self.process_id = os.fork()
        except OSError as error:
            self._outcome = Failed(f"a process to write could not be started: {error}")
            return
        if self.process_id == 0:
            _write(snapshot, sender, parent)
        sender.close()

    def is_done(self) -> bool:
        """Whether `outcome` has not to wait."""
        if self._outcome is None:
            # Asked before the pipe is looked at: a process that has ended has sent all that it will send.
            ended, status = os.waitpid(self.process_id, os.WNOHANG)
            if not ended and not self._reader.poll():
                return False
            received = self._received() if self._reader.poll() else None
            if not ended:
                _, status = os.waitpid(self.process_id, 0)
            self._outcome = received or Failed(_ending(status))
            self._reader.close()
        return True

    def outcome(self) -> Written | Failed:
        """What the process has written, or why it could not; waits for it."""
        while not self.is_done():
            self._reader.poll(WAKE_SECONDS)
        assert self._outcome is not None
        return self._outcome

    def _received(self) -> Written | Failed | None:
        try:
            return self._reader.recv()
        except (EOFError, OSError):  # it ended before, or in the middle of the message
            return None


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    what = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    return f"the process that wrote {what}"


def _write(snapshot: Snapshot, sender: Connection, parent: int) -> None:
    """In the child: write, send what became of it, and end at once, without anything that this process inherited."""
    code = 1
    try:
        end_with_parent(parent)
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # It would free the parent's GPU tensors, in a process that may not use the GPU.
        gc.disable()
        sender.send(snapshot.write())
        code = 0
    except BaseException:
        traceback.print_exc()  # nobody else would: the process ends here
        raise
    finally:
        os._exit(code)
