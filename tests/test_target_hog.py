"""HOG against scikit-image and against loops in float64."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_config
from skimage.feature import hog

from hf_mim import MIMForPreTraining
from hf_mim.modeling.options import OptionError, pair
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_hog import HOGTarget, edge_glyphs, oriented_gradients, tiled_gaussian
from hf_mim.modeling.target_pixel import PixelTarget


def test_against_scikit_image():
    """Its gradients are central differences. On sums of a row and a column function Sobel's are four times those, and
    cells scaled to norm 1 do not see the factor."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(24, 1)).cumsum(0) + rng.normal(size=(1, 32)).cumsum(1)
    ours = oriented_gradients(torch.from_numpy(image)[None, None], (8, 8), angle_from="horizontal")[0, 0]
    theirs = hog(
        image, 9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2", feature_vector=False
    )  # (3, 4, 1, 1, 9); its norm is bounded below by 1e-5 squared under the root
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), theirs[:, :, 0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("angle_from", ["horizontal", "vertical"])
def test_against_a_float64_loop(window, angle_from):
    torch.manual_seed(0)
    image = torch.randn(1, 2, 8, 12, dtype=torch.float64)
    cell = (4, 2)
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    wanted = np.zeros((2, 9, 2, 6))
    for c in range(2):
        for y in range(8):
            for x in range(12):
                p = padded[c, y : y + 3, x : x + 3]
                across = (p[0, 0] + 2 * p[1, 0] + p[2, 0]) - (p[0, 2] + 2 * p[1, 2] + p[2, 2])
                down = (p[0, 0] + 2 * p[0, 1] + p[0, 2]) - (p[2, 0] + 2 * p[2, 1] + p[2, 2])
                weight = math.exp(-0.5 * ((y % 8 - 3.5) / 4) ** 2) * math.exp(-0.5 * ((x % 4 - 1.5) / 2) ** 2)
                sides = (down, across) if angle_from == "horizontal" else (across, down)
                angle = math.floor(math.atan2(*sides) / math.pi * 9) % 9
                wanted[c, angle, y // 4, x // 2] += math.hypot(across, down) * (weight if window else 1)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    ours = oriented_gradients(image, cell, window=window, angle_from=angle_from)[0]
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=0, atol=1e-5)


def test_norms_are_one_or_zero_and_the_window_sums_to_one():
    image = torch.randn(2, 3, 16, 16)
    image[1, :, :8] = 0.3  # without gradient, but for the row that sees the other half
    norms = oriented_gradients(image, (4, 4)).norm(dim=2)
    assert (norms[0] - 1).abs().max() < 1e-5 and (norms[1, :, 0] == 0).all()
    assert tiled_gaussian((8, 8), (16, 16)).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "patch", "channels", "dim"), [(32, 16, 3, 108), ([16, 24], [4, 8], 2, 2 * 9 * 2), (16, 4, 1, 36)]
)
def test_dimension_and_order_of_a_patch(size, patch, channels, dim):
    """Channel, orientation, row and column of the cell; 108 for 16 pixels and three channels (MaskFeat)."""
    config = tiny_config(image_size=size, num_channels=channels, encoder_config={"patch_size": patch}, target="hog")
    target = MIMForPreTraining(config).target
    height, width = (size, size) if isinstance(size, int) else size
    pixel_values = torch.randn(2, channels, height, width)
    grid = make_encoder(config).mask_grid(height, width)
    values = target.targets(pixel_values, grid)["patches"]
    assert values.shape == (2, grid[0] * grid[1], dim) and target.outputs == {"patches": dim}
    cells = oriented_gradients(pixel_values, target.cell)
    (rows, cols), last = target.cells, (grid[0] - 1, grid[1] - 1)
    patch_cells = cells[1, :, :, last[0] * rows : (last[0] + 1) * rows, last[1] * cols : (last[1] + 1) * cols]
    assert torch.equal(values[1, -1], patch_cells.flatten())


@pytest.mark.parametrize(("angle_from", "right"), [("horizontal", 0), ("vertical", 4)])
def test_glyphs_show_edges_in_their_direction(angle_from, right):
    """A gradient to the right is an upright edge."""
    glyphs = edge_glyphs((15, 15), 9, angle_from)
    upright = glyphs[right]
    assert upright[:, 7].mean() > upright[7].mean() and glyphs.min() == 0 and glyphs.max() == 1
    config = tiny_config(image_size=32, num_channels=1, encoder_config={"patch_size": 16}, target="hog")
    config.target_config = {"angle_from": angle_from}
    target = MIMForPreTraining(config).target
    step = torch.zeros(1, 1, 32, 32)
    step[..., 4:] = 1
    values = target.targets(step, (2, 2))["patches"]
    picture = target.to_image(values, step, (2, 2))
    assert picture.shape == (1, 1, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    assert picture[0, 0, :, 3:5].mean() > 4 * picture[0, 0, :, 16:].mean()


def test_a_cell_that_does_not_fit():
    config = tiny_config(target="hog", target_config={"cell_size": 3})
    with pytest.raises(ValueError, match="cell_size 3x3 does not divide the patch 4x4"):
        HOGTarget(config, make_encoder(config), cell_size=3)


@pytest.mark.parametrize("size, patch, channels", [(16, 8, 3), ((24, 16), (4, 8), 1), (14, 7, 1)])
def test_hog_beside_the_pixels(size, patch, channels):
    """One head predicts both; the loss is that of either target alone, and the picture that of the pixels."""
    encoder_config = {"patch_size": patch, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tiny_config(image_size=size, num_channels=channels, encoder_config=encoder_config)
    encoder = make_encoder(config)
    pixels, gradients = PixelTarget(config, encoder), HOGTarget(config, encoder)
    both = PixelTarget(config, encoder, hog_weight=0.7)
    grid, images = encoder.target_grid(*pair(size)), torch.randn(2, channels, *pair(size))
    mask = torch.rand(2, grid[0] * grid[1]) < 0.5
    count = pixels.outputs["patches"]
    assert both.outputs["patches"] == count + gradients.outputs["patches"]
    predicted = torch.randn(2, grid[0] * grid[1], both.outputs["patches"])
    targets = both.targets(images, grid)
    parts = [
        target.loss({"patches": values}, target.targets(images, grid), mask, grid)
        for target, values in ((pixels, predicted[..., :count]), (gradients, predicted[..., count:]))
    ]
    torch.testing.assert_close(both.loss({"patches": predicted}, targets, mask, grid), parts[0] + 0.7 * parts[1])
    shown = both.to_image(predicted, images, grid, mask)
    assert torch.equal(shown, pixels.to_image(predicted[..., :count], images, grid, mask))


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_weights_that_are_refused(weight):
    with pytest.raises(OptionError, match="hog_weight must be at least 0"):
        PixelTarget(tiny_config(), make_encoder(tiny_config()), hog_weight=weight)
