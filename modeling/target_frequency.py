"""Pixels with a term in the Fourier domain (A2MIM, 2205.13943, section 4.3)."""

from functools import partial

import torch
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose, patchify, unpatchify
from .options import pair
from .target_base import VISIBLE_NOTE, Distance, Target, displayable


def focal_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """e (2 sigmoid(0.2 e) - 1) with e = |predicted - target|: small errors count less (about 0.1 e^2)."""
    error = (predicted - target).abs()
    return error * (2 * torch.sigmoid(0.2 * error) - 1)


# What stands for the visible pixels before the transform: predicted (without gradient), target -> that.
REPLACEMENTS: dict[str, Distance] = {
    "mixed": lambda predicted, target: (predicted + target) / 2,
    "prediction": lambda predicted, target: predicted,
    "target": lambda predicted, target: target,
}
SPATIAL_LOSSES: dict[str, Distance] = {"l1": lambda predicted, target: (predicted - target).abs(), "focal_l1": focal_l1}


def focal_frequency_loss(
    predicted: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    log_weight: bool = True,
    batch_weight: bool = True,
    average_spectra: bool = True,
) -> Tensor:
    """The mean over frequencies of w |F(predicted) - F(target)|^2, F the orthonormal 2-D Fourier transform, of images
    (batch, channels, height, width) (Focal Frequency Loss, 2012.12821).

    The weight w = |F(predicted) - F(target)|^alpha has no gradient; `log_weight` takes ln(1 + w); it is scaled to a
    maximum of 1 over each channel's spectrum, or with `batch_weight` over the whole batch. `alpha` 0 and no log give
    w = 1, and the loss is the mean squared error of the pixels (Parseval). `average_spectra` averages over the batch
    before comparing, as the released A2MIM does: errors that cancel over the batch then cost nothing.
    """
    spectrum, reference = (torch.fft.fft2(image.float(), norm="ortho") for image in (predicted, target))
    if average_spectra:
        spectrum, reference = (part.mean(dim=0, keepdim=True) for part in (spectrum, reference))
    distance = torch.view_as_real(spectrum - reference).square().sum(-1)
    with torch.no_grad():
        weight = distance.sqrt() ** alpha
        weight = torch.log1p(weight) if log_weight else weight
        largest = weight.amax() if batch_weight else weight.amax(dim=(2, 3), keepdim=True)
        weight = torch.where(largest > 0, weight / largest, torch.zeros_like(weight)).clamp(0, 1)
    return (weight * distance).mean()


class FrequencyTarget(Target):
    """Pixels of hidden patches by L1, plus the focal frequency loss of the picture (A2MIM, 2205.13943).

    Options:
        loss: l1, or focal_l1 as the released ConvNet configurations have it; the latter is about a tenth of the
            former, so that `weight` means more beside it.
        weight: of the frequency loss (0.1 for ViTs, 0.5 for ResNet-50, 0 for ConvNeXt in the released configurations).
        replace: what stands for the visible patches before the transform: `mixed`, half the prediction without
            gradient and half the image (as released); `prediction`, without gradient (paper, as remembered:
            unverified); or `target`.
        visible_share: how much of the prediction itself, with its gradient, is mixed into the visible patches (0.001
            in the released configuration for ResNet-50).
        alpha, log_weight, batch_weight, average_spectra: see `focal_frequency_loss`; defaults as released. Without
            `average_spectra`, a variant of this project, each image is compared with its own spectrum.
    """

    scope = "all"
    needs_image_only = True
    image_note = (
        f"{VISIBLE_NOTE} Spectra are logarithms of amplitudes, the lowest frequency in the middle; that of the "
        "prediction is of its picture with the visible patches."
    )

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        loss: str = "l1",
        weight: float = 0.1,
        replace: str = "mixed",
        visible_share: float = 0.0,
        alpha: float = 1.0,
        log_weight: bool = True,
        batch_weight: bool = True,
        average_spectra: bool = True,
    ):
        super().__init__()
        size = pair(config.image_size)
        rows, cols = encoder.target_grid(*size)
        self.patch = (size[0] // rows, size[1] // cols)
        self.outputs = {"patches": self.patch[0] * self.patch[1] * config.num_channels}
        self.spatial = SPATIAL_LOSSES[choose("loss of target 'frequency'", loss, SPATIAL_LOSSES)]
        self.replace = REPLACEMENTS[choose("replace of target 'frequency'", replace, REPLACEMENTS)]
        self.weight, self.visible_share = weight, visible_share
        self.frequency = partial(
            focal_frequency_loss,
            alpha=alpha,
            log_weight=log_weight,
            batch_weight=batch_weight,
            average_spectra=average_spectra,
        )
        self.image_mean, self.image_std = config.statistics()
        self.display_bands = config.display_bands

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"patches": patchify(pixel_values, grid)}

    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        predicted, target = predictions["patches"].float(), targets["patches"].float()
        hidden = bool_masked_pos[..., None].float()
        spatial = (self.spatial(predicted, target) * hidden).sum() / (hidden.sum() * predicted.shape[-1])
        if self.weight == 0:
            return spatial
        return spatial + self.weight * self.frequency_loss(predicted, target, hidden, grid)

    def frequency_loss(self, predicted: Tensor, target: Tensor, hidden: Tensor, grid: Grid) -> Tensor:
        """predicted, target (batch, tokens, values), hidden (batch, tokens, 1) in {0, 1}."""
        visible = torch.lerp(self.replace(predicted.detach(), target), predicted, self.visible_share)
        height, width = (tokens * length for tokens, length in zip(grid, self.patch))
        image = unpatchify(torch.where(hidden > 0, predicted, visible), grid, height, width)
        return self.frequency(image, unpatchify(target, grid, height, width))

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        image = unpatchify(values, grid, *pixel_values.shape[2:])
        return displayable(image, self.image_mean, self.image_std, self.display_bands, pixel_values)

    def comparison(self, predicted, target, pixel_values, grid, bool_masked_pos) -> dict[str, Tensor]:
        """The spectra of image and prediction, on one scale."""
        combined = torch.where(bool_masked_pos[..., None], predicted.float(), target.float())
        spectra = [log_spectrum(self.to_image(values, pixel_values, grid)) for values in (target.float(), combined)]
        largest = spectra[0].amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        names = ("spectrum of the image", "spectrum of the prediction")
        return {name: (spectrum / largest).clamp(0, 1) for name, spectrum in zip(names, spectra)}


def log_spectrum(images: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, 1, height, width): ln(1 + amplitude), the mean over channels; the
    lowest frequency is in the middle."""
    amplitudes = torch.fft.fftshift(torch.fft.fft2(images, norm="ortho").abs(), dim=(2, 3))
    return torch.log1p(amplitudes).mean(dim=1, keepdim=True)
