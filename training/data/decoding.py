"""From a file to pixels as the model wants them, and what happens to files that cannot be decoded."""

import io
import math
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence
import torch

from hf_mim.training.data import urls


try:
    from torchvision.io import ImageReadMode

    # What `torchvision.io.decode_jpeg` calls after checks and a warning that take a twentieth of the time.
    decode_jpeg = torch.ops.image.decode_jpeg
except (ImportError, AttributeError):  # deprecated since torchvision 0.29; Pillow takes a fifth longer
    decode_jpeg = None


# What an image of another mode is turned into first. Transparency is dropped, as Pillow's `convert` and the saved
# image processor do: what the model is trained on must be what it is given later. It stays where the config asks for
# the channels of the file, 2 for grey and 4 for colours with transparency.
MODES = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")
TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
FAILURES = (OSError, EOFError, SyntaxError, RuntimeError, PIL.Image.DecompressionBombError)


class Undecodable(ValueError):
    """A file that is no image, or a broken one."""


class OneLine(ValueError):
    """An error of a loader's worker of which the command prints one line."""

    def __init__(self, message: str):
        # A worker passes its traceback on as the message.
        super().__init__(message.strip().splitlines()[-1].partition(f"{type(self).__name__}: ")[2] or message)


class TooManyBadImages(OneLine):
    """More files than `data.max_bad_images` allows cannot be used."""


def decode(value, num_channels: int) -> np.ndarray:
    """An image as the model wants it.

    Args:
        value: what a data set holds: bytes, a path or URL, {"bytes", "path"}, or a PIL image.
        num_channels: of the result.

    Returns:
        (num_channels, height, width), uint8. Grey is repeated to any number of channels, and colours become grey
        where one channel is wanted; see `MODES` for transparency and `to_uint8` for 16 bits and floats.

    Raises:
        Undecodable: it cannot be decoded, or is not there.
        Unreachable: it lies at a URL that does not answer, which makes it no broken file.
        ValueError: its channels are not to be turned into `num_channels`.
    """
    name = "an image"
    if isinstance(value, dict):
        name = value.get("path") or name
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, str | Path):
        name = str(value)
    try:
        if isinstance(value, PIL.Image.Image):
            pixels = _from_pillow(value, num_channels)
        else:
            pixels = _from_file(value if isinstance(value, bytes) else read_file(value), num_channels)
    except urls.Unreachable:
        raise
    except FAILURES as error:
        # Pillow names the object in memory that it was given.
        reason = "of no format that is known" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise Undecodable(f"cannot decode {name}: {reason}".partition("\n")[0]) from None
    return to_channels(to_uint8(pixels, name), num_channels, name)


def read_file(place: str | Path) -> bytes:
    return urls.read(place) if urls.is_url(place) else Path(place).read_bytes()


def _from_file(file: bytes, num_channels: int) -> np.ndarray:
    if file[:6] == b"\x93NUMPY":
        try:
            return _channels_last(np.load(io.BytesIO(file), allow_pickle=False), num_channels)
        except ValueError as error:  # cut short, or pickled objects
            raise OSError(error) from None
    if file[:4] in TIFF and num_channels not in (1, 3, 4):
        return _channels_last(_read_tiff(file), num_channels)
    if decode_jpeg is not None and num_channels == 3 and is_plain_jpeg(file):
        return _decode_jpeg(file)
    try:
        image = PIL.Image.open(io.BytesIO(file))
    except PIL.UnidentifiedImageError:
        if file[:4] not in TIFF:
            raise
        return _channels_last(_read_tiff(file), num_channels)  # 16-bit colours, for one
    if image.format == "TIFF" and image.mode in GREY and getattr(image, "n_frames", 1) == num_channels > 1:
        return np.stack([np.array(page) for page in PIL.ImageSequence.Iterator(image)], axis=-1)
    if image.format not in ("PNG", "BMP", "PPM"):  # those carry no orientation, or not in a way that counts
        PIL.ImageOps.exif_transpose(image, in_place=True)  # else it copies
    return _from_pillow(image, num_channels)


def _from_pillow(image: PIL.Image.Image, num_channels: int) -> np.ndarray:
    transparent = image.mode in ("RGBA", "PA") or (image.mode in ("P", "RGB") and "transparency" in image.info)
    if num_channels == 4 and transparent:
        image = image.convert("RGBA")
    elif not (num_channels == 2 and image.mode == "LA"):
        image = image.convert(MODES[image.mode]) if image.mode in MODES else image
    if num_channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    pixels = np.array(image)  # a copy that torch may write to
    # Pillow reads 16-bit grey as 32-bit numbers in some formats.
    fits = pixels.dtype == np.int32 and pixels.min() >= 0 and pixels.max() <= 65535
    return pixels.astype(np.uint16) if fits else pixels


