"""Any-res tiling against transformers' processor, picture by picture and size by size."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextProcessor, LlavaOnevisionProcessor

from megatron_mm.chat.images import (
    NEWLINE,
    TileRules,
    feature_order,
    pixel_values,
    read_picture,
    tiles_of,
    tiling,
    tilings_of,
)
from megatron_mm.config.errors import InputError

SHAPES = ((32, 32), (30, 30), (31, 64), (64, 31), (100, 40), (40, 100), (900, 200), (200, 900), (1, 1), (65, 63))
GRIDS = tuple((rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
RULES = TileRules(GRIDS, 32, 4)


def _picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _processor() -> LlavaNextImageProcessor:
    side = RULES.tile_size
    return LlavaNextImageProcessor(
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in GRIDS],
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        do_center_crop=False,
        resample=3,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_equal_transformers(shape: tuple[int, int]) -> None:
    picture = _picture(*shape)
    grid = tiling(*shape, RULES)
    ours = pixel_values(torch.from_numpy(tiles_of(picture, grid))).numpy()
    theirs = _processor()(images=picture, return_tensors="np")["pixel_values"][0]
    assert ours.shape[0] == grid.num_tiles
    # Padded by the processor to the most tiles of a batch, which is one picture here.
    assert np.abs(ours - np.asarray(theirs)).max() < 1e-6


@given(width=st.integers(1, 1500), height=st.integers(1, 1500))
def test_placeholders_equal_transformers(width: int, height: int) -> None:
    pinpoints = [[rows * 32, columns * 32] for rows, columns in GRIDS]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size = 8  # pyright: ignore[reportAttributeAccessIssue]
    processor.num_additional_image_tokens = 0  # pyright: ignore[reportAttributeAccessIssue]
    processor.image_processor = type("Pinpoints", (), {"image_grid_pinpoints": pinpoints})()  # pyright: ignore
    expected = processor._get_number_of_features(height, width, 32, 32)
    assert tiling(width, height, RULES).num_features == expected


@given(width=st.integers(1, 1500), height=st.integers(1, 1500), max_tiles=st.integers(1, 16))
def test_downscaled_placeholders_equal_transformers(width: int, height: int, max_tiles: int) -> None:
    grids = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.num_image_tokens = 16
    processor.vision_aspect_ratio = f"anyres_max_{max_tiles}"
    pinpoints = [[rows * 32, columns * 32] for rows, columns in grids]
    processor.image_processor = type("Pinpoints", (), {"image_grid_pinpoints": pinpoints})()  # pyright: ignore
    grid = tiling(width, height, TileRules(grids, 32, 4, max_tiles))
    assert grid.num_features == processor._get_number_of_features(height, width, 32, 32)
    order = feature_order(grid)
    # The tiles' features by number, or the downscaled ones that are numbered behind them.
    assert (order.max() >= 16 * grid.num_tiles) == (grid.downscaled is not None)


def test_several_pictures_can_be_squares_of_one_tile() -> None:
    rules = dataclasses.replace(RULES, multi_image="square")
    pictures = [_picture(60, 20), _picture(20, 60)]
    assert [grid.num_tiles for grid in tilings_of(pictures[:1], rules)] == [3]
    grids = tilings_of(pictures, rules)
    assert [grid.num_features for grid in grids] == [17, 17]
    assert feature_order(grids[0]).tolist() == [*range(16), NEWLINE]
    (tile,) = tiles_of(pictures[0], grids[0])
    # A third of the square is the picture, between bars of grey.
    assert (tile[:8] == 127).all()
    assert (tile[-8:] == 127).all()
    assert tile[12:20].std() > 10


@given(width=st.integers(1, 2000), height=st.integers(1, 2000))
def test_feature_order_names_each_kept_patch_once_and_ends_each_row(width: int, height: int) -> None:
    grid = tiling(width, height, RULES)
    order = feature_order(grid)
    patches = order[order != NEWLINE]
    assert len(set(patches.tolist())) == len(patches)
    assert patches.min() >= 0
    assert patches.max() < grid.num_tiles * 16
    assert np.array_equal(order[:16], np.arange(16))
    if grid.bottom == grid.top:  # a picture much longer than any grid keeps its base tile alone
        assert len(order) == 16
        return
    rows = order[16:].reshape(grid.bottom - grid.top, -1)
    assert (rows[:, -1] == NEWLINE).all()
    assert (rows[:, :-1] != NEWLINE).all()


def test_no_patch_of_padding_is_kept_and_none_of_the_picture_dropped() -> None:
    # 96 x 32 in a 1 x 3 grid fills it; 96 x 20 is padded above and below by 6 pixels: no whole patch row of 8.
    assert (tiling(96, 32, RULES).top, tiling(96, 32, RULES).bottom) == (0, 4)
    narrow = tiling(96, 12, RULES)
    assert (narrow.rows, narrow.columns) == (1, 3)
    assert narrow.bottom - narrow.top == 4 - 2 * math.floor((4 - 12 / 8) / 2)


def test_a_picture_that_cannot_be_read_is_named(tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        read_picture(broken, str(broken))
    with pytest.raises(InputError, match="does not exist"):
        read_picture(tmp_path / "none.png", "none.png")
