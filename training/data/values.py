"""From the values that a file holds to 8 bits in as many channels as the model has."""

import numpy as np

from hf_mim.training.errors import DataError


def to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    """8 bits per channel: 16 bits are divided by 257 and rounded, floats in [0, 1] multiplied by 255.

    Raises:
        DataError: values of another type, or floats beyond that range.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        return np.rint(pixels * 255).astype(np.uint8)
    low, high = (pixels.min(), pixels.max()) if pixels.size else ("nothing", "nothing")
    raise DataError(f"{name} holds {pixels.dtype} from {low} to {high}; use uint8, uint16 or floats in [0, 1]", name)


def channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """(channels, height, width), if the first axis can be that and the last cannot, -> (height, width, channels)."""
    possible = (1, num_channels)
    first = array.ndim == 3 and array.shape[2] not in possible and array.shape[0] in possible
    return array.transpose(1, 2, 0) if first else array


def to_channels(pixels: np.ndarray, num_channels: int, name: str) -> np.ndarray:
    """(height, width) or (height, width, channels) -> (num_channels, height, width).

    Raises:
        DataError: there are other channels, and more than one.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise DataError(f"{name} is not an image: an array of shape {pixels.shape}", name)
    pixels = pixels.transpose(2, 0, 1)
    if len(pixels) == num_channels:
        return pixels
    if len(pixels) == 1:
        return np.repeat(pixels, num_channels, axis=0)
    raise DataError(
        f"{name} has {len(pixels)} channels, but the model is configured for num_channels={num_channels}", name
    )
