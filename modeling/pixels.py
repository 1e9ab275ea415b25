"""From a file to the 8-bit pixels that a model is made for: the same in training, evaluation and serving.

Training and `image_processing_mim` both read images through here. Needs no torch, as settings are checked here too.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence


MAX_PIXELS = 178_956_970  # where Pillow refuses an image by default
EVAL_CROP = 0.875  # share of the shorter side that a centre crop keeps: 224 of 256
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # as text: JSON has no such numbers

# What an image of another mode is turned into first. Transparency is dropped, unless the model has a channel for it:
# 2 for grey and 4 for colours with transparency.
MODES = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")
TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
ARRAY = b"\x93NUMPY"
PNG16 = {2: 3, 4: 2, 6: 4}  # channels by colour type, of the PNG files that Pillow reads with 8 of their 16 bits
GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"  # of the header of a PPM file: spaces and comments
PPM = re.compile(rb"(P[36])" + GAP + rb"(\d+)" + GAP + rb"(\d+)" + GAP + rb"(\d+)\s")
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, as in Pillow's `convert("L")`
ORIENTATION = 274  # the tag of TIFF and EXIF


class UnreadableImage(ValueError):
    """A file that is no image, a broken one, or one with more pixels than are allowed."""


class MissingDecoder(ValueError):
    """A file of a kind that needs a library which is not installed."""


# ---- values --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PixelRules:
    """What the values of a file become.

    Args:
        num_channels: of the result.
        value_range: (low, high), or one such pair per channel: `low` becomes 0 and `high` 255, what lies beyond is
            clipped. None: 8-bit values stay, other integers are taken for 16 bits, floats for [0, 1].
        nodata: the value of what was not measured; NaN stands for all that is not finite. None: there is none.
        fill: the level (per channel, 0 to 255) that missing values get.
    """

    num_channels: int
    value_range: tuple[tuple[float, float], ...] | None = None
    nodata: float | None = None
    fill: tuple[int, ...] = ()

    def apply(self, pixels: np.ndarray) -> tuple[np.ndarray, float]:
        """
        Args:
            pixels: (height, width) or (height, width, channels), of any real type.

        Returns:
            (num_channels, height, width), uint8; grey is repeated. And the share of the values that were missing.

        Raises:
            ValueError: it has other channels, or values that need `value_range` or `nodata`.
        """
        pixels = to_channels(pixels, self.num_channels)
        missing = self.missing(pixels)
        if missing is None:
            return self._scale(pixels), 0.0
        share = float(missing.mean())
        if share == 1:
            return self._filled(pixels.shape).copy(), share
        known = pixels[~missing].flat[0]
        levels = self._scale(np.where(missing, known, pixels)) if share else self._scale(pixels)
        return np.where(missing, self._filled(pixels.shape), levels), share

    def missing(self, pixels: np.ndarray) -> np.ndarray | None:
        """Which values are missing, of the shape of the pixels; None where none can be."""
        if self.nodata is None:
            return None
        if math.isnan(self.nodata):
            return ~np.isfinite(pixels) if pixels.dtype.kind == "f" else None
        if pixels.dtype.kind == "f":
            with np.errstate(over="ignore"):  # a value that the type cannot hold is not in the file
                return np.isnan(pixels) | (pixels == pixels.dtype.type(self.nodata))
        return pixels == self.nodata

    def _filled(self, shape: tuple[int, ...]) -> np.ndarray:
        levels = np.array(self.fill or (128,) * self.num_channels, dtype=np.uint8)
        return np.broadcast_to(levels[:, None, None], shape)

    def _scale(self, pixels: np.ndarray) -> np.ndarray:
        if self.value_range is None:
            return to_uint8(pixels)
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError(f"holds {describe_values(pixels)}; {SAY_NODATA}")
        kind = np.float64 if pixels.dtype.itemsize > 2 and pixels.dtype != np.float32 else np.float32
        low, high = np.array(self.value_range, dtype=kind).T[:, :, None, None]
        return np.rint((pixels.astype(kind) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


SAY_RANGE = "say in data.value_range which values become black and white, such as [0, 4000] or auto"
SAY_NODATA = "if that stands for what was not measured, set data.nodata to it (nan for NaN)"


def pixel_rules(
    num_channels: int, image_mean: Sequence[float], value_range: Sequence | None, nodata: Any = None
) -> PixelRules:
    """The rules of a config or of an image processor. Missing values become the level nearest to the mean, 0 after
    normalisation.

    Raises:
        ValueError: not a range, or one for another number of channels.
    """
    missing = as_number(nodata)
    fill = () if missing is None else tuple(int(np.clip(round(255 * mean), 0, 255)) for mean in image_mean)
    return PixelRules(num_channels, as_pairs(value_range, num_channels), missing, fill)


def as_pairs(value_range: Sequence | None, num_channels: int) -> tuple[tuple[float, float], ...] | None:
    """[low, high] or [[low, high], ...] -> pairs, one or one per channel.

    Raises:
        ValueError: it is neither, a pair is not in order, or there are other channels.
    """
    if value_range is None:
        return None
    pairs = [value_range] if len(value_range) == 2 and not hasattr(value_range[0], "__len__") else value_range
    numbers = all(hasattr(p, "__len__") and len(p) == 2 and all(isinstance(v, int | float) for v in p) for p in pairs)
    if not pairs or not numbers or not all(math.isfinite(low) and low < high < math.inf for low, high in pairs):
        raise ValueError(
            f"value_range must be a pair like [0, 4000], low before high, or one pair per channel, not {value_range!r}"
        )
    if len(pairs) not in (1, num_channels):
        raise ValueError(f"value_range has {len(pairs)} pairs for num_channels={num_channels}")
    return tuple((float(low), float(high)) for low, high in pairs)


def as_number(nodata: Any) -> float | None:
    """Raises:
    ValueError: neither a number, nor nan, inf or -inf as text.
    """
    if nodata is None or (isinstance(nodata, int | float) and not isinstance(nodata, bool)):
        return None if nodata is None else float(nodata)
    text = str(nodata).lower().lstrip("+.").replace("-.", "-")
    if text not in NOT_FINITE:
        raise ValueError(f"nodata must be a number or nan, not {nodata!r}")
    return NOT_FINITE[text]


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """8 bits per channel without a range: 16 bits are divided by 257 and rounded, floats in [0, 1] multiplied by 255.
    Integers of other types are read as 16 bits where they fit.

    Raises:
        ValueError: values of another type, or beyond that range.
    """
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return pixels.astype(np.uint8) * 255
    if kind in "iu" and pixels.size:
        low, high = pixels.min(), pixels.max()
        if size == 1 and low >= 0:
            return pixels.astype(np.uint8)
        if low >= 0 and high <= 65535:
            return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        return np.rint(pixels.astype(np.float32, copy=False) * 255).astype(np.uint8)
    remedy = SAY_RANGE if kind in "iuf" else "use whole numbers or floats"
    if kind == "f" and not np.isfinite(pixels).all():
        remedy = SAY_NODATA
    elif kind in "if" and pixels.size and pixels.min() < 0:
        remedy = f"{SAY_RANGE}; if the lowest stands for what was not measured, set data.nodata to it"
    raise ValueError(f"holds {describe_values(pixels)}; {remedy}")


def describe_values(pixels: np.ndarray) -> str:
    """`int16 from -9999 to 5123`, with NaN and infinity named beside the others."""
    values = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    low, high = (values.min(), values.max()) if values.size and pixels.dtype.kind in "iufb" else ("nothing", "nothing")
    others = [("NaN", np.isnan), ("infinity", np.isinf)] if pixels.dtype.kind == "f" else []
    named = [name for name, test in others if test(pixels).any()]
    return f"{pixels.dtype.newbyteorder('=')} from {low} to {high}" + (f" and {' and '.join(named)}" if named else "")


def channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """(channels, height, width), if the first axis can be that and the last cannot, -> (height, width, channels)."""
    possible = (1, num_channels)
    first = array.ndim == 3 and array.shape[2] not in possible and array.shape[0] in possible
    return array.transpose(1, 2, 0) if first else array


def to_channels(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    """(height, width) or (height, width, channels) -> (num_channels, height, width).

    Raises:
        ValueError: there are other channels, and more than one.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"is not an image: an array of shape {pixels.shape}")
    pixels = pixels.transpose(2, 0, 1)
    if len(pixels) == num_channels:
        return pixels
    if len(pixels) == 1:
        return np.repeat(pixels, num_channels, axis=0)
    raise ValueError(f"has {len(pixels)} channels, but the model is configured for num_channels={num_channels}")


