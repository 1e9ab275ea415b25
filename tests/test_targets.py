"""Every target: shapes, no gradient, nothing of hidden pixels in pictures; the pixel target against loops."""

import numpy as np
import pytest
import torch
from helpers import RESNET, random_masks, target_options, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.encoder_base import patchify, unpatchify
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_base import DISTANCES, displayable
from hf_mim.modeling.target_pixel import interpolate_visible
from hf_mim.modeling.targets import TARGETS


EVERY = pytest.mark.parametrize("name", TARGETS)
SIZE, PATCH, GRID = (16, 24), (4, 8), (4, 3)


def target_of(name: str = "pixel", channels: int = 3, size=SIZE, patch=PATCH, **options):
    config = tiny_config(
        image_size=list(size),
        num_channels=channels,
        encoder_config={"patch_size": list(patch)},
        target=name,
        target_config=options,
    )
    return TARGETS[name](config, make_encoder(config), **options)


def any_target(name: str, folder):
    """Any entry of TARGETS, ready to use, on patches of 8 x 8: those that cut patches into cells need some room."""
    target = target_of(name, size=(32, 24), patch=(8, 8), **target_options(name, folder))
    target.bind(make_encoder(tiny_config(image_size=[32, 24], encoder_config={"patch_size": 8})))
    return target


