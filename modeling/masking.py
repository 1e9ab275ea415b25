"""Which tokens are hidden. A mask generator is a function in `MASK_GENERATORS`.

Every generator takes (batch, grid, rngs, *, ratio, unit, ...) and returns a bool tensor (batch, rows * cols), True
where a token is hidden. `rngs` holds one numpy Generator per image, so that a mask depends on that image alone.

Counts are exact and the same for every image: with the grid a multiple of the mask unit, ceil(ratio * units) units;
otherwise (units cut by the border) ceil(ratio * tokens) tokens, the last unit trimmed at random. `none` hides nothing.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .configuration_base import MIMConfigBase
from .options import Grid, Size, check_part, options_of, pair


def count_hidden(grid: Grid, ratio: float, unit: Size = 1) -> int:
    """How many tokens of the grid are hidden.

    Raises:
        ValueError: `ratio` is not in (0, 1), or leaves no visible or no hidden token.
    """
    if not 0 < ratio < 1:
        remedy = ": model.masking=none hides nothing" if ratio == 0 else ""
        raise ValueError(f"the mask ratio must be in (0, 1), got {ratio}{remedy}")
    (rows, cols), (down, right) = grid, pair(unit)
    whole = rows % down == 0 and cols % right == 0
    units = (rows // down) * (cols // right) if whole else rows * cols
    # 1e-9: 0.07 * 100 is 7.000000000000001 in floating point, yet means 7.
    hidden = math.ceil(units * ratio - 1e-9) * (down * right if whole else 1)
    if not 0 < hidden < rows * cols:
        what = "visible" if hidden else "hidden"
        raise ValueError(
            f"mask ratio {ratio} with mask unit {down}x{right} leaves no {what} token of the {rows}x{cols} grid"
        )
    return hidden


def hides_tokens(config: MIMConfigBase) -> bool:
    """Whether the config's masking hides anything. With `none` whole images are encoded, and all tokens predicted."""
    return config.masking != "none"


def num_hidden_tokens(config: MIMConfigBase, grid: Grid) -> int:
    """What the config's masking hides of this grid, in every image."""
    if not hides_tokens(config):
        return 0
    options = {**options_of(MASK_GENERATORS[config.masking]), **config.options("masking")}
    return count_hidden(grid, options["ratio"], options.get("unit", 1))


def check_masking(config: MIMConfigBase, grid: Grid) -> None:
    """Raises:
    ValueError: the generator or an option is unknown, an option's value is bad, or the ratio does not fit the grid.
    """
    check_part("mask generator", MASK_GENERATORS, config.masking, config.options("masking"), config.plugins)
    num_hidden_tokens(config, grid)
    if config.masks_per_image < 1:
        raise ValueError(f"masks_per_image must be at least 1, got {config.masks_per_image}")
    if config.masks_per_image > 1 and not hides_tokens(config):
        raise ValueError(f"masks_per_image must be 1 with masking 'none', got {config.masks_per_image}")
    sample_masks(config, grid, [np.random.default_rng(0)])


def check_nothing_hidden(bool_masked_pos: Tensor) -> None:
    """Raises:
    ValueError: a mask (batch, tokens) hides something, which a model made with masking `none` cannot do.
    """
    message = "this model was made with masking 'none': it hides nothing, and bool_masked_pos must be absent"
    if torch.compiler.is_compiling() or bool_masked_pos.is_cuda:  # neither break the graph nor wait for the GPU
        torch._assert_async(~bool_masked_pos.any(), message)
    elif not bool_masked_pos.is_meta and bool_masked_pos.any():
        raise ValueError(message)


def sample_masks(config: MIMConfigBase, grid: Grid, rngs: list[np.random.Generator]) -> Tensor:
    """Masks as the config says, one per generator: bool (batch, rows * cols), True = hidden; (batch, M, rows * cols)
    with M `masks_per_image` above 1."""
    generate = MASK_GENERATORS[config.masking]
    options = config.options("masking")
    masks = [generate(len(rngs), grid, rngs, **options) for _ in range(config.masks_per_image)]
    return masks[0] if len(masks) == 1 else torch.stack(masks, dim=1)


def no_mask(batch: int, grid: Grid, rngs: list[np.random.Generator]) -> Tensor:
    """Hides nothing: for distillation on whole images."""
    return torch.zeros(batch, grid[0] * grid[1], dtype=torch.bool)


def random_mask(
    batch: int, grid: Grid, rngs: list[np.random.Generator], *, ratio: float = 0.75, unit: int | tuple[int, int] = 1
) -> Tensor:
    """Units drawn uniformly without replacement (MAE with unit 1, SimMIM and A2MIM with 32 pixels).

    Options:
        ratio: share of hidden tokens, in (0, 1).
        unit: tokens that are hidden together: the side of a square, or a (height, width) pair.
    """
    hidden = count_hidden(grid, ratio, unit)
    return _hide_first(_unit_order(grid, unit, rngs), hidden)


