"""Random brightness, contrast and saturation (BEiT, 2106.08254, and what builds on it)."""

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from hf_mim.training.common.errors import DataError


CHANGES = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)


def check_jitter(strength: float, num_channels: int) -> None:
    """Raises:
    DataError: colours of images of that many channels cannot be changed.
    """
    if strength and num_channels not in (1, 3):
        raise DataError(f"data.color_jitter needs images of 1 or 3 channels, not {num_channels}: leave it out")


def jitter_colors(images: torch.Tensor, rngs: list[np.random.Generator], strength: float) -> torch.Tensor:
    """Each image's brightness, contrast and saturation times factors around 1, in random order, in place.

    Args:
        images: (batch, 1 or 3, height, width), uint8; grey ones have no saturation to change.
        rngs: one generator per image, which gives six numbers.
        strength: factors are uniform in [1 - strength, 1 + strength], in [0, 1].
    """
    for image, rng in zip(images, rngs, strict=True):
        order, factors = rng.random(3).argsort(), rng.uniform(1 - strength, 1 + strength, 3)
        for i in order:
            image.copy_(CHANGES[i](image, float(factors[i])))
    return images
