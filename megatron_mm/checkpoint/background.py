"""Writing a snapshot in a forked process while this one trains on."""

import faulthandler
import gc
import os
import signal
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_mm.checkpoint.snapshot import Failed, Snapshot, Written
from megatron_mm.processes import end_with_parent

# Whether a save is cut off is for the parent to say; a signal that a terminal or Slurm sends to all processes is not
# meant for this one.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Upon which it writes its threads' stacks to stderr.
STACKS_SIGNAL = signal.SIGQUIT
STACKS_SECONDS = 1.0
WAKE_SECONDS = 0.05


class BackgroundWrite:
    """A process that writes a snapshot.

    It holds what other threads of its parent had locked at the fork, with nobody to unlock it, and may wait for that
    for ever. So it is given up when it stands still.

    Args:
        snapshot: whose tensors may change from now on.
        stall_seconds: without any use of a processor, or of its use without a byte read or written, after which the
            process is killed, and has failed.
    """

    def __init__(self, snapshot: Snapshot, stall_seconds: float):
        self._outcome: Written | Failed | None = None
        self._stall_seconds = stall_seconds
        parent = os.getpid()
        self._reader, sender = Pipe(duplex=False)
        # In the child a collection would free what is the parent's: GPU tensors, in a process that may not use the GPU,
        # and threads that are not there.
        collects = gc.isenabled()
        gc.disable()
        try:
            self.process_id = os.fork()
        except OSError as error:
            self._outcome = Failed(f"a process to write could not be started: {error}")
        else:
            if self.process_id == 0:
                _write(snapshot, sender, parent)
            self._progress = _Progress(self.process_id)
        finally:
            sender.close()
            if collects:
                gc.enable()

    def is_done(self) -> bool:
        """Whether `outcome` has not to wait."""
        if self._outcome is None:
            # Asked before the pipe is looked at: a process that has ended has sent all that it will send.
            ended, status = os.waitpid(self.process_id, os.WNOHANG)
            if ended or self._reader.poll():
                received = self._received()
                if not ended:
                    _, status = os.waitpid(self.process_id, 0)
                self._outcome = received or Failed(_ending(status))
            elif self._progress.still_seconds() > self._stall_seconds:
                self._outcome = self._given_up()
            else:
                return False
            self._reader.close()
        return True

    def outcome(self) -> Written | Failed:
        """What the process has written, or why it could not; waits for it."""
        while not self.is_done():
            self._reader.poll(WAKE_SECONDS)
        assert self._outcome is not None
        return self._outcome

    def _given_up(self) -> Failed:
        os.kill(self.process_id, STACKS_SIGNAL)
        # Nothing tells when they are written; it may be stopped, and never write them.
        time.sleep(STACKS_SECONDS)
        os.kill(self.process_id, signal.SIGKILL)
        # Not waited for: a system call that hangs, on a disk that does not answer, cannot be killed.
        return Failed(
            f"the process that wrote stood still for {self._stall_seconds:g} s (checkpoint.stall_seconds) and was "
            "killed; its stacks are in this rank's log"
        )

    def _received(self) -> Written | Failed | None:
        try:
            return self._reader.recv() if self._reader.poll() else None
        except (EOFError, OSError):  # it ended before, or in the middle of the message
            return None


class _Progress:
    """Whether a process that is looked at from time to time gets on."""

    def __init__(self, process_id: int):
        self._process_id = process_id
        self._used_seconds, self._last_used = 0.0, time.monotonic()
        # As /proc tells it, and what had been used of a processor's time when it last changed.
        self._moved_bytes, self._used_before = "", 0.0

    def still_seconds(self) -> float:
        """How long it has used no processor, or, if that is more, its use of one since it last read or wrote a byte."""
        try:
            # What clock_getcpuclockid(3) returns: of all threads together. A wait for the disk, which is told page by
            # page, uses some; a wait for a lock none, or all of it.
            used_seconds = time.clock_gettime((~self._process_id << 3) | 2)
            moved_bytes = Path(f"/proc/{self._process_id}/io").read_text()
        except OSError:  # it has just ended
            return 0.0
        now = time.monotonic()
        if used_seconds != self._used_seconds:
            self._used_seconds, self._last_used = used_seconds, now
        if moved_bytes != self._moved_bytes:
            self._moved_bytes, self._used_before = moved_bytes, used_seconds
        return max(now - self._last_used, used_seconds - self._used_before)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    what = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
    return f"the process that wrote {what}"


def _write(snapshot: Snapshot, sender: Connection, parent: int) -> None:
    """In the child: write, send what became of it, and end at once, without anything that this process inherited."""
    code = 1
    try:
        faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
        end_with_parent(parent)
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # After a fork torch's pool of threads is made anew at its first use. Two threads that begin at once, as those
        # that write do, can find it half made ("Invalid thread pool"): here this one makes it.
        torch.set_num_threads(torch.get_num_threads())
        sender.send(snapshot.write())
        code = 0
    except BaseException:
        traceback.print_exc()  # nobody else would: the process ends here
        raise
    finally:
        os._exit(code)
