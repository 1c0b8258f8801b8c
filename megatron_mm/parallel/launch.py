"""Starting ranks on this machine, passing signals on to them, and ending with their exit code.

torch's `elastic_launch` is not used: as soon as one rank ends with any code but 0 it ends the others by SIGTERM, also
when all of them are saving a checkpoint to be requeued; it gives a stopped rank 30 seconds; it knows when ranks ended
to the second only, so it cannot tell the cause from its consequences; and it empties the logs of the start before.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, DistNetworkError, TCPStore

from megatron_mm.config.errors import BAD_INPUT_CODE, REQUEUE_CODE, InputError
from megatron_mm.parallel.failure import FAILURE_CODE, LastWords, read_last_words
from megatron_mm.parallel.nodes import Nodes
from megatron_mm.parallel.output import Output
from megatron_mm.processes import TERMINAL_WIDTH

# From the first failure until the other ranks are killed.
END_SECONDS = 5.0
# How often ranks are looked at.
_POLL_SECONDS = 0.1
# For the other nodes' ranks: they save together, so they end together, but a file system may be slow.
_OTHER_NODES_SECONDS = 300.0
_OTHER_NODES_POLL_SECONDS = 0.5


def run_ranks(
    arguments: list[str],
    num_ranks: int,
    nodes: Nodes | None = None,
    logs: Path | None = None,
    module: str = "megatron_mm.cli",
) -> int:
    """Run `python -m MODULE ARGUMENTS` on `num_ranks` ranks here and return the exit code of the job.

    SIGUSR1, SIGTERM and SIGINT ask the ranks for a checkpoint by SIGUSR1, and they end by themselves; a second SIGTERM
    or SIGINT kills them. When a rank fails, what it said is printed and the others end. Afterwards these signals are
    ignored, so this is the last that a process does.

    Args:
        arguments: of every rank.
        num_ranks: on this machine.
        nodes: the job's machines; left out, this one alone.
        logs: directory for a log of each rank; rank 0's stdout and everyone's stderr are printed as well. Left out,
            everything is printed and there are no logs.
        module: what a rank runs.

    Returns:
        0 if all ranks ended with it, `REQUEUE_CODE` if some want to be started again, that of the first rank to fail,
        or 128 + the signal that ended it.

    Raises:
        InputError: logs cannot be written, or the address is not to be had.
    """
    nodes = nodes or Nodes()
    output = Output(logs) if logs is not None else None
    with _store(nodes) as store, tempfile.TemporaryDirectory(prefix="megatron_mm_") as folder, _requests() as requests:
        ranks: list[_Rank] = []
        try:
            for local_rank in range(num_ranks):
                command = [sys.executable, "-u", "-m", module, *arguments]
                environment = _environment(local_rank, num_ranks, nodes, store.port, Path(folder))
                ranks.append(_start(command, environment, output))
            code = _wait(ranks, requests, output)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.reap()
            if output is not None:
                output.close()
        # srun ends the whole job step when one launcher ends with a code that is not 0.
        if code in (0, REQUEUE_CODE) and nodes.num_nodes > 1:
            _wait_for_other_nodes(store, nodes, requests)
    return code


@dataclass(slots=True)
class _Requests:
    """Signals that the launcher got and has not passed on yet."""

    wants_checkpoint: bool = False
    kill: int | None = None
    num_terminations: int = 0

    def take(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        if number != signal.SIGUSR1:
            self.num_terminations += 1
        self.wants_checkpoint = True
        if self.num_terminations > 1:
            self.kill = number


@contextmanager
def _requests() -> Iterator[_Requests]:
    requests = _Requests()
    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    for number in signals:
        signal.signal(number, requests.take)
    try:
        yield requests
    finally:
        # srun sends SIGTERM as soon as another node's launcher has ended: it must not change this one's exit code.
        for number in signals:
            signal.signal(number, signal.SIG_IGN)


@dataclass(slots=True)
class _Rank:
    """A rank that was started, in a session of its own: a terminal's Ctrl-C goes to the launcher alone."""

    number: int
    process: subprocess.Popen[bytes]
    error_file: Path

    def failure(self, earliest: float) -> "_Failure | None":
        """Why this rank failed, None if it has not; one that left no words ended after `earliest`."""
        words = read_last_words(self.error_file)
        code = self.process.poll()
        if words is not None:
            # It may hang while it ends, so its words count as its end.
            code = BAD_INPUT_CODE if words.is_bad_input else FAILURE_CODE
        elif code in (None, 0, REQUEUE_CODE):
            return None
        assert code is not None
        return _Failure(self.number, code, words, words.seconds if words else earliest)

    def kill(self) -> None:
        """End it and every process that it started."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for its end; one that is stuck in the kernel, on a GPU or a file system, cannot be waited for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    code: int
    words: LastWords | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return self.code if self.code > 0 else 128 - self.code

    def describe(self) -> str:
        """What the user is told."""
        if self.words is None:
            how = f"exit code {self.code}" if self.code > 0 else signal.Signals(-self.code).name
            return f"megatron-mm: rank {self.rank} ended by {how}\n"
        if self.words.is_bad_input:
            return f"megatron-mm: {self.words.message}\n"
        return f"megatron-mm: rank {self.rank} failed\n{self.words.message}"


@contextmanager
def _store(nodes: Nodes) -> Iterator[TCPStore]:
    """The store that ranks meet in; node 0's launcher has it, so that it is there as long as any rank of the job."""
    try:
        store = TCPStore(
            nodes.host, nodes.port, is_master=nodes.node == 0, wait_for_workers=False, timeout=timedelta(minutes=5)
        )
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no rendezvous at {nodes.host}:{nodes.port}: {reason}") from None
    yield store


