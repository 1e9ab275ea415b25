"""The order in which Hiera (2306.00989) keeps its tokens: the place inside a mask unit before the unit, its finest step
first, so that pooling queries is a maximum over the first places."""

import math
from typing import Any

from torch import Tensor

from .options import Grid, pair


def hiera_cell(native: Any) -> Grid:
    """Pixels of a token of the last stage, of a config of transformers."""
    patch, step = pair(list(native.patch_stride)), pair(list(native.query_stride))
    return patch[0] * step[0] ** native.num_query_pool, patch[1] * step[1] ** native.num_query_pool


def in_reading_order(tokens: Tensor, native: Any, grid: Grid) -> Tensor:
    """The last stage's tokens (batch, rows * cols, dim) of a whole image, as transformers' model returns them."""
    step = pair(list(native.query_stride))
    rest = [step] * (len(native.depths) - 1 - native.num_query_pool)  # poolings that are left out
    units = grid[0] // step[0] ** len(rest), grid[1] // step[1] ** len(rest)
    return to_raster(tokens, rest, units)


def unroll(tokens: Tensor, strides: list[Grid], units: Grid, visible: Tensor | None) -> Tensor:
    """(batch, rows * cols, dim) in reading order -> (batch, places * units, dim) in Hiera's. `strides` are the steps
    inside a unit, the finest first; `visible` (batch, count) are the units that stay."""
    batch, _, dim = tokens.shape
    sides = [(units[axis], *(step[axis] for step in reversed(strides))) for axis in (0, 1)]
    depth = len(strides)
    cells = tokens.view(batch, *sides[0], *sides[1], dim)
    # Axes of rows: 1 the unit, then from coarse to fine; of columns: the same, `depth + 1` further on.
    steps = [axis + shift for axis in range(depth + 1, 1, -1) for shift in (0, depth + 1)]
    cells = cells.permute(0, *steps, 1, depth + 2, 2 * depth + 3).reshape(batch, -1, math.prod(units), dim)
    if visible is not None:
        index = visible[:, None, :, None].expand(-1, cells.shape[1], -1, dim)
        cells = cells.gather(2, index)
    return cells.flatten(1, 2)


def within_units(tokens: Tensor, strides: list[Grid]) -> Tensor:
    """Unrolled tokens, of whose `strides` the last are left -> (batch, units, rows, cols, dim)."""
    batch, _, dim = tokens.shape
    cells = tokens.view(batch, *(side for step in strides for side in step), -1, dim)
    depth = len(strides)
    rows, cols = (range(2 * depth - 1 + axis, axis, -2) for axis in (0, 1))
    cells = cells.permute(0, 2 * depth + 1, *rows, *cols, 2 * depth + 2)
    sides = [math.prod(step[axis] for step in strides) for axis in (0, 1)]
    return cells.reshape(batch, -1, *sides, dim)


def to_raster(tokens: Tensor, strides: list[Grid], units: Grid) -> Tensor:
    """The unrolled tokens of a whole image in reading order, (batch, rows * cols, dim)."""
    cells = within_units(tokens, strides).unflatten(1, units)
    return cells.transpose(2, 3).flatten(1, 4)
