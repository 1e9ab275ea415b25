"""Masks: maps of class ids, as they are written in a file."""

import io
from pathlib import Path

import numpy as np
import PIL.Image

from hf_mim.training.data.decoding import read_file
from hf_mim.training.errors import DataError


IGNORE = 255  # the id of pixels that have no class
HIGHEST_ID = 65_535
ORIENTATION = 274  # the EXIF tag; 5 and above are turned by a quarter


class BadMask(DataError):
    """A mask that cannot be used."""


def decode_mask(value, name: str = "without a name") -> np.ndarray:
    """Class ids (height, width), int64, as they are written: of a palette its indices, not its colours.

    Args:
        value: bytes or path of an image or .npy, {"bytes", "path"}, a PIL image, or nested lists.

    Raises:
        BadMask: it cannot be read, or is no map of ids from 0 to 65535.
    """
    if isinstance(value, dict):
        name = Path(value.get("path") or name).name
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise BadMask(f"mask {name} is missing")
    try:
        if isinstance(value, str | Path):
            value = read_file(value)
        if isinstance(value, bytes):
            is_array = value[:6] == b"\x93NUMPY"
            value = np.load(io.BytesIO(value), allow_pickle=False) if is_array else PIL.Image.open(io.BytesIO(value))
        ids = np.array(value)
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise BadMask(f"cannot read mask {name}: {error}".partition("\n")[0]) from None
    if ids.ndim == 3:  # equal channels, or a first axis of one
        ids = ids[..., 0] if (ids == ids[..., :1]).all() else ids[0] if len(ids) == 1 else ids
    if ids.ndim != 2 or ids.dtype.kind not in "uib":
        shape = "x".join(map(str, ids.shape))
        raise BadMask(f"mask {name} must hold whole numbers, one class id per pixel, and holds {ids.dtype} {shape}")
    ids = ids.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > HIGHEST_ID):
        raise BadMask(f"mask {name} holds ids from {ids.min()} to {ids.max()}; use {IGNORE} for pixels of no class")
    return ids


def size_of(image) -> tuple[int, int] | None:
    """(height, width) of an undecoded image, upright; None where Pillow does not recognise the file."""
    try:
        content = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        with PIL.Image.open(content) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) >= 5
            return opened.size if turned else opened.size[::-1]
    except (OSError, SyntaxError, TypeError, AttributeError):
        return None
