"""From what a data set holds to pixels as the model wants them. What files mean is said in `modeling.pixels`."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision.io

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.pixels import (
    GREY,
    MAX_PIXELS,
    MissingDecoder,
    PixelRules,
    UnreadableImage,
    check_pixels,
    from_pillow,
    is_transparent,
    pixel_rules,
)
from hf_mim.modeling.pixels import read_file as read_values
from hf_mim.training.common.errors import DataError
from hf_mim.training.common.foreign_errors import decoder_reason
from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments


# Deprecated since torchvision 0.29. Without it Pillow decodes, which takes a quarter longer, and more for small files.
JPEG2000 = b"\xff\x4f\xff\x51"  # how its code begins: two markers, of which the second says size and bits
HAS_JPEG = hasattr(torchvision.io, "decode_jpeg")


class Undecodable(DataError):
    """A file that is no image, a broken one, or one that is too large."""


class Decoder:
    """Decodes images by the rules of a model and of a recipe.

    Args:
        config: gives channels, mean, and the range and the missing value that a checkpoint was trained with.
        data: `value_range` (resolved) and `nodata` come before those of the config; `max_pixels`.

    Attributes:
        missing: share of the values of the last image that were missing.

    Raises:
        ValueError: the range is for other channels.
    """

    def __init__(self, config: MIMConfig, data: DataArguments):
        value_range = config.value_range if data.value_range is None else data.value_range
        nodata = config.nodata if data.nodata is None else data.nodata
        try:
            self.rules = pixel_rules(config.num_channels, config.image_mean or (), value_range, nodata)
        except ValueError as error:
            raise DataError(f"data.{error}") from None
        self.max_pixels, self.missing = data.max_pixels, 0.0

    def __call__(self, value) -> np.ndarray:
        """(num_channels, height, width), uint8. Raises: as of `decode`."""
        values, name = read_image(value, self.rules.num_channels, self.max_pixels)
        pixels, self.missing = apply_rules(self.rules, values, name)
        return pixels


def decode(value, num_channels: int) -> np.ndarray:
    """An image as the model wants it, by the usual rules.

    Args:
        value: what a data set holds: bytes, a path or URL, {"bytes", "path"}, or a PIL image.
        num_channels: of the result.

    Returns:
        (num_channels, height, width), uint8. Grey is repeated to any number of channels, and colours become grey
        where one channel is wanted; see `pixels.MODES` for transparency and `pixels.to_uint8` for 16 bits and floats.

    Raises:
        Undecodable: it cannot be decoded, or is not there.
        Unreachable: it lies at a URL that does not answer, which makes it no broken file.
        DataError: its values or channels cannot become those that are asked for.
    """
    return apply_rules(PixelRules(num_channels), *read_image(value, num_channels))[0]


def apply_rules(rules: PixelRules, values: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """As `PixelRules.apply`, with errors that name the image."""
    try:
        return rules.apply(values)
    except ValueError as error:
        raise DataError(f"{name} {error}", name) from None


def read_image(value, num_channels: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, str]:
    """The values of an image (height, width[, channels]), upright and of its own type, and its name.

    Raises: as of `decode`.
    """
    name = "an image"
    if isinstance(value, dict):
        name = value.get("path") or name
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str | Path):
        name = str(value)
    if value is None or isinstance(value, bytes) and not value:
        raise Undecodable(f"{name} is missing", name)
    if not isinstance(value, bytes | str | Path | PIL.Image.Image):
        raise Undecodable(f"{name} is no image but of the type {type(value).__name__}", name)
    try:
        if isinstance(value, PIL.Image.Image):
            check_pixels(value.width * value.height, max_pixels)
            values = from_pillow(value, num_channels)
        else:
            values = _from_file(value if isinstance(value, bytes) else read_file(value), num_channels, max_pixels)
    except urls.Unreachable:
        raise
    except UnreadableImage as error:
        raise Undecodable(f"{name} {error}", name) from None
    except PIL.UnidentifiedImageError:  # its message names the object in memory that Pillow was given
        raise Undecodable(f"{name} is not a recognised image file", name) from None
    except MissingDecoder as error:
        raise DataError(f"{name} {error}", name) from None
    except Exception as error:  # whatever a decoder makes of a file that is broken, also more memory than there is
        raise Undecodable(f"cannot decode {name}: {decoder_reason(error)}", name) from None
    if 0 in values.shape:
        raise Undecodable(f"{name} has no pixels", name)
    return values, name


def read_file(place: str | Path) -> bytes:
    if urls.is_url(place):
        return urls.read_url(str(place))
    check_regular(place)
    return Path(place).read_bytes()


def check_regular(place: str | Path) -> None:
    """Raises:
    OSError: it is a pipe, a socket or a device, which may never end.
    """
    if Path(place).exists() and not Path(place).is_file():
        raise OSError("not a regular file")


def _from_file(file: bytes, num_channels: int, max_pixels: int) -> np.ndarray:
    if HAS_JPEG and num_channels == 3 and is_plain_jpeg(file, max_pixels):
        return _decode_jpeg(file)
    return read_values(file, num_channels, max_pixels)


def is_plain_jpeg(file: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a file is a JPEG of three colours that is not too large: Pillow sees to all others. (Opening a file with
    Pillow takes as long as a sixth of decoding it.)"""
    at = 2
    if file[:at] != b"\xff\xd8":
        return False
    while file[at : at + 1] == b"\xff" and at + 10 <= len(file):
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame; those three are tables
            height, width = (int.from_bytes(file[at + i : at + i + 2], "big") for i in (5, 7))
            return file[at + 9] == 3 and 0 < height * width <= max_pixels
        at += 2 + length
    return False