def is_plain_jpeg(file: bytes) -> bool:
    """Whether a file is a JPEG of three colours that is not suspiciously large: Pillow sees to all others. (Opening a
    file with Pillow takes as long as a sixth of decoding it.)"""
    at = 2
    if file[:at] != b"\xff\xd8":
        return False
    while file[at : at + 1] == b"\xff" and at + 10 <= len(file):
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame; those three are tables
            height, width = (int.from_bytes(file[at + i : at + i + 2], "big") for i in (5, 7))
            return file[at + 9] == 3 and 0 < height * width <= (PIL.Image.MAX_IMAGE_PIXELS or math.inf)
        at += 2 + length
    return False


def _decode_jpeg(file: bytes) -> np.ndarray:
    """The pixels that PIL gives, upright: (height, width, 3)."""
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    return decode_jpeg(data, ImageReadMode.RGB.value, True).permute(1, 2, 0).numpy()


def _read_tiff(file: bytes) -> np.ndarray:
    """What Pillow does not read: any number of channels, interleaved or as pages, of any type."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("TIFF files with such channels need tifffile: pip install 'hf-mim[tiff]'") from None
    try:
        return tifffile.imread(io.BytesIO(file))
    except (ValueError, KeyError, IndexError) as error:  # TiffFileError is a ValueError
        raise OSError(error) from None


def to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    """8 bits per channel: 16 bits are divided by 257 and rounded, floats in [0, 1] multiplied by 255.

    Raises:
        ValueError: values of another type, or floats beyond that range.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        return np.rint(pixels * 255).astype(np.uint8)
    least, most = (pixels.min(), pixels.max()) if pixels.size else ("nothing", "nothing")
    raise ValueError(f"{name} holds {pixels.dtype} from {least} to {most}; use uint8, uint16 or floats in [0, 1]")


def _channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """(channels, height, width), if the first axis can be that and the last cannot, -> (height, width, channels)."""
    wanted = (1, num_channels)
    first = array.ndim == 3 and array.shape[2] not in wanted and array.shape[0] in wanted
    return array.transpose(1, 2, 0) if first else array


def to_channels(pixels: np.ndarray, num_channels: int, name: str) -> np.ndarray:
    """(height, width) or (height, width, channels) -> (num_channels, height, width).

    Raises:
        ValueError: there are other channels, and more than one.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"{name} is no image: an array of shape {pixels.shape}")
    pixels = pixels.transpose(2, 0, 1)
    if len(pixels) == num_channels:
        return pixels
    if len(pixels) == 1:
        return np.repeat(pixels, num_channels, axis=0)
    raise ValueError(f"{name} has {len(pixels)} channels, but the model is configured for num_channels={num_channels}")


class BadImages:
    """Which images of a data set cannot be used; each is replaced by the next one that can, whoever finds it first.

    Args:
        count: of the images.
        most: `data.max_bad_images`.
        error_of: the index of a bad image -> what is wrong with it, naming the file.
    """

    def __init__(self, count: int, most: float, error_of):
        self.count, self.most, self.error_of = count, most, error_of
        self.flags = torch.zeros(count, dtype=torch.bool).share_memory_()  # the loader's workers write here too

    def add(self, index: int) -> None:
        """Raises:
        TooManyBadImages: that was one too many.
        """
        self.flags[index] = True
        self.check()

    def check(self) -> None:
        found = self.found()
        if found and (found[0] > allowed(self.count, self.most) or found[0] == self.count):
            raise too_many(found[0], f"{self.count} images", self.most, found[1])

    def found(self) -> tuple[int, str] | None:
        """How many were found so far, and what is wrong with the first in the data set's order; None without any."""
        indices = self.flags.nonzero().flatten()
        return (len(indices), self.error_of(int(indices[0]))) if len(indices) else None

    def replace(self, indices: list[int]) -> list[int]:
        """Known bad images by the next good ones."""
        if not self.flags.any():
            return list(indices)
        return [self._good(int(index)) for index in indices]

    def _good(self, index: int) -> int:
        while self.flags[index]:
            index = (index + 1) % self.count
        return index


def allowed(count: int, most: float) -> int:
    """`data.max_bad_images` as a number of images: a share below 1, of which at least one image; else a number."""
    return int(most) if most >= 1 or most == 0 else max(1, int(most * count))


def too_many(bad: int, of: str, most: float, error: str) -> TooManyBadImages:
    return TooManyBadImages(f"{bad} of {of} cannot be used, more than data.max_bad_images={most} allows: {error}")