def hide(pixel_values: torch.Tensor, mask: torch.Tensor, grid=GRID) -> torch.Tensor:
    """The images with noise in their hidden patches."""
    height, width = pixel_values.shape[2:]
    hidden = mask.view(-1, 1, *grid).repeat_interleave(height // grid[0], 2).repeat_interleave(width // grid[1], 3)
    return torch.where(hidden, 5 * torch.randn_like(pixel_values), pixel_values)


# --- every target ------------------------------------------------------------------------------------------------


@EVERY
def test_shapes_and_gradients(name, tmp_path):
    torch.manual_seed(0)
    target = any_target(name, tmp_path)
    pixel_values = torch.randn(2, 3, 32, 24, requires_grad=True)
    values = target.targets(pixel_values, (4, 3))
    assert target.scope in ("hidden", "all")
    assert not any(value.requires_grad for value in values.values())
    mask = random_masks(2, 12, 7)
    for count in {"hidden": (7, 12), "all": (12,)}[target.scope]:
        predictions = {
            key: torch.randn(2, count, dim, requires_grad=True) if key == "patches" else torch.randn(2, dim)
            for key, dim in target.outputs.items()
        }
        loss = target.loss(predictions, values, mask, (4, 3), torch.Generator().manual_seed(0))
        assert loss.shape == () and loss.isfinite() and loss > 0
        loss.backward()
        assert predictions["patches"].grad.abs().sum() > 0
    assert pixel_values.grad is None


@EVERY
def test_values_live_on_the_grid_at_every_resolution(name, tmp_path):
    torch.manual_seed(0)
    target = any_target(name, tmp_path)
    for grid in ((4, 3), (2, 5), (3, 3)):
        pixel_values = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
        values = target.targets(pixel_values, grid)["patches"]
        assert values.shape[:2] == (2, grid[0] * grid[1])
        if values.is_floating_point():
            assert values.shape[2] == target.outputs["patches"]


@EVERY
def test_pictures_use_nothing_of_hidden_pixels(name, tmp_path):
    torch.manual_seed(0)
    target = any_target(name, tmp_path)
    pixel_values, mask = torch.randn(2, 3, 32, 24), random_masks(2, 12, 8)
    predicted = torch.randn(2, 12, target.outputs["patches"])
    picture = target.to_image(predicted, pixel_values, (4, 3), mask)
    assert picture.shape[0] == 2 and picture.shape[1] in (1, 3)
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0
    assert torch.equal(picture, target.to_image(predicted, hide(pixel_values, mask), (4, 3), mask))


# --- patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, size, grid", [(1, (4, 6), (2, 3)), (3, (12, 8), (3, 4)), (5, (6, 15), (3, 3))])
def test_patches_are_row_column_channel(channels, size, grid):
    pixel_values = torch.randn(2, channels, *size)
    down, right = size[0] // grid[0], size[1] // grid[1]
    wanted = np.zeros((2, grid[0] * grid[1], down * right * channels), dtype=np.float32)
    for image in range(2):
        for row in range(size[0]):
            for col in range(size[1]):
                for channel in range(channels):
                    patch = (row // down) * grid[1] + col // right
                    place = ((row % down) * right + col % right) * channels + channel
                    wanted[image, patch, place] = pixel_values[image, channel, row, col]
    patches = patchify(pixel_values, grid)
    assert np.array_equal(patches.numpy(), wanted)
    assert torch.equal(unpatchify(patches, grid, *size), pixel_values)


def test_patches_of_other_memory_layouts():
    pixel_values = torch.randn(2, 3, 16, 24)
    wanted = patchify(pixel_values, GRID)
    assert torch.equal(patchify(pixel_values.to(memory_format=torch.channels_last), GRID), wanted)
    larger = torch.zeros(2, 3, 20, 30)
    larger[:, :, 2:18, 3:27] = pixel_values
    assert torch.equal(patchify(larger[:, :, 2:18, 3:27], GRID), wanted)


def test_normalised_patches_against_numpy():
    torch.manual_seed(0)
    pixel_values = 3 * torch.randn(2, 3, *SIZE) + 1
    pixel_values[0, :, :4, :8] = 0.7  # a blank patch: variance 0
    values = target_of(normalize=True).targets(pixel_values, GRID)["patches"]
    patches = patchify(pixel_values, GRID).numpy().astype(np.float64)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    wanted = (patches - patches.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    # The blank patch divides the mean's rounding error (1e-7) by sqrt(1e-6).
    assert np.abs(values.numpy() - wanted)[:, 1:].max() < 1e-5
    assert np.abs(values.numpy() - wanted).max() < 1e-3


def test_half_precision_images_are_normalised_in_float32():
    torch.manual_seed(0)
    pixel_values = (0.02 * torch.randn(2, 3, *SIZE) + 1).bfloat16()
    target = target_of(normalize=True)
    assert torch.equal(
        target.targets(pixel_values, GRID)["patches"], target.targets(pixel_values.float(), GRID)["patches"]
    )


# --- losses ------------------------------------------------------------------------------------------------------


def loss_by_loops(kind: str, predicted, values, mask) -> float:
    """predicted, values (batch, tokens, dim), both for all tokens."""
    total, count = 0.0, 0
    for image in range(mask.shape[0]):
        for token in range(mask.shape[1]):
            if not mask[image, token]:
                continue
            for p, v in zip(predicted[image, token].tolist(), values[image, token].tolist()):
                error = abs(p - v)
                if kind == "mse":
                    total += error**2
                elif kind == "l1":
                    total += error
                else:  # smooth L1 with beta 2
                    total += 0.5 * error**2 / 2 if error < 2 else error - 1
                count += 1
    return total / count


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_against_loops(kind, normalize):
    torch.manual_seed(0)
    target = target_of(normalize=normalize, loss=kind)
    pixel_values, mask = torch.randn(3, 3, *SIZE), random_masks(3, 12, 7)
    predicted = 3 * torch.randn(3, 12, target.outputs["patches"])
    values = target.targets(pixel_values, GRID)
    wanted = loss_by_loops(kind, predicted.double(), values["patches"].double(), mask)
    of_all = target.loss({"patches": predicted}, values, mask, GRID)
    of_hidden = target.loss({"patches": predicted[mask].view(3, 7, -1)}, values, mask, GRID)
    assert abs(of_all.item() - wanted) < 1e-5 * wanted
    assert abs(of_hidden.item() - wanted) < 1e-5 * wanted


def test_losses_with_unequal_counts_weigh_every_hidden_token_alike():
    torch.manual_seed(0)
    target, pixel_values = target_of(), torch.randn(3, 3, *SIZE)
    mask = torch.arange(12)[None] < torch.tensor([1, 5, 0])[:, None]
    predicted, values = torch.randn(3, 12, target.outputs["patches"]), target.targets(pixel_values, GRID)
    wanted = loss_by_loops("mse", predicted.double(), values["patches"].double(), mask)
    assert abs(target.loss({"patches": predicted}, values, mask, GRID).item() - wanted) < 1e-5 * wanted


def test_with_nothing_hidden_the_loss_is_zero_and_not_nan():
    target, pixel_values = target_of(), torch.randn(2, 3, *SIZE)
    predicted = torch.randn(2, 12, target.outputs["patches"], requires_grad=True)
    loss = target.loss({"patches": predicted}, target.targets(pixel_values, GRID), torch.zeros(2, 12).bool(), GRID)
    loss.backward()
    assert loss.item() == 0 and predicted.grad.abs().max() == 0


def test_visible_tokens_get_no_gradient():
    torch.manual_seed(0)
    target, mask = target_of(), random_masks(2, 12, 7)
    predicted = torch.randn(2, 12, target.outputs["patches"], requires_grad=True)
    target.loss({"patches": predicted}, target.targets(torch.randn(2, 3, *SIZE), GRID), mask, GRID).backward()
    assert torch.equal(predicted.grad.abs().amax(-1) > 0, mask)


def test_perfect_predictions_cost_nothing_in_half_precision_too():
    target, pixel_values = target_of(), torch.randn(2, 3, *SIZE)
    values, mask = target.targets(pixel_values, GRID), random_masks(2, 12, 7)
    loss = target.loss({"patches": values["patches"].bfloat16()}, values, mask, GRID)
    assert loss.dtype == torch.float32 and loss < 1e-4


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_true_values_give_the_picture_back(channels, normalize):
    torch.manual_seed(0)
    target = target_of(channels=channels, normalize=normalize)
    pixel_values = torch.randn(2, channels, *SIZE)
    picture = target.to_image(target.targets(pixel_values, GRID)["patches"], pixel_values, GRID)
    shown = 3 if channels >= 3 else 1
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.5] * 3, [0.5] * 3)
    wanted = np.zeros((2, shown, *SIZE))
    for channel in range(shown):
        wanted[:, channel] = pixel_values[:, channel].double().numpy() * std[channel] + mean[channel]
    if channels > 3:  # stretched, each by its own percentiles
        for channel in range(shown):
            low, high = np.percentile(wanted[:, channel], [2, 98])
            wanted[:, channel] = (wanted[:, channel] - low) / (high - low)
    assert 0 < (wanted.clip(0, 1) == wanted).mean() < 1  # some values are clamped, not all
    assert picture.shape == wanted.shape
    assert np.abs(picture.numpy() - wanted.clip(0, 1)).max() < (1e-5 if normalize else 1e-6)
    plain = displayable(pixel_values, target.image_mean, target.image_std)
    assert normalize or torch.equal(picture, plain)


@pytest.mark.parametrize("channels", [3, 5])
def test_bands_are_chosen_and_dark_ones_are_seen(channels):
    torch.manual_seed(0)
    mean, std = [0.5] * channels, [0.5] * channels
    dark = torch.rand(2, channels, 8, 8) * 0.04
    shown = displayable((dark - 0.5) / 0.5, mean, std, bands=[2, 1, 0])
    for image in range(3):
        plain = dark[:, 2 - image]
        low, high = np.percentile(plain, [2, 98]) if channels > 3 else (0, 1)
        expected = ((plain - low) / (high - low)).clamp(0, 1)
        torch.testing.assert_close(shown[:, image], expected.float(), atol=1e-4, rtol=0)
    assert displayable(dark, mean, std, bands=[1]).shape == (2, 1, 8, 8)
    brighter = displayable((2 * dark - 0.5) / 0.5, mean, std, reference=(dark - 0.5) / 0.5)
    assert channels == 3 or brighter.mean() > shown.mean() + 0.1  # on the scale of the reference


def test_hidden_statistics_are_interpolated_from_visible_ones():
    torch.manual_seed(0)
    table, mask = torch.randn(2, 12, 1), random_masks(2, 12, 7)
    filled = interpolate_visible(table, mask, GRID)
    for image in range(2):
        for token in range(12):
            if not mask[image, token]:
                assert filled[image, token] == table[image, token]
                continue
            total = weights = 0.0
            for other in range(12):
                if not mask[image, other]:
                    distance = (token // 3 - other // 3) ** 2 + (token % 3 - other % 3) ** 2
                    total += float(table[image, other]) / distance
                    weights += 1 / distance
            assert abs(float(filled[image, token]) - total / weights) < 1e-5


def test_a_picture_with_nothing_visible_is_plain():
    target, mask = target_of(), torch.ones(1, 12, dtype=torch.bool)
    predicted = torch.randn(1, 12, target.outputs["patches"])
    picture = target.to_image(predicted, torch.randn(1, 3, *SIZE), GRID, mask)
    wanted = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(1, 3, *SIZE)
    assert torch.allclose(picture, wanted)  # mean 0 and contrast 0 after normalisation


@pytest.mark.parametrize("normalize", [True, False])
def test_the_pictures_of_a_model(normalize):
    torch.manual_seed(0)
    config = tiny_config(
        image_size=list(SIZE), encoder_config={"patch_size": list(PATCH)}, target_config={"normalize": normalize}
    )
    model, mask = MIMForPreTraining(config).eval(), random_masks(2, 12, 9)
    pixel_values = torch.randn(2, 3, *SIZE)
    out = model.reconstruct(pixel_values, mask)
    other = model.reconstruct(hide(pixel_values, mask), mask)
    for name in ("masked", "prediction", "combined"):
        assert torch.equal(out[name], other[name]), name
    hidden = mask.view(2, 1, 4, 3).repeat_interleave(4, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert torch.equal(out.combined[~hidden], out.original[~hidden])
    assert torch.equal(out.combined[hidden], out.prediction[hidden])
    assert torch.equal(out.masked[~hidden], out.original[~hidden]) and (out.masked[hidden] == 0.5).all()
    assert torch.equal(out.original, displayable(pixel_values, config.image_mean, config.image_std))
    assert ("brightness" in out.note) == normalize and out.extra is None


def test_pictures_in_bfloat16():
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config()).bfloat16().eval()
    pixel_values, mask = torch.randn(2, 3, 16, 16).bfloat16(), random_masks(2, 16, 12)
    out = model.reconstruct(pixel_values, mask)
    assert out.prediction.shape == (2, 3, 16, 16) and out.prediction.isfinite().all()


def test_a_convnet_s_patches_are_the_cells_of_its_masked_stage():
    config = tiny_config(image_size=[64, 96], encoder="convnet", encoder_config=RESNET, decoder="linear")
    target = TARGETS["pixel"](config, make_encoder(config))
    assert target.outputs == {"patches": 16 * 16 * 3}
    values = target.targets(torch.randn(1, 3, 64, 96), (4, 6))["patches"]
    assert values.shape == (1, 24, 768)
