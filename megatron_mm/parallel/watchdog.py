"""Ends a job in which nothing goes on any more, and says which rank hangs where.

A collective waits for ever for a rank that is stopped, hangs in its file system, or waits in another collective. Each
rank tells where it is and beats in a thread; a rank that has been in one place for too long looks at the others.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_mm.parallel.failure import tell

BEAT_SECONDS = 1.0
# A living process is heard within it, be it swapping or collecting garbage.
SILENCE_SECONDS = 10.0
STORE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        count: of beats so far.
        step: that it is in.
        place: what it does there.
        host, process: where it runs.
    """

    count: int
    step: int
    place: str
    host: str
    process: int


class Watchdog:
    """Knows where this rank is; `watch` makes one."""

    def __init__(self) -> None:
        self._step, self._place, self._since = 0, "start", time.monotonic()

    def at(self, step: int, place: str) -> None:
        """Say what this rank begins to do; costs nothing."""
        self._step, self._place, self._since = step, place, time.monotonic()

    def beat(self, count: int) -> Beat:
        """What this rank says of itself now."""
        return Beat(count, self._step, self._place, socket.gethostname(), os.getpid())

    def seconds_there(self) -> float:
        """How long this rank has been where it is."""
        return time.monotonic() - self._since


@contextmanager
def watch(seconds: float) -> Iterator[Watchdog]:
    """Watch this job's ranks while the block runs; all ranks use it together.

    Args:
        seconds: that a rank may be in one place; then it says who hangs where, and ends.
    """
    watchdog, ended = Watchdog(), threading.Event()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    board = _Board(rank, num_ranks) if num_ranks > 1 else None

    def beat(board: _Board) -> None:
        for count in itertools.count():
            board.put(watchdog.beat(count))
            if ended.wait(BEAT_SECONDS):
                return

    def look() -> None:
        while not ended.wait(min(BEAT_SECONDS, seconds / 4)):
            if watchdog.seconds_there() > seconds:
                _give_up(f"no progress for {seconds:g} s: {_diagnosis(watchdog, board, ended)}", ended)

    threads = [threading.Thread(target=look, daemon=True, name="watchdog looks")]
    if board is not None:
        threads.append(threading.Thread(target=beat, args=(board,), daemon=True, name="watchdog beats"))
    for thread in threads:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        for thread in threads:
            thread.join()


class _Board:
    """What all ranks say of themselves, in the store that they met at."""

    def __init__(self, rank: int, num_ranks: int):
        self._rank, self.num_ranks = rank, num_ranks
        # A connection of its own: the process group's may be held by a rank that waits.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=STORE_SECONDS)
        self.address = address
        self._store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def put(self, beat: Beat) -> None:
        # A store that is gone is for `look` to tell of.
        with suppress(dist.DistError):
            self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(beat)))

    def read(self) -> dict[int, Beat]:
        """The last beat of each rank that ever beat.

        Raises:
            dist.DistError: the store does not answer.
        """
        keys = {rank: f"watchdog/{rank}" for rank in range(self.num_ranks)}
        known = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Beat(**json.loads(self._store.get(key))) for rank, key in known.items()}


def _diagnosis(watchdog: Watchdog, board: _Board | None, ended: threading.Event) -> str:
    """Who hangs where."""
    mine = watchdog.beat(0)
    if board is None:
        return f"the run is in {mine.place} of step {mine.step}"
    try:
        before = board.read()
        ended.wait(SILENCE_SECONDS)
        return diagnose(before, board.read(), board.num_ranks)
    except dist.DistError:
        return (
            f"{board.address}, where the ranks met, does not answer; this rank is in {mine.place} of step {mine.step}"
        )


def diagnose(before: Mapping[int, Beat], now: Mapping[int, Beat], num_ranks: int) -> str:
    """Who hangs where: ranks that do not beat any more, or else where every rank is, the fewest first.

    Args:
        before, now: the last beat of each rank, at two times.
    """
    silent = [
        f"rank {rank} does not answer, process {beat.process} on {beat.host}; "
        f"it was in {beat.place} of step {beat.step}"
        for rank, beat in now.items()
        if beat.count == before.get(rank, beat).count
    ]
    silent += [f"rank {rank} has never answered" for rank in range(num_ranks) if rank not in now]
    if silent:
        return "; ".join(silent)
    places = defaultdict(list)
    for rank, beat in now.items():
        places[beat.step, beat.place].append(rank)
    if len(places) == 1:
        ((step, place),) = places
        return f"all ranks are in {place} of step {step}"
    fewest_first = sorted(places.items(), key=lambda item: (len(item[1]), item[0]))
    return "; ".join(
        f"rank {', '.join(map(str, sorted(ranks)))} in {place} of step {step}" for (step, place), ranks in fewest_first
    )


def _give_up(message: str, ended: threading.Event) -> None:
    if ended.is_set():
        return
    faulthandler.dump_traceback(sys.stderr)
    tell(message, is_bad_input=False)
    sys.stderr.flush()
    # The main thread hangs where no exception reaches it.
    os._exit(1)
