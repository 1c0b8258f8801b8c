"""What becomes of each kind of picture on its way into a shard, and what is refused."""

import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_sample_images

from megatron_mm.chat.images import EXIF_ORIENTATION, read_picture
from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import PrepareConfig, SourceConfig
from megatron_mm.data.sources.base import FileRange, PictureSource
from megatron_mm.data.sources.pictures import take_picture
from tests.datasets import encoded

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((64, 48))  # pyright: ignore[reportAttributeAccessIssue]
GREY = PHOTO.convert("L")


def _config(**limits: int) -> PrepareConfig:
    source = SourceConfig(name="a", format="chat", path=Path())
    return PrepareConfig.model_validate({"tokenizer": Path(), "sources": (source,), **limits})


def _taken(source: PictureSource, **limits: int) -> tuple[str, Image.Image]:
    """Extension and pixels of what is stored."""
    stored = take_picture(source, _config(**limits), fetch_urls=False)
    picture = read_picture(BytesIO(stored.content), "stored")
    assert picture.size == (stored.width, stored.height)
    assert picture.mode == "RGB"
    return stored.extension, picture


def _difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).max())


@pytest.mark.parametrize(
    ("picture", "form", "extension"), [(PHOTO, "JPEG", "jpg"), (GREY, "JPEG", "jpg"), (PHOTO, "PNG", "png")]
)
def test_plain_files_are_kept_as_they_are(picture: Image.Image, form: str, extension: str) -> None:
    content = encoded(picture, form)
    stored = take_picture(content, _config(), fetch_urls=False)
    assert (stored.content, stored.extension) == (content, extension)


def _sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257))


def _half_transparent() -> Image.Image:
    picture = PHOTO.convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.array([0, 255], np.uint8), (48, 32))))
    return picture