def _decode_jpeg(file: bytes) -> np.ndarray:
    """The pixels that PIL gives, upright: (height, width, 3)."""
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    mode = torchvision.io.ImageReadMode.RGB
    return torchvision.io.decode_jpeg(data, mode, apply_exif_orientation=True).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class FileKind:
    """What kind of file an image is.

    Args:
        mode: as Pillow calls it, with transparency as `RGBA`; `array` where Pillow does not read it.
        lost_bits: how many bits a channel the file has, where Pillow reads 8 of more; else 0.
        pages: of one size, or frames.
        stacks: whether its pages can be the channels of one image.
    """

    mode: str
    lost_bits: int = 0
    pages: int = 1
    stacks: bool = False


def kind_of(value) -> FileKind:
    """Args: as of `decode`; of an image that can be read."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, PIL.Image.Image):
        return FileKind("RGBA" if is_transparent(value) else value.mode)
    file = value if isinstance(value, bytes) else read_file(value)
    try:
        with PIL.Image.open(io.BytesIO(file)) as image:
            mode = "RGBA" if is_transparent(image) else image.mode
            stacks = image.format == "TIFF" and mode in GREY
            return FileKind(mode, _lost_bits(file), _count_pages(image), stacks)
    except Exception:  # as in `read_image`, which says so
        return FileKind("array")


def _count_pages(image: PIL.Image.Image) -> int:
    """1 where the second page is of another size, as previews are."""
    pages, size = getattr(image, "n_frames", 1), image.size
    if pages == 1 or image.format == "MPO":
        return 1
    image.seek(1)
    return pages if image.size == size else 1


def _lost_bits(file: bytes) -> int:
    """Of JPEG 2000 in colours and of AVIF, as their headers say."""
    if file[4:12] == b"ftypavif" and (at := file.find(b"av1C")) > 0 and file[at + 6] & 0x40:
        return 12 if file[at + 6] & 0x20 else 10
    start = file.find(JPEG2000) if file.startswith((JPEG2000, b"\0\0\0\x0cjP  ")) else -1
    if start >= 0 and len(file) > start + 42:
        channels, bits = int.from_bytes(file[start + 40 : start + 42], "big"), 1 + (file[start + 42] & 0x7F)
        return bits if channels > 1 and bits > 8 else 0
    return 0
