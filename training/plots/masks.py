"""Masks laid over images: what was to be found, and what was."""

import colorsys

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from hf_mim.training.data.masks import IGNORE
from hf_mim.training.plots.pictures import FONT, GAP, MOST, SIDE


OPACITY = 0.6
NAMED = 24  # classes that the legend has room for


def colours(classes: int) -> np.ndarray:
    """(classes, 3), uint8: the first, most often a background, is black; the others differ in hue and lightness."""
    golden = 0.61803398875  # hues that follow each other by this share of the circle stay apart for any number
    hues = [colorsys.hsv_to_rgb(i * golden % 1, (1.0, 0.65)[i % 2], (1.0, 0.85)[i // 2 % 2]) for i in range(classes)]
    hues[0] = (0.0, 0.0, 0.0)
    return np.rint(255 * np.array(hues)).astype(np.uint8)


def overlay(image: np.ndarray, ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 with the classes of `ids` (height, width) laid over it; pixels of no class stay bare."""
    known = (ids != IGNORE)[..., None]
    mixed = (1 - OPACITY) * image + OPACITY * palette[np.where(known[..., 0], ids, 0)]
    return np.where(known, np.rint(mixed), image).astype(np.uint8)


def draw_masks(
    images: list[np.ndarray],
    masks: list[np.ndarray],
    predictions: dict[str, list[np.ndarray]],
    classes: list[str],
    blocks: int = 2,
) -> PIL.Image.Image:
    """One row per image: the image, its mask, and every prediction, each laid over the image.

    Args:
        images: (channels, height, width), uint8, of any sizes; of other than 3 channels the first is shown.
        masks: (height, width), class ids; 255 is none.
        predictions: {caption: maps like `masks`}.
        classes: names by id, for the legend; only classes that occur are named.
        blocks: how many blocks of rows lie next to each other.
    """
    palette, columns = colours(len(classes)), {"true": masks, **predictions}
    tiles = make_tiles(images, columns, palette)
    present = sorted({int(i) for maps in columns.values() for ids in maps for i in np.unique(ids)} - {IGNORE})
    font, blocks = PIL.ImageFont.load_default(FONT), min(blocks, len(images))
    legend, rows = [(classes[i], tuple(palette[i].tolist())) for i in present[:NAMED]], -(-len(images) // blocks)
    width, height = (max(tile.size[axis] for column in tiles for tile in column) for axis in (0, 1))
    block_width, top = len(tiles) * (width + GAP) + 3 * GAP, FONT + 3 * GAP
    total = blocks * block_width - GAP
    lines = wrap_legend(legend, font, total - 4 * GAP)
    bottom = top + rows * (height + GAP)
    canvas = PIL.Image.new("RGB", (total, bottom + GAP + len(lines) * (FONT + GAP)), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for block in range(blocks):
        for column, caption in enumerate(["image", *columns]):
            x = block * block_width + 2 * GAP + column * (width + GAP)
            draw.text((x + width / 2, top - GAP), caption, "black", font, anchor="ms")
            for row, tile in enumerate(tiles[column][block * rows : (block + 1) * rows]):
                canvas.paste(tile, (x, top + row * (height + GAP)))
    draw_legend(draw, lines, bottom, font)
    return canvas


def make_tiles(images: list[np.ndarray], columns: dict[str, list[np.ndarray]], palette) -> list[list]:
    """The images, and for every column the images with its masks laid over them."""
    shown = [(image if len(image) == 3 else image[[0, 0, 0]]).transpose(1, 2, 0) for image in images]
    laid_over = [[overlay(i, ids, palette) for i, ids in zip(shown, maps, strict=True)] for maps in columns.values()]
    return [[to_tile(picture) for picture in column] for column in (shown, *laid_over)]


def draw_legend(draw, lines: list[list[tuple[float, str, tuple]]], bottom: int, font) -> None:
    """Draws the lines of `wrap_legend` from `bottom` down."""
    for line, entries in enumerate(lines):
        y = bottom + GAP + line * (FONT + GAP)
        for x, name, colour in entries:
            draw.rectangle((2 * GAP + x, y, 2 * GAP + x + FONT, y + FONT), fill=colour)
            draw.text((2 * GAP + x + FONT + GAP, y), name, "black", font)


def wrap_legend(entries: list[tuple[str, tuple]], font, width: float) -> list[list[tuple[float, str, tuple]]]:
    """Names and colours -> lines of (x, name, colour), none wider than `width` pixels."""
    lines, x = [[]], 0.0
    for name, colour in entries:
        needed = FONT + 3 * GAP + font.getlength(name)
        if lines[-1] and x + needed > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, name, colour))
        x += needed
    return lines


def to_tile(pixels: np.ndarray) -> PIL.Image.Image:
    """(height, width, 3) uint8, enlarged by a whole factor or shrunk as the other pictures of a run are."""
    tile = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    factor = -(-SIDE // min(tile.size))
    if factor > 1:
        return tile.resize((tile.width * factor, tile.height * factor), PIL.Image.Resampling.NEAREST)
    tile.thumbnail((MOST, MOST), PIL.Image.Resampling.LANCZOS)
    return tile