def block_mask(
    batch: int,
    grid: Grid,
    rngs: list[np.random.Generator],
    *,
    ratio: float = 0.4,
    unit: int | tuple[int, int] = 1,
    min_block: int = 16,
    min_aspect: float = 0.3,
    tries: int = 10,
) -> Tensor:
    """Rectangles of random size, place and shape until the count is reached (BEiT, 2106.08254, Algorithm 1).

    What no rectangle can add is drawn at random.

    Options:
        ratio: share of hidden tokens, in (0, 1).
        unit: tokens that are hidden together: the side of a square, or a (height, width) pair.
        min_block: units of a rectangle at least; fewer where fewer are still missing.
        min_aspect: the aspect ratio of a rectangle lies between this, in (0, 1], and its inverse.
        tries: of each rectangle to add something without passing the count.
    """
    if not 0 < min_aspect <= 1 or min_block < 1 or tries < 1:
        raise ValueError(
            "block masks need min_aspect in (0, 1], min_block and tries of at least 1, "
            f"got min_aspect={min_aspect}, min_block={min_block}, tries={tries}"
        )
    hidden = count_hidden(grid, ratio, unit)
    units = _unit_grid(grid, unit)
    count = max(1, units[0] * units[1] * hidden // (grid[0] * grid[1]))
    masks = np.stack([_draw_blocks(units, count, rng, min_block, min_aspect, tries) for rng in rngs])
    return _hide_first(_unit_order(grid, unit, rngs, first=masks), hidden)


def inverse_block_mask(
    batch: int,
    grid: Grid,
    rngs: list[np.random.Generator],
    *,
    ratio: float = 0.8,
    unit: int | tuple[int, int] = 1,
    block_size: int = 3,
    adjust: float = 0.07,
) -> Tensor:
    """Hides all but some square blocks (data2vec 2.0, 2212.07525, section 3.2, as released).

    As many blocks as fill the visible share plus `adjust`, rounded down, have their centres at random, with
    repetition, and are cut by the border; what they show too much or too little is corrected at random.

    Options:
        ratio: share of hidden tokens, in (0, 1).
        unit: tokens that are hidden together: the side of a square, or a (height, width) pair.
        block_size: side of the visible blocks in units.
        adjust: share of the units by which more is shown, at least 0, since blocks overlap.
    """
    if block_size < 1 or adjust < 0:
        raise ValueError(f"block_size must be at least 1 and adjust at least 0, got {block_size} and {adjust}")
    hidden = count_hidden(grid, ratio, unit)
    units = _unit_grid(grid, unit)
    # 1e-9: 1 - 0.8 is a little less than 0.2 in floating point.
    blocks = max(1, int(units[0] * units[1] * (1 - ratio + adjust) / block_size**2 + 1e-9))
    visible = np.stack([_draw_squares(units, blocks, rng, block_size) for rng in rngs])
    return _hide_first(_unit_order(grid, unit, rngs, first=~visible), hidden)


MASK_GENERATORS = {"random": random_mask, "block": block_mask, "inverse_block": inverse_block_mask, "none": no_mask}


def _unit_grid(grid: Grid, unit: Size) -> Grid:
    down, right = pair(unit)
    return -(-grid[0] // down), -(-grid[1] // right)


def _unit_order(grid: Grid, unit, rngs, first: np.ndarray | None = None) -> np.ndarray:
    """Scores (batch, rows, cols) in whose ascending order tokens are to be hidden: unit after unit at random, those
    in `first` (batch, unit rows, unit cols) before the others, and the tokens inside a unit at random."""
    (rows, cols), (down, right) = grid, pair(unit)
    units = _unit_grid(grid, unit)
    noise = np.stack([rng.random(units) for rng in rngs])
    if first is not None:
        noise += ~first
    if (down, right) == (1, 1):
        return noise
    order = noise.reshape(len(rngs), -1).argsort(axis=1).argsort(axis=1).reshape(noise.shape)
    order = order.repeat(down, axis=1).repeat(right, axis=2)[:, :rows, :cols]
    return order + np.stack([rng.random(grid) for rng in rngs])


def _hide_first(scores: np.ndarray, hidden: int) -> Tensor:
    flat = scores.reshape(len(scores), -1)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, flat.argpartition(hidden - 1, axis=1)[:, :hidden], True, axis=1)
    return torch.from_numpy(mask)


def _draw_blocks(grid: Grid, count: int, rng, min_block: int, min_aspect: float, tries: int) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    log_aspect = math.log(min_aspect)
    while (missing := count - int(mask.sum())) > 0:
        for _ in range(tries):
            area = rng.uniform(min(min_block, missing), missing)
            aspect = math.exp(log_aspect * rng.uniform(-1, 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= grid[0] and 0 < width <= grid[1]):
                continue
            top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - int(block.sum()) <= missing:
                block[:] = True
                break
        else:
            break
    return mask


def _draw_squares(grid: Grid, blocks: int, rng, block_size: int) -> np.ndarray:
    mask = np.zeros(grid, dtype=bool)
    for cell in rng.integers(grid[0] * grid[1], size=blocks):
        top, left = cell // grid[1] - block_size // 2, cell % grid[1] - block_size // 2
        mask[max(top, 0) : top + block_size, max(left, 0) : left + block_size] = True
    return mask
