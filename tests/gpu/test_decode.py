"""DALI's pixels against Pillow's, on the processor and on the GPU."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from megatron_mm.config.errors import InputError
from megatron_mm.data.decode import DaliDecoder, decode_with_pillow
from tests.datasets import encoded

pytestmark = [pytest.mark.gpu, pytest.mark.dali]
# nvJPEG and libjpeg-turbo scale chroma up in other ways, which shows at edges of colour.
MEAN_TOLERANCE = 1.0


def _pictures(form: str) -> list[bytes]:
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # pyright: ignore
    return [encoded(photo, form) for photo in (*photos, photos[0].convert("L"))]


@pytest.mark.parametrize("gpu", [None, 0])
def test_png_is_the_same_to_the_bit_and_jpeg_nearly(gpu: int | None) -> None:
    decode = DaliDecoder(gpu)
    for form in ("PNG", "JPEG"):
        files = _pictures(form)
        for ours, theirs in zip(decode(files, "a"), decode_with_pillow(files, "a"), strict=True):
            assert ours.size == theirs.size
            difference = np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64))
            if form == "PNG" or gpu is None:  # the same libjpeg-turbo
                assert not difference.any()
            assert difference.mean() < MEAN_TOLERANCE


@pytest.mark.parametrize("gpu", [None, 0])
def test_what_cannot_be_decoded_is_named_and_the_next_is_decoded(gpu: int | None) -> None:
    decode = DaliDecoder(gpu)
    files = _pictures("PNG")
    with pytest.raises(InputError, match="a picture of some sample cannot be decoded by DALI"):
        decode([b"no picture"], "some sample")
    assert len(decode(files, "another")) == len(files)
