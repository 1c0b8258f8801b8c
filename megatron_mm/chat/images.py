"""Any-res tiling: one pure function from a picture's size to its grid and placeholder count, one from picture to tiles.

The rules are those of LLaVA-NeXT as R-4B's vLLM model applies them (llava_next and llava_onevision in transformers and
vLLM): pick the grid that keeps most of the picture, resize into it keeping the aspect ratio, pad to the middle, cut
into tiles; a whole-picture tile comes first. Of the grid's features, those that see only padding are dropped, what is
left is scaled down where it is too much (`anyres_max_N`), and a learned `image_newline` closes each row.
LLaVA-OneVision gives each of several pictures of a sample one square tile instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pillow_heif
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from megatron_mm.config.errors import InputError
from megatron_mm.config.json_files import read_json_object
from megatron_mm.config.schema import ModelConfig

# SigLIP's normalisation: (value / 255 - 0.5) / 0.5.
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
NEWLINE = -1
# LLaVA-OneVision scales features down where they are more than 1.1^2 * N tiles' (transformers' pack_image_features).
DOWNSCALE_ABOVE = 1.1
# What is opened; a picture of more pixels than this is taken for a decompression bomb.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
pillow_heif.register_heif_opener()
MAX_PIXELS = 80_000_000
# Metadata of PNG files, which are not looked at, may be so large; Pillow refuses whole pictures for more than a MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
_WHITES = (2**8 - 1, 2**12 - 1, 2**16 - 1)
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class TileRules:
    """How a model wants pictures cut.

    Attributes:
        grids: allowed (rows, columns) of tiles.
        tile_size: side of a tile in pixels.
        patches_per_side: patches along one side of a tile.
        max_tiles: N of anyres_max_N.
        multi_image: how each of several pictures is cut, "anyres" or "square".
    """

    grids: tuple[tuple[int, int], ...]
    tile_size: int
    patches_per_side: int
    max_tiles: int = 9
    multi_image: str = "anyres"

    @classmethod
    def of_model(cls, model: ModelConfig) -> "TileRules":
        """From a training config."""
        return cls(
            model.tile_grids,
            model.vision.image_size,
            model.vision.patches_per_side,
            model.max_tiles,
            model.multi_image,
        )

    @classmethod
    def of_directory(cls, directory: Path) -> "TileRules":
        """From the config.json of an exported model.

        Raises:
            InputError: there is none, or it is not of a model of this kind.
        """
        path = directory / "config.json"
        try:
            config = read_json_object(path)
            # What vLLM reads by itself. Others' types come with code of their own, which is never run.
            if config["model_type"] != "llava_onevision":
                raise ValueError(f"model_type={config['model_type']!r}, not 'llava_onevision'")
            side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
            grids = grids_of_pinpoints(config["image_grid_pinpoints"], side)
            max_tiles = int(config["vision_aspect_ratio"].removeprefix("anyres_max_"))
            is_onevision = config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
            patches_per_side = side // patch
        except FileNotFoundError:
            raise InputError(
                f"no model in {directory} (config.json is missing); make it with `megatron-mm export`"
            ) from None
        except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is not of a model that `megatron-mm export` wrote: {error!r}; import the model, and export it"
            ) from None
        return cls(grids, side, patches_per_side, max_tiles, "square" if is_onevision else "anyres")


def grids_of_pinpoints(pinpoints: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """Return (rows, columns) of tiles for each `image_grid_pinpoints` of a config.json, which are in pixels.

    Args:
        pinpoints: as they were read.
        tile: side of a tile in pixels.

    Raises:
        ValueError: they are not a list of (height, width) that the tile divides.
    """
    if not isinstance(pinpoints, list) or not pinpoints:
        raise ValueError("not a list of (height, width) in pixels")
    grids = []
    for pinpoint in pinpoints:
        is_pair = isinstance(pinpoint, list) and len(pinpoint) == 2
        if not is_pair or any(not isinstance(side, int) or isinstance(side, bool) for side in pinpoint):
            raise ValueError(f"holds {pinpoint!r}, not (height, width) in pixels")
        if any(side < 1 or side % tile for side in pinpoint):
            raise ValueError(
                f"holds {pinpoint!r}; wanted are heights and widths that vision_config.image_size={tile} divides"
            )
        grids.append((pinpoint[0] // tile, pinpoint[1] // tile))
    return tuple(grids)


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one picture becomes.

    Attributes:
        rows, columns: tiles of the chosen grid; both 0 for one square tile.
        tile_size: side of a tile in pixels.
        resized: (width, height) in pixels of the picture inside the grid.
        top, bottom, left, right: patch rows and columns of the grid that are kept, half open.
        patches_per_side: patches along one side of a tile.
        downscaled: (rows, columns) that the kept features are scaled down to, None where they stay as they are.
    """

    rows: int
    columns: int
    tile_size: int
    resized: tuple[int, int]
    top: int
    bottom: int
    left: int
    right: int
    patches_per_side: int
    downscaled: tuple[int, int] | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles, the whole-picture one included."""
        return 1 + self.rows * self.columns

    @property
    def num_features(self) -> int:
        """Placeholders in the prompt, and feature vectors that take their place."""
        rows, columns = self.downscaled or (self.bottom - self.top, self.right - self.left)
        return self.patches_per_side**2 + rows * (columns + 1)


@dataclass(frozen=True, slots=True)
class Downscale:
    """Features that one picture's plane is scaled down to, bilinearly.

    Attributes:
        plane: int64 [rows, columns], which of all [tiles x patches] features stands where.
        size: (rows, columns) after it.
    """

    plane: Tensor
    size: tuple[int, int]


def tilings_of(pictures: Sequence[Image.Image], rules: TileRules) -> tuple[Tiling, ...]:
    """How each of one sample's pictures is cut."""
    if len(pictures) > 1 and rules.multi_image == "square":
        return (_square(rules),) * len(pictures)
    return tuple(tiling(*picture.size, rules) for picture in pictures)


