"""Batches: decoded images, normalised and masked."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.options import pair
from hf_mim.training.data.transforms import crop_and_flip


# How many values a processor normalises at a time: they stay in its cache between the three operations.
IN_CACHE = 2**17


@dataclass
class ImageBatch:
    """A batch before normalisation.

    Args:
        images: (batch, channels, height, width), uint8.
        rngs: one generator per image, for its mask; it has already given the numbers for crop and flip.
        crops: for images that are still whole, (batch, 5), int: what `crop_and_flip` is to do on the device.
    """

    images: torch.Tensor
    rngs: list[np.random.Generator]
    crops: torch.Tensor | None = None


class MIMCollator:
    """Makes model inputs: `pixel_values` and, for training, `bool_masked_pos`.

    Args:
        config: gives mean, std and the mask generator with its options.
        grid: rows and columns of the tokens that can be hidden, `model.mask_grid(*image_size)`; None makes no masks.
        normalized: False leaves what a data set gives as uint8, a quarter of the memory; `MIMTrainer` then normalises
            on the device.
    """

    def __init__(self, config: MIMConfig, grid: tuple[int, int] | None = None, normalized: bool = True):
        self.config, self.grid, self.normalized = config, grid, normalized

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        """
        Args:
            features: `ImageBatch`es, or one dict per image with finished `pixel_values`, whose masks are then drawn
                from torch's generator.

        Returns:
            `pixel_values` (batch, channels, height, width), float32 or uint8, and `bool_masked_pos` (batch, tokens);
            `crops` (batch, 5) for uint8 images that are to be cropped on the device.
        """
        if isinstance(features[0], ImageBatch):
            images = torch.cat([feature.images for feature in features]) if len(features) > 1 else features[0].images
            rngs = [rng for feature in features for rng in feature.rngs]
            batch = {"pixel_values": images}
            if features[0].crops is not None:
                batch["crops"] = torch.cat([feature.crops for feature in features])
            if self.normalized:
                batch = normalize_batch(batch, self.config)
        else:
            batch = {"pixel_values": torch.stack([torch.as_tensor(feature["pixel_values"]) for feature in features])}
            rngs = [np.random.default_rng(int(seed)) for seed in torch.randint(2**62, (len(features),))]
        if self.grid is not None:
            batch["bool_masked_pos"] = sample_masks(self.config, self.grid, rngs)
        return batch


def normalize_batch(batch: dict[str, torch.Tensor], config: MIMConfig, out: torch.Tensor | None = None) -> dict:
    """Crops uint8 `pixel_values` where that is still to be done, and normalises them to `out`, all on their device."""
    images = batch["pixel_values"]
    if "crops" in batch:
        images = crop_and_flip(images, batch["crops"], pair(config.image_size))
        batch = {name: value for name, value in batch.items() if name != "crops"}
    return {**batch, "pixel_values": normalize(images, *statistics(config), out)}


def statistics(config: MIMConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; a config that was made has both."""
    return tuple(config.image_mean or ()), tuple(config.image_std or ())


def normalize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], out: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, channels, height, width) uint8 -> float32 `pixel_values` on the same device, written to `out` if given:
    (pixel / 255 - mean) / std per channel."""
    scale, shift = scale_and_shift(tuple(mean), tuple(std), images.device)
    result = torch.empty(images.shape, device=images.device) if out is None else out
    count = max(1, IN_CACHE // images[0].numel()) if images.device.type == "cpu" else len(images)
    for part, normalized in zip(images.split(count), result.split(count), strict=True):
        normalized.copy_(part).mul_(scale).add_(shift)
    return result


@functools.cache  # made anew at each step, they would have a GPU waited for
def scale_and_shift(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (channels, 1, 1), on the device: pixel * scale + shift is normalised."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device)[:, None, None]
    return scale, shift
