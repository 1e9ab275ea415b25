"""Sizes, random crops and flips; every random number follows from (seed, epoch, sample index)."""

import math

import numpy as np
import torch

from hf_mim.modeling.resizing import resize as resize_whole


CROP_RATIO = (3 / 4, 4 / 3)  # aspect ratios of the crops, relative to that of the output
TRIES = 10  # crops that do not fit into the image are drawn again, as in torchvision
UNIFORMS = 4 * TRIES + 1  # how many numbers an image's crop and flip take from its generator, whatever the options
# Up to this size a crop is resampled as two matrix products for the whole batch; above, one image at a time is faster.
SMALL = 48


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one image in one epoch: it depends on nothing else, neither process nor worker nor order."""
    return np.random.default_rng((seed, epoch, index))


def crop_boxes(uniforms: np.ndarray, sizes: np.ndarray, size: tuple[int, int], scale: list[float]) -> np.ndarray:
    """Boxes of random resized crops.

    Args:
        uniforms: (batch, >= 4 * TRIES), in [0, 1).
        sizes: (batch, 2), height and width of the images, pixels.
        size: of the output; the crops' aspect ratios lie around that of the output.
        scale: least and greatest share of the image's area.

    Returns:
        (batch, 4), int: top, left, height, width. Where no try fits, the largest centred crop of allowed ratio.
    """
    tries = uniforms[:, : 4 * TRIES].reshape(-1, TRIES, 4)
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = (math.log(ratio * size[1] / size[0]) for ratio in CROP_RATIO)
    ratio = np.exp(low + (high - low) * tries[..., 1])
    crop_w, crop_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (crop_w > 0) & (crop_w <= widths) & (crop_h > 0) & (crop_h <= heights)
    top, left = np.floor(tries[..., 2] * (heights - crop_h + 1)), np.floor(tries[..., 3] * (widths - crop_w + 1))
    boxes = np.stack([top, left, crop_h, crop_w], axis=-1)[np.arange(len(fits)), fits.argmax(1)]
    none = ~fits.any(1)
    if none.any():
        boxes[none] = _centred(sizes[none], math.exp(low), math.exp(high))
    return boxes.astype(np.int64)


def _centred(sizes: np.ndarray, low: float, high: float) -> np.ndarray:
    heights, widths = sizes[:, 0], sizes[:, 1]
    crop_h = np.minimum(heights, np.maximum(1, np.rint(widths / low)))
    crop_w = np.minimum(widths, np.maximum(1, np.rint(heights * high)))
    return np.stack([(heights - crop_h) // 2, (widths - crop_w) // 2, crop_h, crop_w], axis=-1)


def resize(image: torch.Tensor, size: tuple[int, int], box=None, interpolation: str = "bicubic") -> torch.Tensor:
    """`resizing.resize` of a part of an image (..., channels, height, width), uint8.

    Args:
        box: top, left, height, width of the part to keep; None is all of it.
        interpolation: one of `INTERPOLATIONS`.
    """
    if box is not None:
        top, left, height, width = map(int, box)
        image = image[..., top : top + height, left : left + width]
    return resize_whole(image, size, interpolation)


def cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -0.5, which PIL and torchvision use where they antialias, of distances of at least 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far) * (x < 2)


INTERPOLATIONS = {"bicubic": cubic, "bilinear": lambda x: (1 - x).clamp(min=0)}


def resample_matrix(
    starts: torch.Tensor, lengths: torch.Tensor, source: int, out: int, interpolation: str = "bicubic"
) -> torch.Tensor:
    """Weights of antialiased resampling of an interval to `out` pixels, one matrix per image.

    Args:
        starts, lengths: (batch,), the intervals in pixels, within [0, source).

    Returns:
        (batch, out, source), float32, on the same device; rows sum to one.
    """
    starts, lengths = starts[:, None, None], lengths[:, None, None]
    step = lengths.float() / out
    widen = step.clamp(min=1)
    centres = (torch.arange(out, device=starts.device)[:, None] + 0.5) * step
    pixels = torch.arange(source, device=starts.device) - starts
    x = ((pixels + 0.5 - centres) / widen).abs()
    weights = INTERPOLATIONS[interpolation](x) * ((pixels >= 0) & (pixels < lengths))
    return weights / weights.sum(-1, keepdim=True)


def crop(image: torch.Tensor, box: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> torch.Tensor:
    """`crop_batch` of one image (channels, height, width)."""
    if max(*image.shape[-2:], *size) > SMALL:
        return resize(image, size, box, interpolation)
    return crop_batch(image[None], box[None], size, interpolation)[0]


def crop_batch(
    images: torch.Tensor, boxes: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic"
) -> torch.Tensor:
    """Crops and resizes images of one size, each with its own box.

    Args:
        images: (batch, channels, height, width), uint8.
        boxes: (batch, 4), as of `crop_boxes`.

    Returns:
        (batch, channels, *size), uint8, within a level of what Pillow gives.
    """
    height, width = images.shape[-2:]
    if max(height, width, *size) > SMALL:
        pairs = zip(images, boxes, strict=True)
        return torch.stack([resize(image, size, box, interpolation) for image, box in pairs])
    return resample(images, torch.from_numpy(boxes), size, interpolation)


def resample(
    images: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], interpolation: str = "bicubic"
) -> torch.Tensor:
    """`crop_batch` by two matrix products, on the device of images and boxes, which nobody waits for."""
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], images.shape[-2], size[0], interpolation)
    columns = resample_matrix(boxes[:, 1], boxes[:, 3], images.shape[-1], size[1], interpolation)
    # Rounded between the passes as well, as torchvision and PIL do.
    resized = (images.float() @ columns[:, None].mT).round_().clamp_(0, 255)
    return (rows[:, None] @ resized).round_().clamp_(0, 255).to(torch.uint8)


def flip_batch(images: torch.Tensor, flips: np.ndarray) -> torch.Tensor:
    """Mirrors, in place, the images (batch, channels, height, width) for which `flips` (batch,) is True."""
    for i in np.flatnonzero(flips):
        images[i] = images[i].flip(-1)
    return images


def crop_and_flip(images: torch.Tensor, crops: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`crop_batch` and `flip_batch` on the device of the images.

    Args:
        images: (batch, channels, height, width), uint8.
        crops: (batch, 5), int: top, left, height, width, and 1 where the image is mirrored.
    """
    cropped = resample(images, crops, size)
    return torch.where(crops[:, 4].bool()[:, None, None, None], cropped.flip(-1), cropped)
