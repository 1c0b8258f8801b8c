"""Encoded pictures -> pixels."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image

from megatron_mm.chat.images import read_picture
from megatron_mm.config.errors import InputError


class Decoder(Protocol):
    """Decodes the pictures of one sample."""

    def __call__(self, pictures: Sequence[bytes], name: str) -> list[Image.Image]:
        """RGB pictures.

        Args:
            pictures: encoded, as shards hold them.
            name: of the sample, for messages.

        Raises:
            InputError: one cannot be decoded.
        """
        ...


def decode_with_pillow(pictures: Sequence[bytes], name: str) -> list[Image.Image]:
    """By Pillow and libjpeg-turbo; see Decoder."""
    return [read_picture(BytesIO(content), f"{name}, picture {number}") for number, content in enumerate(pictures)]


class DaliDecoder:
    """By NVIDIA DALI, JPEG on the GPU.

    Decoders of JPEG may differ: by at most 3 of 255 in a channel where both use libjpeg-turbo, more at edges of colour
    where nvJPEG scales chroma up otherwise; tests hold the mean difference under 1 of 255. PNG is the same to the bit.

    Args:
        gpu: number of the GPU to decode on; None for DALI's own processor path.

    Raises:
        InputError: DALI is not installed.
    """

    def __init__(self, gpu: int | None):
        try:
            # An extra of GPU machines.
            from nvidia.dali import fn, types  # pyright: ignore[reportMissingImports]
            from nvidia.dali.pipeline import Pipeline  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"data.decoder=dali needs NVIDIA DALI ({error}); install the package's [gpu] extra, or take pillow"
            ) from None
        self._gpu = gpu
        self._max_pictures = 1
        self._api: Any = (fn, types, Pipeline)
        self._pipeline: Any = None

    def __call__(self, pictures: Sequence[bytes], name: str) -> list[Image.Image]:
        """See Decoder."""
        if not pictures:
            return []
        if self._pipeline is None or len(pictures) > self._max_pictures:
            self._max_pictures = max(self._max_pictures, len(pictures))
            self._pipeline = self._build()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(content, np.uint8) for content in pictures])
            (decoded,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # DALI's are of no use after an error
            raise InputError(f"a picture of {name} cannot be decoded by DALI: {error}") from None
        decoded = decoded if self._gpu is None else decoded.as_cpu()
        return [Image.fromarray(np.array(decoded[number])) for number in range(len(pictures))]

    def _build(self) -> Any:
        fn, types, pipeline_class = self._api
        pipeline = pipeline_class(
            batch_size=self._max_pictures,
            num_threads=1,
            device_id=self._gpu,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8)
            pipeline.set_outputs(fn.decoders.image(encoded, device="cpu" if self._gpu is None else "mixed"))
        pipeline.build()
        return pipeline
