"""One process a rank that decodes on the rank's GPU for all of its loader workers.

A loader worker is a fork of the training process, which uses CUDA: it cannot use CUDA itself. Spawned workers could,
but each would hold a CUDA context and nvJPEG's buffers. So workers send encoded images to this process, and it sends
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
    """An answer that is about the process and not about the images.

    Attributes:
        traceback: what happened there.
    """

    traceback: str


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
    """Has images decoded by a process; see Decoder."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._receive()  # the greeting

    def __call__(self, pictures: Sequence[bytes], name: str) -> list[Image.Image]:
        if not pictures:
            return []
        try:
            self._connection.send((list(pictures), name))
        except ConnectionError:
            sys.exit(1)  # see _receive
        return [Image.fromarray(pixels) for pixels in self._receive()]

    def _receive(self) -> list[np.ndarray]:
        """Return the next answer.

        Raises:
            InputError: the answer says what is wrong with the images, or that DALI is missing.
            RuntimeError: the process failed.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            # The process was killed. A worker that ends as well is started again with a new process (loader.py, Feed).
            sys.exit(1)
        if isinstance(answer, str):
            raise InputError(answer)
        if isinstance(answer, _Failure):
            raise RuntimeError(f"the process that decodes for this rank failed:\n{answer.traceback}")
        return answer


def _serve(gpu: int, workers: list[Connection], parent: int) -> None:
    """Greet each worker, with what is wrong if anything is, and answer until the process is killed."""
    end_with_parent(parent)
    try:
        decode, greeting = DaliDecoder(gpu), []
    except Exception as error:  # noqa: BLE001 (the workers raise it; a process started again would fail again)
        decode, greeting = None, _problem(error)
    for worker in workers:
        worker.send(greeting)
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
            except Exception as error:  # noqa: BLE001 (as above)
                answer = _problem(error)
            worker.send(answer)


def _problem(error: Exception) -> str | _Failure:
    """Return what a worker gets instead of pixels."""
    if isinstance(error, InputError):
        return str(error)
    return _Failure(traceback="".join(traceback.format_exception(error)))