# ---- files ---------------------------------------------------------------------------------------------------------
def read_file(file: bytes, num_channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values of an image file, upright.

    Args:
        num_channels: of the model: colours become grey where it is 1, transparency stays where it is 2 or 4.

    Returns:
        (height, width) or (height, width, channels), of the file's own type.

    Raises:
        UnreadableImage: it has more than `max_pixels`.
        OSError, ValueError and others: it cannot be read.
    """
    if file[:6] == ARRAY:
        return channels_last(_read_array(file, num_channels, max_pixels), num_channels)
    if file[:4] in TIFF and num_channels not in (1, 3, 4):
        return channels_last(_read_tiff(file, num_channels, max_pixels), num_channels)
    if file[12:16] == b"IHDR" and file[24] == 16 and file[25] in PNG16:
        check_pixels(int.from_bytes(file[16:20], "big") * int.from_bytes(file[20:24], "big"), max_pixels)
        return _read_png16(file, num_channels)
    if (ppm := PPM.match(file)) is not None and int(ppm[4]) > 255:
        check_pixels(int(ppm[2]) * int(ppm[3]), max_pixels)
        return _read_ppm16(file, ppm, num_channels)
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None  # `max_pixels` takes its place
    try:
        image = PIL.Image.open(io.BytesIO(file))
        check_pixels(image.width * image.height, max_pixels)
        if image.format == "TIFF" and image.mode in GREY and getattr(image, "n_frames", 1) == num_channels > 1:
            return _read_pages(image, max_pixels)
        return from_pillow(image, num_channels)
    except PIL.UnidentifiedImageError:
        if file[:4] not in TIFF:
            raise
        return channels_last(_read_tiff(file, num_channels, max_pixels), num_channels)  # 16-bit colours, for one
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def _read_pages(image: PIL.Image.Image, max_pixels: int) -> np.ndarray:
    pages = []
    for page in PIL.ImageSequence.Iterator(image):
        check_pixels(page.width * page.height, max_pixels)
        pages.append(np.array(page))
    return np.stack(pages, axis=-1)


def from_pillow(image: PIL.Image.Image, num_channels: int) -> np.ndarray:
    """(height, width) or (height, width, channels), upright, in the image's own type where it is grey."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if num_channels == 4 and (is_transparent(image) or image.mode == "RGBX"):
        image = image if image.mode == "RGBX" else image.convert("RGBA")
    elif not (num_channels == 2 and image.mode == "LA"):
        image = image.convert(MODES[image.mode]) if image.mode in MODES else image
    if num_channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = np.array(image)  # a copy that torch may write to
    # Pillow reads 16-bit grey as 32-bit numbers in some formats.
    fits = pixels.dtype == np.int32 and pixels.size and pixels.min() >= 0 and pixels.max() <= 65535
    return pixels.astype(np.uint16) if fits else pixels


def is_transparent(image: PIL.Image.Image) -> bool:
    return image.mode in ("RGBA", "PA") or (image.mode in ("P", "RGB") and "transparency" in image.info)


def check_pixels(count: int, max_pixels: int) -> None:
    """Raises:
    UnreadableImage: an image of so many pixels is too large.
    """
    if count > max_pixels:
        raise too_large(f"{count:,}", max_pixels)


def too_large(count: str, max_pixels: int) -> UnreadableImage:
    return UnreadableImage(
        f"has {count} pixels, more than data.max_pixels={max_pixels}: raise it to read this image, or cut the image up"
    )


def _read_array(file: bytes, num_channels: int, max_pixels: int) -> np.ndarray:
    stream = io.BytesIO(file)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not loaded")
        check_pixels(math.prod(shape) // num_channels, max_pixels)
        if math.prod(shape) * dtype.itemsize > len(file) - stream.tell():  # before memory for all of it is taken
            raise ValueError("it is cut short")
        return np.load(io.BytesIO(file), allow_pickle=False)
    except UnreadableImage:
        raise
    except ValueError as error:  # cut short, or pickled objects
        raise OSError(error) from None


def _read_tiff(file: bytes, num_channels: int, max_pixels: int) -> np.ndarray:
    """What Pillow does not read: any number of channels, interleaved or as pages, of any type."""
    try:
        import tifffile
    except ImportError:
        raise MissingDecoder("is a TIFF file whose channels need tifffile: pip install 'hf-mim[tiff]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(file)) as opened:
            series = opened.series[0]
            check_pixels(math.prod(series.shape) // num_channels, max_pixels)
            array, tag = series.asarray(), opened.pages.first.tags.get(ORIENTATION)
    except UnreadableImage:
        raise
    except (ValueError, KeyError, IndexError) as error:  # TiffFileError is a ValueError
        raise OSError(error) from None
    array = channels_last(array, num_channels)
    return turn_upright(array, int(tag.value)) if tag is not None else array


def turn_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(height, width, ...) as the tag of TIFF and EXIF says: 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array[:, ::-1] if orientation in (2, 3, 6, 7) else array)


def _read_png16(file: bytes, num_channels: int) -> np.ndarray:
    """PNG with 16 bits for each of several channels, of which Pillow keeps 8."""
    import torch

    try:
        from torchvision.io import ImageReadMode, decode_png
    except ImportError:  # no torchvision, or one that has left decoding to others
        raise MissingDecoder("is a PNG file with 16 bits a channel, which needs torchvision's decode_png") from None
    values = decode_png(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    pixels = values.permute(1, 2, 0).numpy()
    with PIL.Image.open(io.BytesIO(file)) as image:
        pixels = turn_upright(pixels, image.getexif().get(ORIENTATION, 1))
    if pixels.shape[2] != num_channels and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    return _grey16(pixels) if num_channels == 1 and pixels.shape[2] == 3 else pixels


def _read_ppm16(file: bytes, header: re.Match, num_channels: int) -> np.ndarray:
    """PPM with 16 bits for each colour, of which Pillow keeps 8. The highest value that it names is white."""
    width, height, top = (int(number) for number in header.groups()[1:])
    count, body = width * height * 3, file[header.end() :]
    if header[1] == b"P6":
        values = np.frombuffer(body[: min(2 * count, len(body) // 2 * 2)], ">u2")
    else:
        values = np.array(body.split()[:count], np.uint32)
    if len(values) < count or values.max(initial=0) > top:
        raise OSError("it is cut short, or holds more than its highest value")
    scaled = np.rint(values.astype(np.float64) * (65535 / top)).astype(np.uint16)
    pixels = scaled.reshape(height, width, 3)
    return _grey16(pixels) if num_channels == 1 else pixels


def _grey16(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) -> (height, width), uint16."""
    return np.rint(pixels.astype(np.float32) @ np.array(LUMA, np.float32)).astype(np.uint16)


# ---- geometry ------------------------------------------------------------------------------------------------------
def crop_share(eval_crop: float | str | None) -> float | None:
    """`eval_crop` as the share of the shorter side that stays; None squeezes.

    Raises:
        ValueError: neither squeeze, none, nor a share above 0 and up to 1.
    """
    if eval_crop is None:
        return EVAL_CROP
    if eval_crop in ("squeeze", "none"):
        return None if eval_crop == "squeeze" else 1.0
    if isinstance(eval_crop, str | bool) or not 0 < eval_crop <= 1:
        raise ValueError(f"eval_crop must be squeeze, none, or a share above 0 and up to 1, not {eval_crop!r}")
    return float(eval_crop)
