"""The size of images: the same in training, evaluation and serving."""

import torch
import torch.nn.functional as F

from .pixels import crop_share


def fit_whole(images: torch.Tensor, size: tuple[int, int], eval_crop: float | str | None = None) -> torch.Tensor:
    """Images as a model is evaluated on them, by bicubic resampling with antialiasing. Those that have the size already
    stay as they are.

    Args:
        images: (..., channels, height, width), uint8.
        size: (height, width) of the result.
        eval_crop: share of the image that stays of the side that is cropped least (the shorter one, where `size` is
            square), a centre crop of which is taken; `none` is 1, `squeeze` changes the aspect ratio instead.

    Returns:
        (..., channels, *size), uint8.
    """
    height, width = images.shape[-2:]
    if (height, width) == tuple(size):
        return images
    share = crop_share(eval_crop)
    if share is None:
        return resize(images, size)
    covers = resized_shape(height, width, size, share)
    top, left = ((whole - part) // 2 for whole, part in zip(covers, size))
    return resize(images, covers)[..., top : top + size[0], left : left + size[1]]


def resized_shape(height: int, width: int, size: tuple[int, int], share: float) -> tuple[int, int]:
    """(height, width) of an image before the centre crop to `size`, with its own aspect ratio."""
    rows, columns = (max(side, round(side / share)) for side in size)
    if height * columns <= width * rows:
        return rows, max(columns, int(rows * width / height))
    return max(rows, int(columns * height / width)), columns


def resize(images: torch.Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> torch.Tensor:
    """With antialiasing; fastest where the channels lie innermost in memory, as a decoded file's do."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    # torchvision's resize ends in the same call, but takes half as long again.
    batch = images[None] if images.ndim == 3 else images
    resized = F.interpolate(batch, size=tuple(size), mode=interpolation, antialias=True)
    return resized[0] if images.ndim == 3 else resized
