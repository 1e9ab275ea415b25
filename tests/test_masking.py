"""Every mask generator: exact counts, whole units, independence; what sets each one apart."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mim import MIMForPreTraining
from hf_mim.modeling.masking import MASK_GENERATORS, count_hidden, num_hidden_tokens, sample_masks


HIDING = [name for name in MASK_GENERATORS if name != "none"]
GENERATORS = pytest.mark.parametrize("name", HIDING)


def draw(name: str, batch: int, grid: tuple[int, int], seed: int = 0, **options) -> torch.Tensor:
    """Masks (batch, rows, cols) of the images seed, seed + 1, ..."""
    rngs = [np.random.default_rng([seed + i, 7]) for i in range(batch)]
    return MASK_GENERATORS[name](batch, grid, rngs, **options).view(batch, *grid)


def expected_count(grid, ratio, unit) -> int:
    """In exact arithmetic on the decimals as they are written: whole units where they fit, else tokens; rounded up."""
    down, right = (unit, unit) if isinstance(unit, int) else unit
    rows, cols = grid
    if rows % down == 0 and cols % right == 0:
        return math.ceil(Fraction(str(ratio)) * (rows // down) * (cols // right)) * down * right
    return math.ceil(Fraction(str(ratio)) * rows * cols)


GRIDS_AND_UNITS = [
    ((14, 14), 1),
    ((6, 6), 1),
    ((3, 11), 1),
    ((8, 12), 2),
    ((6, 9), (2, 3)),
    ((7, 7), 2),  # ragged: the last row and column of units have one token
    ((5, 8), (2, 3)),
    ((4, 4), 3),
    ((5, 3), 8),  # one unit, larger than the grid
]


@GENERATORS
@pytest.mark.parametrize("grid, unit", GRIDS_AND_UNITS)
@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.6, 0.75])
def test_every_image_has_exactly_the_count(name, grid, unit, ratio):
    wanted = expected_count(grid, ratio, unit)
    if wanted == grid[0] * grid[1]:
        pytest.skip("nothing would be visible: see test_bad_ratios")
    rngs = [np.random.default_rng(i) for i in range(9)]
    mask = MASK_GENERATORS[name](9, grid, rngs, ratio=ratio, unit=unit)
    assert mask.dtype == torch.bool and mask.shape == (9, grid[0] * grid[1])
    assert mask.sum(1).tolist() == [wanted] * 9


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(HIDING),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    unit=st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    percent=st.integers(1, 99),
    seed=st.integers(0, 2**32),
)
def test_count_property(name, grid, unit, percent, seed):
    ratio = percent / 100
    wanted = expected_count(grid, ratio, unit)
    if wanted == grid[0] * grid[1]:
        with pytest.raises(ValueError, match="no visible token"):
            draw(name, 1, grid, seed, ratio=ratio, unit=unit)
    else:
        mask = draw(name, 3, grid, seed, ratio=ratio, unit=unit)
        assert mask.sum((1, 2)).tolist() == [wanted] * 3 == [count_hidden(grid, ratio, unit)] * 3


@pytest.mark.parametrize(
    "name, grid, ratio, unit, hidden",
    [
        ("random", (14, 14), 0.75, 1, 147),  # MAE: 49 visible
        ("random", (7, 7), 0.6, 1, 30),  # SimMIM and A2MIM: 32-pixel cells of 224
        ("random", (14, 14), 0.6, 2, 120),  # the same 30 cells, as 16-pixel patches
        ("random", (6, 6), 0.6, 1, 22),  # SimMIM at 192
        ("block", (14, 14), 0.38, 1, 75),  # BEiT
        ("block", (14, 14), 0.4, 1, 79),  # MaskFeat's 40 percent, rounded up
        ("inverse_block", (14, 14), 0.8, 1, 157),  # data2vec 2.0
        ("random", (10, 10), 0.07, 1, 7),  # in floating point 0.07 * 100 is more than 7
    ],
)
def test_counts_of_the_papers(name, grid, ratio, unit, hidden):
    assert draw(name, 4, grid, ratio=ratio, unit=unit).sum((1, 2)).tolist() == [hidden] * 4


@GENERATORS
@pytest.mark.parametrize("grid, unit", [((8, 12), (2, 2)), ((6, 9), (2, 3)), ((12, 4), (4, 1))])
def test_units_are_hidden_whole(name, grid, unit):
    mask = draw(name, 20, grid, ratio=0.5, unit=unit)
    cells = mask.view(20, grid[0] // unit[0], unit[0], grid[1] // unit[1], unit[1])
    assert torch.equal(cells.all(4).all(2), cells.any(4).any(2))


@GENERATORS
def test_ragged_units_are_whole_but_one(name):
    """With units cut by the border, at most one unit of a purely unit-wise generator is hidden in part."""
    mask = draw(name, 20, (7, 7), ratio=0.5, unit=2)
    for image in mask:
        cells = [image[i : i + 2, j : j + 2] for i in range(0, 7, 2) for j in range(0, 7, 2)]
        assert sum(bool(cell.any() and not cell.all()) for cell in cells) <= 1


@GENERATORS
def test_a_mask_depends_on_its_own_generator_only(name):
    batch = draw(name, 6, (9, 8), ratio=0.4, unit=(3, 2))
    for i in range(6):
        assert torch.equal(draw(name, 1, (9, 8), seed=i, ratio=0.4, unit=(3, 2))[0], batch[i])
    assert not all(torch.equal(batch[0], mask) for mask in batch[1:])
    assert torch.equal(draw(name, 6, (9, 8), ratio=0.4, unit=(3, 2)), batch)


def test_random_is_uniform():
    """Frequencies of 4000 draws of 12 of 20 tokens. Each count has variance n p (1 - p), and the counts of a draw sum
    to 12, so sum (count - n p)^2 / (n p (1 - p)) * 19 / 20 is about chi-square with 19 degrees of freedom: 43.8 is
    exceeded once in a thousand, and the seeds are fixed."""
    draws, probability = 4000, 12 / 20
    counts = draw("random", draws, (4, 5), ratio=0.6).flatten(1).sum(0).double()
    statistic = (counts - draws * probability).square().sum() / (draws * probability * (1 - probability)) * 19 / 20
    assert statistic < 43.8
    both = draw("random", draws, (4, 5), ratio=0.6)[:, 0, :2].all(1).double().mean()
    assert abs(both - 12 / 20 * 11 / 19) < 4 * (0.3474 * 0.6526 / draws) ** 0.5  # pairs, too: four standard errors


def equal_neighbours(mask: torch.Tensor, value: bool) -> float:
    """The mean number of 4-neighbours with `value` of the tokens with `value`."""
    same = (mask == value).double()
    pairs = (same[:, 1:] * same[:, :-1]).sum() + (same[:, :, 1:] * same[:, :, :-1]).sum()
    return float(2 * pairs / same.sum())


def test_blocks_hold_together():
    random = draw("random", 200, (14, 14), ratio=0.4)
    block = draw("block", 200, (14, 14), ratio=0.4)
    assert equal_neighbours(random, True) < 1.6  # 0.4 * 3.7
    assert equal_neighbours(block, True) > 2.7
    random = draw("random", 200, (14, 14), ratio=0.8)
    inverse = draw("inverse_block", 200, (14, 14), ratio=0.8)
    assert equal_neighbours(random, False) < 0.9
    assert equal_neighbours(inverse, False) > 1.8


def test_blocks_have_the_size_and_aspect_asked_for():
    """Where the smallest block is all that is wanted, a mask is one rectangle."""
    for mask in draw("block", 50, (20, 20), ratio=0.16, min_block=64, min_aspect=1.0):
        assert mask.any(0).sum() == mask.any(1).sum() == 8
    heights = set()
    for mask in draw("block", 200, (20, 20), ratio=0.16, min_block=64, min_aspect=0.25):
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        if height * width == 64:  # else the rounding of its sides left some tokens to be drawn elsewhere
            assert 4 <= height <= 16
            heights.add(height)
    assert 8 in heights and len(heights) > 1


def test_inverse_blocks_of_size_one_are_single_tokens():
    lone = draw("inverse_block", 200, (14, 14), ratio=0.9, block_size=1)
    assert equal_neighbours(lone, False) < 0.6
    whole = draw("inverse_block", 200, (14, 14), ratio=0.9, block_size=4)
    assert equal_neighbours(whole, False) > 1.8


@GENERATORS
@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.5, float("nan")])
def test_bad_ratios(name, ratio):
    with pytest.raises(ValueError, match=rf"mask ratio must be in \(0, 1\), got {ratio}"):
        draw(name, 1, (4, 4), ratio=ratio)


@GENERATORS
def test_ratios_that_leave_nothing(name):
    with pytest.raises(ValueError, match=r"mask ratio 0\.9 with mask unit 2x2 leaves no visible token of the 4x4 grid"):
        draw(name, 1, (4, 4), ratio=0.9, unit=2)
    with pytest.raises(ValueError, match=r"mask ratio 0\.5 with mask unit 1x1 leaves no visible token of the 1x1 grid"):
        draw(name, 1, (1, 1), ratio=0.5)


@GENERATORS
@pytest.mark.parametrize("unit", [0, (2, 0), -1])
def test_bad_units(name, unit):
    with pytest.raises(ValueError, match="must be a positive int or a .* got"):
        draw(name, 1, (4, 4), ratio=0.5, unit=unit)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("inverse_block", "block_size", 0),
        ("block", "min_aspect", 0.0),
        ("block", "min_aspect", -1.0),
        ("block", "min_aspect", 2.0),
        ("block", "min_block", 0),
        ("block", "tries", 0),
    ],
)
def test_bad_options_are_errors_and_no_endless_loops(name, option, value):
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        draw(name, 1, (6, 6), ratio=0.5, **{option: value})


@GENERATORS
def test_defaults_of_the_config(name):
    config = tiny_config(image_size=32, masking=name)
    rngs = [np.random.default_rng(i) for i in range(4)]
    masks = sample_masks(config, (8, 8), rngs)
    assert masks.sum(1).tolist() == [num_hidden_tokens(config, (8, 8))] * 4
    model = MIMForPreTraining(config)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.bool_masked_pos.sum(1).tolist() == [num_hidden_tokens(config, (8, 8))] * 2
