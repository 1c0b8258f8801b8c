"""Pictures of a source -> plain pictures for a shard.

Plain is a whole JPEG, PNG or WebP of 8-bit RGB or grey, upright and opaque, with little metadata: its bytes are kept as
they are. Any other (palette, CMYK, 16 bits, transparent, turned by its EXIF, other formats) is stored as the PNG of
what vLLM would see.
"""

import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

from PIL import Image

from megatron_mm.chat.images import EXIF_ORIENTATION, FORMATS, read_picture
from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import PrepareConfig
from megatron_mm.data.shards import EncodedPicture
from megatron_mm.data.sources.base import FileRange, PictureSource

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
URL_TIMEOUT_SECONDS = 30
# Characters of metadata above which a picture is written anew without: other programs refuse it.
MAX_METADATA = 2**20


def take_picture(source: PictureSource, config: PrepareConfig, *, fetch_urls: bool) -> EncodedPicture:
    """Read a picture, decode it once to see that it is whole, and make it plain.

    Raises:
        InputError: it is missing, too large, not a picture, or cut off; or it is a URL and those are not to be fetched.
    """
    name = _name(source)
    content = _read(source, name, config.max_picture_bytes, fetch_urls=fetch_urls)
    picture = read_picture(BytesIO(content), name, config.max_picture_pixels)
    with Image.open(BytesIO(content), formats=FORMATS) as header:
        is_plain = (
            header.format in EXTENSIONS
            and header.mode in ("RGB", "L")
            and "transparency" not in header.info
            and header.getexif().get(EXIF_ORIENTATION, 1) == 1
            and sum(len(value) for value in header.info.values() if isinstance(value, (str, bytes))) < MAX_METADATA
        )
        extension = EXTENSIONS.get(header.format or "", "png")
    if not is_plain:
        encoded = BytesIO()
        picture.save(encoded, format="PNG", icc_profile=None)
        content, extension = encoded.getvalue(), "png"
    return EncodedPicture(content, extension, picture.width, picture.height)


def _name(source: PictureSource) -> str:
    if isinstance(source, bytes):
        return "given as bytes"
    return f"{source.path} at byte {source.offset}" if isinstance(source, FileRange) else str(source)


def _read(source: PictureSource, name: str, max_bytes: int, *, fetch_urls: bool) -> bytes:
    try:
        if isinstance(source, bytes):
            content = source[: max_bytes + 1]
        elif isinstance(source, FileRange):
            with source.path.open("rb") as file:
                file.seek(source.offset)
                content = file.read(min(source.num_bytes, max_bytes + 1))
        elif isinstance(source, Path):
            with source.open("rb") as file:
                content = file.read(max_bytes + 1)
        else:
            content = _fetch(source, max_bytes, fetch_urls=fetch_urls)
    except FileNotFoundError:
        raise InputError(f"picture {name} does not exist") from None
    except OSError as error:
        raise InputError(f"picture {name} cannot be read: {error}") from None
    if len(content) > max_bytes:
        raise InputError(f"picture {name} has more than max_picture_bytes={max_bytes:,}")
    if not content:
        raise InputError(f"picture {name} is empty (0 bytes)")
    return content


def _fetch(url: str, max_bytes: int, *, fetch_urls: bool) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"picture {url} is not an http(s) URL")
    if not fetch_urls:
        raise InputError(f"picture {url} is a URL; set the source's fetch_urls to have it fetched")
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as response:
            return response.read(max_bytes + 1)
    except (urllib.error.URLError, ValueError) as error:
        raise InputError(f"picture {url} cannot be fetched: {error}") from None
