"""Masks: maps of class ids, as they are written in a file."""

import io
from pathlib import Path

import numpy as np
import PIL.Image

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.decoding import check_regular, read_file


IGNORE = 255  # the id of pixels that have no class
HIGHEST_ID = 65_535
LOSSY = ("JPEG", "MPO", "AVIF")
REMEDY = "let data.mask_values name the"
FREQUENT, NEAR, NAMED = 0.005, 16, 12  # of values that are named: their share of the pixels, their distance, how many
ORIENTATION = 274  # the EXIF tag; 5 and above are turned by a quarter


class BadMask(DataError):
    """A mask that cannot be used."""


class UnreadableMask(BadMask):
    """A mask that is missing or broken: its image counts as a bad one, where others end the run."""


def decode_mask(value, name: str = "without a name", mask_values: list | None = None) -> np.ndarray:
    """Class ids (height, width), int64: as they are written, of a palette its indices and not its colours; or as
    `mask_values` says.

    Args:
        value: bytes or path of an image or .npy, {"bytes", "path"}, a PIL image, or nested lists.
        mask_values: see `DataArguments`.

    Raises:
        UnreadableMask: it is missing or cannot be read.
        BadMask: it is lossy, or is no map of ids from 0 to 65535.
    """
    if isinstance(value, dict):
        name = Path(value.get("path") or name).name
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None or isinstance(value, bytes) and not value:
        raise UnreadableMask(f"mask {name} is missing")
    colours = mask_values is not None and not isinstance(mask_values[0], int)
    try:
        ids, kind = _read_mask(value, colours)
    except BadMask:
        raise
    except Exception as error:  # whatever a decoder makes of a file that is broken
        raise UnreadableMask(f"cannot read mask {name}: {error}".partition("\n")[0]) from None
    if ids.dtype.kind == "f" and np.isfinite(ids).all() and (ids == np.rint(ids)).all():
        ids = ids.astype(np.int64)
    if mask_values is not None and ids.dtype.kind in "uib":
        return map_values(ids, np.array(mask_values), name)
    if ids.ndim == 3 and ids.shape[2] == 3 and ids.dtype == np.uint8:
        raise BadMask(f"mask {name} holds colours and no class ids: {REMEDY} colour of each class: {_colours(ids)}")
    if ids.ndim != 2 or ids.dtype.kind not in "uib":
        shape = "x".join(map(str, ids.shape))
        raise BadMask(f"mask {name} must hold whole numbers, one class id per pixel, and holds {ids.dtype} {shape}")
    if kind in LOSSY:
        raise BadMask(
            f"mask {name} is a lossy {kind} file, whose values are no exact class ids: save masks as PNG, or {REMEDY} "
            f"value of each class, such as {frequent_values(np.bincount(ids.ravel()))}"
        )
    ids = ids.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > HIGHEST_ID):
        raise BadMask(f"mask {name} holds ids from {ids.min()} to {ids.max()}; use {IGNORE} for pixels of no class")
    return ids


def _read_mask(value, colours: bool) -> tuple[np.ndarray, str | None]:
    """What stands in a mask, (height, width) or with channels; and the format of its file.

    Args:
        colours: of a palette its colours, not its indices.
    """
    if isinstance(value, str | Path):
        value = read_file(value)
    if isinstance(value, bytes):
        is_array = value[:6] == b"\x93NUMPY"
        value = np.load(io.BytesIO(value), allow_pickle=False) if is_array else PIL.Image.open(io.BytesIO(value))
    kind, is_image = getattr(value, "format", None), isinstance(value, PIL.Image.Image)
    if is_image:
        value = value.convert("RGB") if value.mode == "P" and colours else value
        ids = np.array(value)
        ids = ids[..., :-1] if value.mode in ("RGBA", "LA") else ids  # transparency is no class
    else:
        ids = np.array(value)
    if ids.ndim == 3 and (ids == ids[..., :1]).all():
        ids = ids[..., 0]
    elif ids.ndim == 3 and len(ids) == 1 and not is_image:
        ids = ids[0]
    return ids, kind


def map_values(pixels: np.ndarray, values: np.ndarray, name: str) -> np.ndarray:
    """Class ids (height, width), int64: the number of the nearest value, `IGNORE` where that is further away than half
    of what two values are apart.

    Args:
        pixels: (height, width), or (height, width, 3) of colours.
        values: (classes,), or (classes, 3).
    """
    if pixels.ndim == 3 and values.ndim == 1:
        raise BadMask(f"mask {name} holds colours, and data.mask_values grey values")
    if pixels.ndim == 2 and values.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    known, inverse = np.unique(pixels.reshape(-1, *pixels.shape[2:]), axis=0, return_inverse=True)
    known, values = (array.reshape(len(array), -1).astype(float) for array in (known, values))
    distances = np.linalg.norm(known[:, None] - values, axis=2)
    apart = np.linalg.norm(values[:, None] - values, axis=2)
    limit = apart[~np.eye(len(values), dtype=bool)].min() / 2
    ids = np.where(distances.min(axis=1) <= limit, distances.argmin(axis=1), IGNORE)
    return ids[inverse.reshape(-1)].reshape(pixels.shape[:2])


def frequent_values(counts: np.ndarray) -> list[int]:
    """The values that most pixels have, no two of them near each other: what was drawn before a lossy file was made.

    Args:
        counts: pixels of each value.
    """
    values: list[int] = []
    for value in np.argsort(-counts, kind="stable"):
        if counts[value] < FREQUENT * counts.sum() or len(values) == NAMED:
            break
        if all(abs(int(value) - other) > NEAR for other in values):
            values.append(int(value))
    return sorted(values)


def smooth_share(ids: np.ndarray, length: int) -> np.ndarray:
    """Of how many pixels of each id the neighbours to the right and below have the same: (length,), int64."""
    corner = ids[:-1, :-1]
    same = (corner == ids[1:, :-1]) & (corner == ids[:-1, 1:]) & (corner == ids[1:, 1:])
    return np.bincount(corner[same], minlength=length)[:length]


def _colours(pixels: np.ndarray) -> str:
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NAMED]
    return f"{colours[order].tolist()}{'' if len(counts) <= NAMED else ' and more'}".replace(" ", "")


def size_of(image) -> tuple[int, int] | None:
    """(height, width) of an undecoded image, upright; None where Pillow does not recognise the file."""
    try:
        if image.get("bytes") is None:
            check_regular(image["path"])
        content = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        with PIL.Image.open(content) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) >= 5
            return opened.size if turned else opened.size[::-1]
    except Exception:  # as in `decode_mask`, which says so
        return None
