"""The focal frequency loss against a direct Fourier sum and Parseval's theorem."""

import math

import pytest
import torch
from helpers import random_masks, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.encoder_base import patchify
from hf_mim.modeling.target_frequency import focal_frequency_loss, focal_l1


def target(**options):
    return MIMForPreTraining(tiny_config(target="frequency", target_config=options)).target


def test_constant_weight_is_the_pixel_error():
    """Parseval: alpha 0 and no logarithm make every weight 1."""
    predicted, wanted = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
    loss = focal_frequency_loss(predicted, wanted, alpha=0, log_weight=False, average_spectra=False)
    torch.testing.assert_close(loss, (predicted - wanted).square().mean())


@pytest.mark.parametrize("log_weight", [True, False])
@pytest.mark.parametrize("batch_weight", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_against_a_direct_sum(log_weight, batch_weight, average):
    torch.manual_seed(0)
    predicted, wanted = torch.randn(2, 2, 4, 6, dtype=torch.float64), torch.randn(2, 2, 4, 6, dtype=torch.float64)

    def transform(image):
        out = torch.zeros(4, 6, dtype=torch.complex128)
        for u in range(4):
            for v in range(6):
                for y in range(4):
                    for x in range(6):
                        angle = -2 * math.pi * (u * y / 4 + v * x / 6)
                        out[u, v] += image[y, x] * complex(math.cos(angle), math.sin(angle)) / math.sqrt(24)
        return out

    error = torch.stack([torch.stack([transform(channel) for channel in image]) for image in predicted - wanted])
    error = error.mean(0, keepdim=True) if average else error
    distance = error.abs() ** 2
    weight = distance.sqrt()
    weight = (1 + weight).log() if log_weight else weight
    weight = weight / (weight.max() if batch_weight else weight.amax((2, 3), keepdim=True))
    options = {"log_weight": log_weight, "batch_weight": batch_weight, "average_spectra": average}
    loss = focal_frequency_loss(predicted, wanted, **options)
    assert loss.item() == pytest.approx((weight * distance).mean().item(), rel=1e-5)


def test_averaged_spectra_do_not_see_errors_that_cancel():
    wanted, error = torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)
    predicted = wanted + torch.cat([error, -error])
    assert focal_frequency_loss(predicted, wanted, average_spectra=True).item() < 1e-10
    assert focal_frequency_loss(predicted, wanted, average_spectra=False).item() > 0.01


def test_focal_l1_against_its_formula():
    predicted, wanted = torch.randn(50), torch.randn(50)
    e = (predicted - wanted).abs().double()
    torch.testing.assert_close(
        focal_l1(predicted, wanted).double(), e * (2 / (1 + (-0.2 * e).exp()) - 1), rtol=1e-5, atol=1e-6
    )
    assert focal_l1(torch.tensor(0.5), torch.tensor(0.0)).item() == pytest.approx(0.0249, abs=1e-3)


@pytest.mark.parametrize("replace", ["mixed", "prediction"])
@pytest.mark.parametrize("loss", ["l1", "focal_l1"])
def test_the_whole_loss_by_hand(replace, loss):
    torch.manual_seed(0)
    frequency = target(loss=loss, replace=replace, weight=0.5)
    pixel_values, mask = torch.randn(2, 3, 16, 16), random_masks(2, 16, 9)
    wanted = frequency.targets(pixel_values, (4, 4))["patches"]
    predicted = torch.randn_like(wanted, requires_grad=True)
    total = frequency.loss({"patches": predicted}, {"patches": wanted}, mask, (4, 4))

    error = (predicted - wanted).abs()
    error = focal_l1(predicted, wanted) if loss == "focal_l1" else error
    spatial = error[mask].mean()
    visible = predicted.detach() if replace == "prediction" else (predicted.detach() + wanted) / 2
    hidden = mask[..., None].float()
    mixed = predicted * hidden + visible * (1 - hidden)
    image = mixed.view(2, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 16)
    torch.testing.assert_close(total, spatial + 0.5 * focal_frequency_loss(image, pixel_values), rtol=1e-5, atol=1e-6)
    total.backward()
    assert (predicted.grad[~mask] == 0).all() and (predicted.grad[mask] != 0).any()
    assert torch.equal(patchify(pixel_values, (4, 4)), wanted)


def test_a_perfect_prediction_costs_nothing():
    frequency = target()
    wanted = frequency.targets(torch.randn(2, 3, 16, 16), (4, 4))
    assert frequency.loss(wanted, wanted, random_masks(2, 16, 9), (4, 4)).item() == 0