def _environment(local_rank: int, num_ranks: int, nodes: Nodes, port: int, folder: Path) -> dict[str, str]:
    """What torchrun would tell a rank."""
    return {
        # gloo's and OpenMP's threads would fight for the cores; waiting ones must sleep, not spin.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "RANK": str(nodes.node * num_ranks + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(nodes.num_nodes * num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": nodes.host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": str(folder / f"rank_{local_rank}.json"),
    }


def _start(command: list[str], environment: Mapping[str, str], output: Output | None) -> _Rank:
    number = int(environment["RANK"])
    streams = (None, None) if output is None else output.open(number, int(environment["WORLD_SIZE"]))
    if number == 0 and output is not None and output.terminal_width is not None:
        environment = {**environment, TERMINAL_WIDTH: str(output.terminal_width)}
    process = subprocess.Popen(
        command, env=environment, stdout=streams[0], stderr=streams[1], stdin=subprocess.DEVNULL, start_new_session=True
    )
    for stream in streams:
        if stream is not None:
            os.close(stream)
    return _Rank(number, process, Path(environment["TORCHELASTIC_ERROR_FILE"]))


def _wait(ranks: list[_Rank], requests: _Requests, output: Output | None) -> int:
    """Wait until all ranks have ended or one has failed; the exit code of this machine's part of the job."""
    looked = time.time()
    while True:
        running = [rank for rank in ranks if rank.process.poll() is None]
        now = time.time()
        failures = [failure for rank in ranks if (failure := rank.failure(looked))]
        looked = now
        if failures:
            return _end(min(failures, key=lambda failure: failure.seconds), ranks, output)
        if not running:
            return max(rank.process.returncode for rank in ranks)
        if requests.kill is not None:
            print(f"megatron-mm: ended by a second {signal.Signals(requests.kill).name}", file=sys.stderr, flush=True)
            return 128 + requests.kill
        if requests.wants_checkpoint:
            requests.wants_checkpoint = False
            for rank in running:
                rank.process.send_signal(signal.SIGUSR1)
        _forward(output)


def _end(failure: _Failure, ranks: list[_Rank], output: Output | None) -> int:
    """Tell of the failure and end the other ranks: those that are able to by themselves, others by force."""
    if output is not None:
        output.end_line()
    print(failure.describe(), end="", file=sys.stderr, flush=True)
    if output is not None:
        output.note(failure.rank, failure.describe())
    for rank in ranks:
        if rank.number != failure.rank:
            rank.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < deadline:
        _forward(output)
    return failure.exit_code


def _forward(output: Output | None) -> None:
    if output is None:
        time.sleep(_POLL_SECONDS)
    else:
        output.forward(_POLL_SECONDS)


def _wait_for_other_nodes(store: TCPStore, nodes: Nodes, requests: _Requests) -> None:
    """Leave together; a further SIGTERM or SIGINT, and the end of another launcher, end the wait."""
    deadline = time.monotonic() + _OTHER_NODES_SECONDS
    asked = requests.num_terminations

    def wait_for(key: str, count: int) -> None:
        while store.add(key, 0) < count and requests.num_terminations == asked and time.monotonic() < deadline:
            time.sleep(_OTHER_NODES_POLL_SECONDS)

    with contextlib.suppress(DistNetworkError):  # node 0's launcher has gone, and the store with it
        store.add("ended", 1)
        wait_for("ended", nodes.num_nodes)
        if nodes.node > 0:
            store.add("seen", 1)
        else:
            wait_for("seen", nodes.num_nodes - 1)
