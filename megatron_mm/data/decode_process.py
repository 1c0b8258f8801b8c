"""One process a rank that decodes on the rank's GPU for all of its loader workers.

A loader worker is a fork of the training process, which uses CUDA: it cannot use CUDA itself. Spawned workers could,
but each would hold a CUDA context and nvJPEG's buffers. So workers send encoded pictures to this process, and it sends
pixels back. It holds one context a rank, on that rank's GPU.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import numpy as np
from PIL import Image

from megatron_mm.config.errors import InputError
from megatron_mm.data.decode import DaliDecoder, Decoder
from megatron_mm.processes import end_with_parent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An answer to pictures that is about the process and not about them.

    Attributes:
        words: the traceback.
    """

    words: str


class DecodeProcess:
    """A started process; it ends with the training process at the latest.

    Args:
        gpu: number of the GPU to decode on.
        num_workers: loader workers that it serves.
    """

    def __init__(self, gpu: int, num_workers: int):
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(num_workers)]
        self._connections = [worker for worker, _ in pairs]
        served = [end for _, end in pairs]
        self._process = context.Process(target=_serve, args=(gpu, served, os.getpid()), daemon=True)
        self._process.start()
        # A worker shall see that the process has ended: only the process may have these ends.
        for end in served:
            end.close()

    def connect(self, worker: int) -> Decoder:
        """Return the decoder of a loader worker, to be called there, once; it waits until DALI is loaded.

        Raises:
            InputError: DALI is not installed.
        """
        return _RemoteDecoder(self._connections[worker])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        for connection in self._connections:
            connection.close()


class _RemoteDecoder:
    """Has pictures decoded by a process; see Decoder."""

    def __init__(self, connection: Connection):
        self._connection = connection
        refusal = self._receive()
        if isinstance(refusal, _Failure):
            raise RuntimeError(f"the process that decodes for this rank did not start:\n{refusal.words}")
        if refusal is not None:
            assert isinstance(refusal, str)
            raise InputError(refusal)

    def __call__(self, pictures: Sequence[bytes], name: str) -> list[Image.Image]:
        if not pictures:
            return []
        try:
            self._connection.send((list(pictures), name))
        except ConnectionError:
            sys.exit(1)  # see _receive
        answer = self._receive()
        if isinstance(answer, str):
            raise InputError(answer)
        if isinstance(answer, _Failure):
            raise RuntimeError(f"the process that decodes for this rank failed:\n{answer.words}")
        assert answer is not None
        return [Image.fromarray(pixels) for pixels in answer]

    def _receive(self) -> list[np.ndarray] | str | _Failure | None:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            # The process was killed. A worker that ends as well is started again with a new process (loader.py, Feed).
            sys.exit(1)


def _serve(gpu: int, workers: list[Connection], parent: int) -> None:
    """Greet each worker, with what is wrong if anything is, and answer until the process is killed."""
    end_with_parent(parent)
    decode: DaliDecoder | None = None
    refusal: str | _Failure | None = None
    try:
        decode = DaliDecoder(gpu)
    except InputError as error:
        refusal = str(error)
    except Exception:  # noqa: BLE001 (the workers tell it; started again, it would fail again)
        refusal = _Failure(words=traceback.format_exc())
    for worker in workers:
        worker.send(refusal)
    while decode is not None and workers:
        for worker in wait(workers):
            assert isinstance(worker, Connection)
            try:
                pictures, name = worker.recv()
            except EOFError:
                workers.remove(worker)
                continue
            try:
                answer = [np.asarray(picture) for picture in decode(pictures, name)]
            except InputError as error:
                answer = str(error)
            except Exception:  # noqa: BLE001 (as above)
                answer = _Failure(words=traceback.format_exc())
            worker.send(answer)