def _square(rules: TileRules) -> Tiling:
    """One tile and one row end: a row of a grid without columns."""
    side = rules.tile_size
    return Tiling(0, 0, side, (side, side), 0, 1, 0, 0, rules.patches_per_side)


@lru_cache(maxsize=65536)
def tiling(width: int, height: int, rules: TileRules) -> Tiling:
    """Choose the grid of a picture of `width` x `height` pixels; see `cut`."""
    cuts = cut(np.array([width]), np.array([height]), rules)
    rows, columns, resized_width, resized_height, top, bottom, left, right, down_rows, down_columns = (
        int(field[0]) for field in cuts
    )
    return Tiling(
        rows,
        columns,
        rules.tile_size,
        (resized_width, resized_height),
        top,
        bottom,
        left,
        right,
        rules.patches_per_side,
        (down_rows, down_columns) if down_rows else None,
    )


class Cuts(NamedTuple):
    """The fields of many pictures' `Tiling`, each int64 [N]; `down_rows` and `down_columns` are 0 where nothing is
    scaled down."""

    rows: np.ndarray
    columns: np.ndarray
    resized_width: np.ndarray
    resized_height: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray
    down_rows: np.ndarray
    down_columns: np.ndarray

    @property
    def num_tiles(self) -> np.ndarray:
        """As `Tiling.num_tiles`."""
        return 1 + self.rows * self.columns

    def num_features(self, rules: TileRules) -> np.ndarray:
        """As `Tiling.num_features`."""
        rows = np.where(self.down_rows > 0, self.down_rows, self.bottom - self.top)
        columns = np.where(self.down_rows > 0, self.down_columns, self.right - self.left)
        return rules.patches_per_side**2 + rows * (columns + 1)


