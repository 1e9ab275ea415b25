"""What is predicted of the hidden tokens. A target is a class in `TARGETS`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mim import pair
from .encoder_base import Encoder, Grid, choose, patchify, unpatchify


# Losses per value; the targets average them over a token's values.
DISTANCES = {
    "mse": lambda predicted, value: (predicted - value).square(),
    "l1": lambda predicted, value: (predicted - value).abs(),
    "smooth_l1": lambda predicted, value: F.smooth_l1_loss(predicted, value, reduction="none", beta=2.0),
}


class Target(nn.Module):
    """Made as `Target(config, encoder, **options)`.

    scope: "hidden" or "all", the tokens that the decoder is asked for.
    outputs: the dimension of each prediction: {"patches": dim}, and {"global": dim} where there is one.
    image_note: what a person who looks at `to_image` must know, or None.
    """

    scope: str = "hidden"
    outputs: dict[str, int]
    image_note: str | None = None

    def values(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The unmasked images (batch, channels, height, width) -> {"patches": (batch, rows * cols, dim)}, without
        gradient."""
        raise NotImplementedError

    def loss(
        self,
        predictions: dict[str, Tensor],
        values: dict[str, Tensor],
        bool_masked_pos: Tensor,
        grid: Grid,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-> a scalar. `predictions["patches"]` is (batch, K, dim), K = the hidden tokens or all;
        `bool_masked_pos` (batch, rows * cols); `generator` for targets that draw something."""
        raise NotImplementedError

    def to_image(
        self, values: Tensor, pixel_values: Tensor, grid: Grid, bool_masked_pos: Tensor | None = None
    ) -> Tensor:
        """What a person should be shown of values (batch, rows * cols, dim): (batch, 1 or 3, height, width) in [0, 1].

        With a mask, nothing of the hidden pixels may be used.
        """
        raise NotImplementedError


def hidden_values(values: Tensor, bool_masked_pos: Tensor, num_predicted: int) -> tuple[Tensor, Tensor | None]:
    """Brings values (batch, tokens, dim) beside predictions of `num_predicted` tokens.

    -> the hidden tokens' values and None, where only they are predicted; else all values and the weight of each token
    (batch, tokens), 1 for a hidden one. No counting, so that a GPU need not be waited for.
    """
    if num_predicted == values.shape[1]:
        return values, bool_masked_pos.to(values.dtype)
    index = bool_masked_pos.byte().argsort(dim=1, stable=True)[:, -num_predicted:]
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])), None


def mean_over_hidden(per_token: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of (batch, K) losses over the hidden tokens of the whole batch; 0 where none is hidden."""
    if weight is None:
        return per_token.mean()
    return (per_token * weight).sum() / weight.sum().clamp(min=1)


class PixelTarget(Target):
    """The pixels of each hidden patch (MAE, 2111.06377; SimMIM, 2111.09886).

    Options:
        normalize: whether each patch's pixels are brought to mean 0 and (unbiased) variance 1, as MAE recommends.
            Where most patches are blank, as in drawings on white, raw pixels learn better.
        loss: mse, l1 or smooth_l1 (beta 2).
    """

    def __init__(self, config, encoder: Encoder, *, normalize: bool = True, loss: str = "mse"):
        super().__init__()
        height, width = pair(config.image_size)
        rows, cols = encoder.mask_grid(height, width)
        self.outputs = {"patches": (height // rows) * (width // cols) * config.num_channels}
        self.normalize = normalize
        self.distance = DISTANCES[choose("loss of target 'pixel'", loss, DISTANCES)]
        self.image_mean, self.image_std = config.image_mean, config.image_std
        if normalize:
            self.image_note = (
                "The model predicts each patch up to its brightness and contrast. Those of a hidden patch are not "
                "known to it and are shown here as interpolated from the visible patches."
            )

    @torch.no_grad()
    def values(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        patches = patchify(pixel_values, grid).float()
        if self.normalize:
            mean, scale = patch_statistics(patches)
            patches = (patches - mean) / scale
        return {"patches": patches}

    def loss(self, predictions, values, bool_masked_pos, grid, generator=None) -> Tensor:
        predicted = predictions["patches"].float()
        wanted, weight = hidden_values(values["patches"].float(), bool_masked_pos, predicted.shape[1])
        return mean_over_hidden(self.distance(predicted, wanted).mean(dim=-1), weight)

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        if self.normalize:
            mean, scale = patch_statistics(patchify(pixel_values, grid).float())
            if bool_masked_pos is not None:
                mean, scale = (interpolate_visible(table, bool_masked_pos, grid) for table in (mean, scale))
            values = values * scale + mean
        return displayable(unpatchify(values, grid, *pixel_values.shape[2:]), self.image_mean, self.image_std)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (batch, tokens, 1) of each patch, the latter bounded away from 0 as in MAE."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def interpolate_visible(table: Tensor, bool_masked_pos: Tensor, grid: Grid) -> Tensor:
    """Fills the hidden entries of (batch, tokens, 1) from the visible ones, weighted by inverse squared distance.
    What stood in the hidden entries has no influence; with nothing visible they become 0."""
    rows, cols = torch.meshgrid(*(torch.arange(n, device=table.device) for n in grid), indexing="ij")
    places = torch.stack([rows, cols], dim=-1).view(-1, 2).float()
    weight = 1 / torch.cdist(places, places).square().clamp(min=1e-6)
    weight = weight * ~bool_masked_pos[:, None, :]
    filled = (weight @ table.masked_fill(bool_masked_pos[..., None], 0)) / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return torch.where(bool_masked_pos[..., None], filled, table)


def displayable(pixel_values: Tensor, image_mean: list[float], image_std: list[float]) -> Tensor:
    """Normalised (batch, channels, height, width) -> (batch, 1 or 3, height, width) in [0, 1]. Of images with two
    channels the first is shown, of those with more than three the first three."""
    pixel_values = pixel_values.float()
    mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (image_mean, image_std))
    shown = 3 if pixel_values.shape[1] >= 3 else 1
    return (pixel_values * std + mean)[:, :shown].clamp(0, 1)


TARGETS = {"pixel": PixelTarget}