ON_WHITE = Image.fromarray(np.where(np.asarray(_half_transparent())[..., 3:], np.asarray(PHOTO), 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encoded(GREY.convert("CMYK"), "JPEG", quality=100), GREY.convert("RGB"), 6),
        (_sixteen_bit(), GREY.convert("RGB"), 0),
        (encoded(PHOTO.quantize(64)), PHOTO.quantize(64).convert("RGB"), 0),
        (encoded(_half_transparent()), ON_WHITE, 0),
        (encoded(PHOTO, "BMP"), PHOTO, 0),
        (encoded(PHOTO, "TIFF"), PHOTO, 0),
        (encoded(PHOTO.quantize(16), "GIF"), PHOTO.quantize(16).convert("RGB"), 0),
    ],
    ids=["CMYK", "16 bit", "palette", "alpha", "BMP", "TIFF", "GIF"],
)
def test_other_files_are_stored_as_what_vllm_would_see(content: bytes, expected: Image.Image, tolerance: int) -> None:
    extension, picture = _taken(content)
    assert extension == "png"
    assert picture.size == expected.size
    assert _difference(picture, expected) <= tolerance


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)],
    ids=["PNG", "TIFF", "TIFF, 32 bits"],
)
@pytest.mark.parametrize(("bits", "scale"), [(16, 257.0), (12, 4095 / 255), (10, 1023 / 255), (8, 1.0)])
def test_larger_integers_keep_their_brightness(form: str, dtype: type, bits: int, scale: float) -> None:
    grey = np.asarray(GREY)
    pixels = np.round(grey * scale).astype(dtype)
    assert pixels.max() > 2 ** (bits - 1)
    _, picture = _taken(encoded(Image.fromarray(pixels), form))
    # Ten bits are read as twelve, a quarter as bright.
    expected = GREY.point([value // 4 for value in range(256)]) if bits == 10 else GREY
    assert _difference(picture, expected.convert("RGB")) <= 1


@pytest.mark.parametrize("pixels", [[[-1, 5]], [[0, 2**16]], [[0, 2**31 - 1]], [[-(2**31), 0]]])
def test_integers_of_unknown_range_are_refused(pixels: list[list[int]]) -> None:
    with pytest.raises(InputError, match="of unknown range"):
        _taken(encoded(Image.fromarray(np.array(pixels, np.int32)), "TIFF"))


@pytest.mark.parametrize("size", [2**10, 2**20 - 100, 2**20, 3 * 2**20, 20 * 2**20])
@pytest.mark.parametrize("kind", ["text", "compressed text", "icc_profile"])
def test_heavy_metadata_do_not_matter(size: int, kind: str) -> None:
    heavy = np.random.default_rng(0).integers(32, 127, size, np.uint8).tobytes()
    if kind == "icc_profile":
        content = encoded(PHOTO, "PNG", icc_profile=heavy)
    else:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("note", heavy.decode(), zip=kind != "text")
        content = encoded(PHOTO, "PNG", pnginfo=notes)
    stored = take_picture(content, _config(), fetch_urls=False)
    assert _difference(read_picture(BytesIO(stored.content), "stored"), PHOTO) == 0
    # What others read has to be light: Pillow's own limit is 1 MiB.
    assert len(stored.content) < 2**20 + 20_000


@pytest.mark.parametrize(("form", "tolerance"), [("AVIF", 60), ("HEIF", 60), ("PPM", 0), ("WEBP", 80)])
def test_formats_of_phones_and_tools(form: str, tolerance: int) -> None:
    extension, picture = _taken(encoded(PHOTO, form))
    assert extension == ("webp" if form == "WEBP" else "png")
    assert np.abs(np.asarray(picture, int) - np.asarray(PHOTO, int)).mean() <= tolerance / 10


def test_transparent_palettes_are_laid_on_white() -> None:
    picture = PHOTO.quantize(8)
    corner = np.asarray(picture)[0, 0]
    expected = np.asarray(picture.convert("RGB")).copy()
    expected[np.asarray(picture) == corner] = 255
    _, found = _taken(encoded(picture, transparency=int(corner)))
    assert np.array_equal(np.asarray(found), expected)


def test_turned_pictures_are_stored_upright() -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    turned = encoded(PHOTO, "JPEG", exif=exif)
    extension, picture = _taken(turned)
    assert extension == "png"
    as_it_lies = np.asarray(Image.open(BytesIO(turned)).convert("RGB"))
    assert np.array_equal(np.asarray(picture), np.rot90(as_it_lies, -1))


def _bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 40,000 x 40,000."""
    content = bytearray(encoded(Image.new("RGB", (1, 1))))
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + content[24:29]
    content[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(PHOTO, "JPEG")[:700], "cannot be read: .*truncated"),
        (encoded(PHOTO)[:700], "cannot be read"),
        (_bomb(), "cannot be read: .*decompression bomb|has 40000 x 40000 pixels"),
        (b"", r"is empty \(0 bytes\)"),
        (b"GIF? no, text", "cannot be read: cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot be read: cannot identify"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point numbers"),
    ],
    ids=["truncated JPEG", "truncated PNG", "bomb", "empty", "text", "PostScript", "float"],
)
def test_what_is_not_a_whole_picture_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        _taken(content)


def test_limits_places_and_urls(tmp_path: Path) -> None:
    content = encoded(PHOTO)
    with pytest.raises(InputError, match="has 64 x 48 pixels, more than 3,000"):
        _taken(content, max_picture_pixels=3000)
    with pytest.raises(InputError, match="more than max_picture_bytes=100"):
        _taken(content, max_picture_bytes=100)
    file = tmp_path / "two.bin"
    file.write_bytes(b"before" + content)
    assert _taken(FileRange(file, 6, len(content)))[0] == "png"
    with pytest.raises(InputError, match=r"two\.bin at byte 0 cannot be read"):
        _taken(FileRange(file, 0, len(content)))
    with pytest.raises(InputError, match=r"picture .*none\.png does not exist"):
        _taken(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"is a URL; set the source's fetch_urls"):
        _taken("http://127.0.0.1:9/x.png")
    with pytest.raises(InputError, match=r"file:///etc/passwd is not an http\(s\) URL"):
        _taken("file:///etc/passwd")