def cut(widths: np.ndarray, heights: np.ndarray, rules: TileRules) -> Cuts:
    """How any-res cuts pictures of the given sizes.

    The grid keeps as many of the picture's pixels as possible, and of equals the one with the least padding.

    Args:
        widths, heights: int64 [N], pixels, at least 1.
        rules: of the model.
    """
    side, patches = rules.tile_size, rules.patches_per_side
    rows, columns = (np.zeros(len(widths), np.int64) for _ in range(2))
    best_kept, best_waste = (np.full(len(widths), -(2**62)) for _ in range(2))
    for grid_rows, grid_columns in rules.grids:
        area = grid_rows * grid_columns * side * side
        scale = np.minimum(grid_columns * side / widths, grid_rows * side / heights)
        fitted = (widths * scale).astype(np.int64) * (heights * scale).astype(np.int64)
        kept = np.minimum(fitted, widths * heights)
        better = (kept > best_kept) | ((kept == best_kept) & (kept - area > best_waste))
        rows[better], columns[better] = grid_rows, grid_columns
        best_kept[better], best_waste[better] = kept[better], (kept - area)[better]
    grid_width, grid_height = columns * side, rows * side
    # The longer side fills the grid; the other is rounded up and cannot pass the border.
    fills_width = grid_width / widths < grid_height / heights
    by_width = np.minimum(np.ceil(heights * (grid_width / widths)).astype(np.int64), grid_height)
    by_height = np.minimum(np.ceil(widths * (grid_height / heights)).astype(np.int64), grid_width)
    patch_columns, patch_rows = columns * patches, rows * patches
    # Patches that see only padding. transformers and vLLM round the kept share of the patches to 7 digits before they
    # cut it off, which for pictures of less than a million pixels a side is division of integers.
    is_wide = widths / heights > patch_columns / patch_rows
    top = np.where(is_wide, (patch_rows - heights * patch_columns // widths) // 2, 0)
    left = np.where(is_wide, 0, (patch_columns - widths * patch_rows // heights) // 2)
    bottom, right = patch_rows - top, patch_columns - left
    ratio = np.sqrt((bottom - top) * (right - left) / (rules.max_tiles * patches**2))
    is_down = ratio > DOWNSCALE_ABOVE
    ratio = np.where(is_down, ratio, 1.0)
    return Cuts(
        rows,
        columns,
        np.where(fills_width, grid_width, by_height),
        np.where(fills_width, by_width, grid_height),
        top,
        bottom,
        left,
        right,
        np.where(is_down, (bottom - top) // ratio, 0).astype(np.int64),
        np.where(is_down, (right - left) // ratio, 0).astype(np.int64),
    )


@lru_cache(maxsize=4096)
def kept_plane(grid: Tiling) -> np.ndarray:
    """The grid's features that see some of the picture.

    Returns:
        int64 [bottom - top, right - left]: index into the picture's [tiles x patches] features.
    """
    side = grid.patches_per_side
    # [rows, columns, patch row, patch column] -> one plane of patches
    plane = side * side + np.arange(grid.rows * grid.columns * side * side)
    plane = plane.reshape(grid.rows, grid.columns, side, side).transpose(0, 2, 1, 3)
    plane = plane.reshape(grid.rows * side, grid.columns * side)
    return plane[grid.top : grid.bottom, grid.left : grid.right]


@lru_cache(maxsize=4096)
def feature_order(grid: Tiling) -> np.ndarray:
    """Which feature stands at each placeholder of one picture.

    Returns:
        int64 [num_features]: index into the picture's [tiles x patches] features, followed by its downscaled ones
        where it has them, or `NEWLINE`.
    """
    num_patches = grid.patches_per_side**2
    if grid.downscaled is not None:
        rows, columns = grid.downscaled
        plane = grid.num_tiles * num_patches + np.arange(rows * columns).reshape(rows, columns)
    elif grid.rows:
        plane = kept_plane(grid)
    else:
        plane = np.empty((1, 0), np.int64)
    newlines = np.full((plane.shape[0], 1), NEWLINE)
    order = np.concatenate([np.arange(num_patches), np.concatenate([plane, newlines], axis=1).reshape(-1)])
    assert len(order) == grid.num_features
    order.setflags(write=False)
    return order


def tiles_of(picture: Image.Image, grid: Tiling) -> np.ndarray:
    """Cut a picture into tiles.

    Returns:
        uint8 [num_tiles, tile_size, tile_size, 3]: the whole picture squeezed into one tile, then the grid's tiles
        row by row; or the one square tile.
    """
    side = grid.tile_size
    width, height = grid.columns * side, grid.rows * side
    pixels = np.array(picture)
    if not grid.rows:
        return _resized(_padded_to_square(pixels), (side, side))[None]
    base = _resized(pixels, (side, side))[None]
    inside = _resized(pixels, grid.resized)
    canvas = np.zeros((height, width, 3), np.uint8)
    y, x = (height - inside.shape[0]) // 2, (width - inside.shape[1]) // 2
    canvas[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    tiles = canvas.reshape(grid.rows, side, grid.columns, side, 3).transpose(0, 2, 1, 3, 4)
    return np.concatenate([base, tiles.reshape(-1, side, side, 3)])


def pixel_values(tiles: Tensor) -> Tensor:
    """Normalise tiles: uint8 [T, h, w, 3] -> float32 [T, 3, h, w], on the device they are on."""
    # The order of operations of transformers' image processors, which fold the division by 255 into mean and std.
    values = (tiles.permute(0, 3, 1, 2).to(torch.float32) - 255 * PIXEL_MEAN) / (255 * PIXEL_STD)
    return values.contiguous()


def read_picture(source: Path | IO[bytes], name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, upright, on white where it is transparent.

    Args:
        source: file, or open binary stream.
        name: what to call it in an error.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InputError: missing, not a picture, too large, or cut off.
    """
    try:
        # No format that would run a program, as Pillow does for PostScript.
        with Image.open(source, formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise InputError(
                    f"picture {name} has {picture.width} x {picture.height} pixels, more than {max_pixels:,}; "
                    "scale it down or remove it"
                )
            return to_rgb(picture)
    except FileNotFoundError:
        raise InputError(f"picture {name} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"picture {name} cannot be read: {error}; replace or remove it") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, as vLLM makes it of a user's picture, but for those of larger integers, which Pillow would cut off.

    White is the largest value of 8, 12 or 16 bits, whichever the brightest pixel needs: files do not say how many bits
    count.

    Raises:
        OSError: the picture is cut off, or has pixels of unknown range.
    """
    if picture.mode == "RGB" and "transparency" not in picture.info and not picture.getexif().get(EXIF_ORIENTATION):
        picture.load()
        return picture
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F":
        raise OSError("its pixels are floating-point numbers of unknown range")
    if upright.mode.startswith("I"):
        pixels = np.asarray(upright).astype(np.int64)
        brightest = pixels.max(initial=0)
        white = next((white for white in _WHITES if brightest <= white), None)
        if white is None or pixels.min(initial=0) < 0:
            raise OSError(f"its pixels are integers from {pixels.min()} to {brightest}, of unknown range")
        return Image.fromarray((pixels * 255 // white).astype(np.uint8)).convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        on_white = Image.new("RGB", upright.size, (255, 255, 255))
        on_white.paste(upright, mask=upright.getchannel("A"))
        return on_white
    return upright.convert("RGB")


def _padded_to_square(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] in the middle of a grey square."""
    height, width, _ = pixels.shape
    side = max(height, width)
    canvas = np.full((side, side, 3), int(255 * PIXEL_MEAN), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = pixels
    return canvas


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], bicubic with antialiasing.

    By torch, not Pillow: this is what torchvision calls in the processor that vLLM loads whatever the directory asks
    for, and the two differ by up to 13 of 255.
    """
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].numpy().transpose(1, 2, 0)
