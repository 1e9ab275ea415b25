"""The grid in which every picture of images stands: a row for each image, captions above, legend and note below."""

import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


SIDE = 128  # least height and width of a tile, pixels; smaller images are enlarged by a whole factor
MOST = 256  # larger ones are shrunk to this
GAP, FONT = 6, 14
LINE = FONT + 5

Legend = Sequence[tuple[str, tuple[int, ...]]]  # names and colours


def to_tile(pixels: np.ndarray) -> PIL.Image.Image:
    """(height, width, 3) uint8, with sides of at least `SIDE`, and not far above `MOST`."""
    tile = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    factor = -(-SIDE // min(tile.size))
    if factor > 1:
        return tile.resize((tile.width * factor, tile.height * factor), PIL.Image.Resampling.NEAREST)
    tile.thumbnail((MOST, MOST), PIL.Image.Resampling.LANCZOS)
    return tile


def draw_grid(
    columns: dict[str, list[PIL.Image.Image]], blocks: int = 2, legend: Legend = (), note: str = ""
) -> PIL.Image.Image:
    """Rows of tiles side by side, under the captions of their columns, in `blocks` blocks next to each other.

    Args:
        columns: {caption: one tile for each row}, of any sizes.
    """
    font, count = PIL.ImageFont.load_default(FONT), len(next(iter(columns.values())))
    blocks = min(blocks, count)
    rows = -(-count // blocks)
    width, height = (max(tile.size[axis] for tiles in columns.values() for tile in tiles) for axis in (0, 1))
    block_width = len(columns) * (width + GAP) + 3 * GAP
    captions = [wrap(caption, font, width) for caption in columns]
    top = LINE * max(caption.count("\n") + 1 for caption in captions) + 2 * GAP
    total, bottom = blocks * block_width - GAP, top + rows * (height + GAP)
    lines, note = wrap_legend(legend, font, total - 4 * GAP), wrap(note, font, total - 6 * GAP)
    below = len(lines) * (FONT + GAP) + (LINE * (note.count("\n") + 1) + GAP if note else 0)
    canvas = PIL.Image.new("RGB", (total, bottom + below + GAP), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    for block in range(blocks):
        for column, (caption, tiles) in enumerate(zip(captions, columns.values())):
            x = block * block_width + 2 * GAP + column * (width + GAP)
            draw.multiline_text((x + width / 2, top - GAP), caption, "black", font, anchor="md", align="center")
            for row, tile in enumerate(tiles[block * rows : (block + 1) * rows]):
                canvas.paste(tile, (x, top + row * (height + GAP)))
    draw_legend(draw, lines, bottom, font)
    draw.multiline_text((2 * GAP, bottom + GAP + len(lines) * (FONT + GAP)), note, "black", font)
    return canvas


def wrap(text: str, font, width: float) -> str:
    letters = max(4, int(width / (font.getlength("abcdefghij klmnopqrst") / 21)))
    return textwrap.fill(text, letters)


def draw_legend(draw, lines: list[list[tuple[float, str, tuple]]], bottom: int, font) -> None:
    """Draws the lines of `wrap_legend` from `bottom` down."""
    for line, entries in enumerate(lines):
        y = bottom + GAP + line * (FONT + GAP)
        for x, name, colour in entries:
            draw.rectangle((2 * GAP + x, y, 2 * GAP + x + FONT, y + FONT), fill=colour)
            draw.text((2 * GAP + x + FONT + GAP, y), name, "black", font)


def wrap_legend(entries: Legend, font, width: float) -> list[list[tuple[float, str, tuple]]]:
    """Names and colours -> lines of (x, name, colour), none wider than `width` pixels."""
    lines: list[list[tuple[float, str, tuple]]] = []
    x = width
    for name, colour in entries:
        length = FONT + 3 * GAP + font.getlength(name)
        if x + length > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, name, colour))
        x += length
    return lines
