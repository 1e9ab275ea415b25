"""Pixels as targets."""

import math

import torch
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose, patchify, unpatchify
from .options import OptionError, pair
from .target_base import DISTANCES, VISIBLE_NOTE, Target, displayable
from .target_hog import HOGTarget


class PixelTarget(Target):
    """The pixels of each hidden patch (MAE, 2111.06377; SimMIM, 2111.09886).

    Options:
        normalize: whether each patch's pixels are brought to mean 0 and (unbiased) variance 1, as MAE recommends.
            Where most patches are blank, as in drawings on white, raw pixels learn better.
        loss: mse, l1 or smooth_l1 (beta 2).
        hog_weight: of the same loss of the patch's HOG (`HOGTarget` with its defaults), predicted beside the pixels;
            0 predicts pixels only.
    """

    needs_image_only = True

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        normalize: bool = True,
        loss: str = "mse",
        hog_weight: float = 0.0,
    ):
        super().__init__()
        height, width = pair(config.image_size)
        rows, cols = encoder.target_grid(height, width)
        self.num_values = (height // rows) * (width // cols) * config.num_channels
        if not 0 <= hog_weight < math.inf:
            raise OptionError(f"hog_weight must be at least 0, not {hog_weight}", "hog_weight", hog_weight)
        self.hog, self.hog_weight = HOGTarget(config, encoder) if hog_weight else None, hog_weight
        self.outputs = {"patches": self.num_values + (self.hog.outputs["patches"] if self.hog else 0)}
        self.normalize = normalize
        self.distance = DISTANCES[choose("loss of target 'pixel'", loss, DISTANCES)]
        self.image_mean, self.image_std = config.statistics()
        self.display_bands = config.display_bands
        if normalize:
            self.image_note = (
                f"{VISIBLE_NOTE} The model predicts each patch up to its brightness and contrast. Those of a hidden "
                "patch are not known to it and are shown here as interpolated from the visible patches."
            )

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        patches = patchify(pixel_values, grid).float()
        if self.normalize:
            mean, scale = patch_statistics(patches)
            patches = (patches - mean) / scale
        if self.hog is not None:
            patches = torch.cat([patches, self.hog.targets(pixel_values, grid)["patches"]], dim=-1)
        return {"patches": patches}

    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        if self.hog is None:
            return super().loss(predictions, targets, bool_masked_pos, grid, generator)
        parts = [values["patches"].tensor_split([self.num_values], dim=-1) for values in (predictions, targets)]
        pixels, gradients = (
            super(PixelTarget, self).loss({"patches": predicted}, {"patches": target}, bool_masked_pos, grid, generator)
            for predicted, target in zip(*parts)
        )
        return pixels + self.hog_weight * gradients

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        values = values[..., : self.num_values]
        if self.normalize:
            mean, scale = patch_statistics(patchify(pixel_values, grid).float())
            if bool_masked_pos is not None:
                mean, scale = (interpolate_visible(table, bool_masked_pos, grid) for table in (mean, scale))
            values = values * scale + mean
        image = unpatchify(values, grid, *pixel_values.shape[2:])
        return displayable(image, self.image_mean, self.image_std, self.display_bands, pixel_values)

    def comparison(self, predicted, target, pixel_values, grid, bool_masked_pos) -> dict[str, Tensor]:
        return {}  # the image stands there already


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (batch, tokens, 1) of each patch, the latter bounded away from 0 as in MAE."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def interpolate_visible(table: Tensor, bool_masked_pos: Tensor, grid: Grid) -> Tensor:
    """Fills the hidden entries of (batch, tokens, 1) from the visible ones, weighted by inverse squared distance.
    What stood in the hidden entries has no influence; with nothing visible they become 0."""
    rows, cols = torch.meshgrid(*(torch.arange(n, device=table.device) for n in grid), indexing="ij")
    places = torch.stack([rows, cols], dim=-1).view(-1, 2).float()
    weight = 1 / (places[:, None] - places).square().sum(dim=-1).clamp(min=1e-6)
    weight = weight * ~bool_masked_pos[:, None, :]
    filled = (weight @ table.masked_fill(bool_masked_pos[..., None], 0)) / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    return torch.where(bool_masked_pos[..., None], filled, table)
