"""Files of every kind, made of known numbers, and what training and the saved image processor make of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile
import torch
from helpers import tiny_config
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from hf_mim.modeling.encoder_base import to_grey
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.processors import processor_for


SIZE = (20, 24)
TURNED = PIL.Image.Exif()
TURNED[0x0112] = 6


def smooth(seed: int, channels: int = 1, size=SIZE) -> np.ndarray:
    """(height, width[, channels]) floats in [0, 1], smooth, filling the range."""
    noise = np.random.default_rng(seed).random((5, 6, channels)).astype(np.float32)
    bands = [
        PIL.Image.fromarray(noise[..., i]).resize(size[::-1], PIL.Image.Resampling.BICUBIC) for i in range(channels)
    ]
    values = np.stack([np.array(band) for band in bands], axis=-1)
    values = (values - values.min()) / np.ptp(values)
    return values[..., 0] if channels == 1 else values


def levels(seed: int, channels: int = 1, top: int = 255, kind=np.uint8, size=SIZE) -> np.ndarray:
    return np.rint(smooth(seed, channels, size) * top).astype(kind)


def pillow(array, mode=None, kind="PNG", **options) -> bytes:
    image = PIL.Image.fromarray(array)
    image = image.convert(mode) if mode else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(array: np.ndarray) -> bytes:
    """PNG with 16 bits in each of several channels, which Pillow does not write."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ppm16(array: np.ndarray, top: int, plain: bool = False) -> bytes:
    """PPM of values up to `top`, with a comment in its header."""
    height, width, _ = array.shape
    head = b"%s\n# made here\n%d %d\n%d\n" % (b"P3" if plain else b"P6", width, height, top)
    return head + (" ".join(map(str, array.ravel())).encode() if plain else array.astype(">u2").tobytes())


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array, **options) -> bytes:
    file = io.BytesIO()
    planar = {"planarconfig": "contig"} if array.ndim == 3 and array.shape[2] < 10 else {}
    tifffile.imwrite(file, array, photometric="minisblack", **planar, **options)
    return file.getvalue()


def transparent(seed: int) -> np.ndarray:
    image = levels(seed, 4)
    image[:8, :8, 3] = 0
    return image


def with_nan(seed: int) -> np.ndarray:
    array = smooth(seed, 6)
    array[:4, :4, 2], array[5:7, 5:7, 1] = np.nan, np.inf
    return array


def with_nodata(seed: int) -> np.ndarray:
    array = levels(seed, 6, 6000, np.int16)
    array[:4, :4] = -9999
    return array


# name -> (file of a seed, ending, channels of the model, options of `data`)
KINDS = {
    "grey, several channels": (lambda s: pillow(levels(s)), "png", 3, {}),
    "colours, one channel": (lambda s: pillow(levels(s, 3)), "png", 1, {}),
    "black and white": (lambda s: pillow(levels(s), "1"), "png", 1, {}),
    "palette, one channel": (lambda s: pillow(levels(s, 3), "P"), "png", 1, {}),
    "colours": (lambda s: pillow(levels(s, 3)), "png", 3, {}),
    "jpeg": (lambda s: pillow(levels(s, 3), kind="JPEG"), "jpg", 3, {}),
    "grey jpeg": (lambda s: pillow(levels(s), kind="JPEG"), "jpg", 1, {}),
    "cmyk": (lambda s: pillow(levels(s, 3), "CMYK", "JPEG"), "jpg", 3, {}),
    "palette": (lambda s: pillow(levels(s, 3), "P"), "png", 3, {}),
    "palette with transparency": (lambda s: pillow(levels(s), "P", transparency=3), "png", 3, {}),
    "transparency dropped": (lambda s: pillow(transparent(s)), "png", 3, {}),
    "transparency kept": (lambda s: pillow(transparent(s)), "png", 4, {}),
    "grey with transparency": (lambda s: pillow(levels(s), "LA"), "png", 1, {}),
    "grey with transparency kept": (lambda s: pillow(levels(s), "LA"), "png", 2, {}),
    "16-bit png": (lambda s: pillow(levels(s, top=65535, kind=np.uint16)), "png", 1, {}),
    "16-bit png, three channels": (lambda s: pillow(levels(s, top=65535, kind=np.uint16)), "png", 3, {}),
    "16-bit colours": (lambda s: png16(levels(s, 3, 65535, np.uint16)), "png", 3, {}),
    "16-bit colours, one channel": (lambda s: png16(levels(s, 3, 65535, np.uint16)), "png", 1, {}),
    "16-bit transparency": (lambda s: png16(levels(s, 4, 65535, np.uint16)), "png", 4, {}),
    "12 bits in a png": (lambda s: pillow(levels(s, top=4095, kind=np.uint16)), "png", 1, {"value_range": [0, 4095]}),
    "12-bit colours": (lambda s: png16(levels(s, 3, 4095, np.uint16)), "png", 3, {"value_range": "auto"}),
    "10 bits": (lambda s: tiff(levels(s, top=1023, kind=np.uint16)), "tif", 1, {"value_range": "auto"}),
    "big-endian": (lambda s: tiff(levels(s, top=4000, kind=">u2"), byteorder=">"), "tif", 1, {"value_range": "auto"}),
    "predictor": (
        lambda s: tiff(levels(s, top=900, kind=np.uint16), compression="zlib", predictor=True),
        "tif",
        1,
        {"value_range": "auto"},
    ),
    "float tiff": (lambda s: tiff(smooth(s)), "tif", 1, {}),
    "float tiff in another range": (lambda s: tiff(smooth(s) * 7 - 3), "tif", 1, {"value_range": [-3, 4]}),
    "16-bit tiff of three channels": (lambda s: tiff(levels(s, 3, 3000, np.uint16)), "tif", 3, {"value_range": "auto"}),
    "six bands": (lambda s: tiff(levels(s, 6, 9000, np.uint16)), "tif", 6, {"value_range": "auto"}),
    "pages": (lambda s: tiff(levels(s, 5).transpose(2, 0, 1)), "tif", 5, {}),
    "turned tiff of six bands": (lambda s: tiff(levels(s, 6), extratags=[(274, "H", 1, 6, True)]), "tif", 6, {}),
    "npy, grey": (lambda s: npy(levels(s)), "npy", 3, {}),
    "npy, channels first": (lambda s: npy(levels(s, 5).transpose(2, 0, 1)), "npy", 5, {}),
    "npy, bool": (lambda s: npy(smooth(s) > 0.5), "npy", 1, {}),
    "npy, int8": (lambda s: npy(levels(s, top=127, kind=np.int8)), "npy", 1, {}),
    "npy, int16": (lambda s: npy(levels(s, 6, 9000, np.int16)), "npy", 6, {"value_range": "auto"}),
    "npy, int64": (lambda s: npy(levels(s, 3, 255, np.int64)), "npy", 3, {"value_range": [0, 255]}),
    "npy, uint32": (lambda s: npy(levels(s, 1, 10**6, np.uint32)), "npy", 1, {"value_range": "auto"}),
    "npy, float16": (lambda s: npy(smooth(s, 3).astype(np.float16)), "npy", 3, {}),
    "npy, float64 in decibels": (
        lambda s: npy(smooth(s, 2).astype(np.float64) * 30 - 25),
        "npy",
        2,
        {"value_range": "auto"},
    ),
    "one range per channel": (
        lambda s: npy(smooth(s, 3) * np.float32([1, 10, 100])),
        "npy",
        3,
        {"value_range": [[0, 1], [0, 10], [0, 100]]},
    ),
    "NaN and infinity": (lambda s: npy(with_nan(s)), "npy", 6, {"nodata": "nan"}),
    "nodata": (lambda s: npy(with_nodata(s)), "npy", 6, {"nodata": -9999, "value_range": "auto"}),
    "gif": (lambda s: pillow(levels(s), kind="GIF"), "gif", 1, {}),
    "bmp": (lambda s: pillow(levels(s, 3), kind="BMP"), "bmp", 3, {}),
    "webp with transparency": (lambda s: pillow(transparent(s), kind="WEBP", lossless=True), "webp", 3, {}),
    "avif": (lambda s: pillow(levels(s, 3), kind="AVIF"), "avif", 3, {}),
    "jpeg 2000": (lambda s: pillow(levels(s, 3), kind="JPEG2000"), "jp2", 3, {}),
    "16-bit jpeg 2000": (lambda s: pillow(levels(s, top=65535, kind=np.uint16), kind="JPEG2000"), "jp2", 1, {}),
    "pgm": (lambda s: pillow(levels(s), kind="PPM"), "pgm", 1, {}),
    "ppm": (lambda s: pillow(levels(s, 3), kind="PPM"), "ppm", 3, {}),
    "16-bit ppm": (lambda s: ppm16(levels(s, 3, 65535, np.uint16), 65535), "ppm", 3, {}),
    "16-bit ppm, one channel": (lambda s: ppm16(levels(s, 3, 4095, np.uint16), 4095), "ppm", 1, {}),
    "turned png": (lambda s: pillow(levels(s, 3), exif=TURNED), "png", 3, {}),
    "turned jpeg": (lambda s: pillow(levels(s, 3), kind="JPEG", exif=TURNED), "jpg", 3, {}),
    "turned webp": (lambda s: pillow(levels(s, 3), kind="WEBP", lossless=True, exif=TURNED), "webp", 3, {}),
    "turned tiff": (lambda s: pillow(levels(s, 3), kind="TIFF", exif=TURNED), "tif", 3, {}),
    "turned 16-bit png": (lambda s: pillow(levels(s, top=65535, kind=np.uint16), exif=TURNED), "png", 1, {}),
    "constant": (lambda s: npy(np.full(SIZE, 1000 + s, np.uint16)), "npy", 1, {"value_range": "auto"}),
}


def run_of(kind: str, folder: Path, size=16, **options):
    """-> files, config, data set of the training images, whole, and the image processor, saved and loaded again."""
    make, ending, channels, chosen = KINDS[kind]
    files = [folder / "images" / f"{seed}.{ending}" for seed in range(4)]
    (folder / "images").mkdir()
    for seed, file in enumerate(files):
        file.write_bytes(make(seed))
    config = tiny_config(image_size=size, num_channels=channels)
    splits = load_splits(DataArguments(dataset=str(folder / "images"), **chosen, **options), config)
    for name in ("value_range", "nodata", "eval_crop"):  # as `TrainingRun.keep_pixels` does it
        setattr(config, name, getattr(splits.data, name))
    processor_for(config, splits.sample).save_pretrained(folder / "model")
    return files, config, splits, AutoImageProcessor.from_pretrained(folder / "model")


def prepared(processor, files: list[Path], config) -> torch.Tensor:
    """What the model's card says: paths, for the processor of this project, else upright images."""
    if isinstance(processor, MIMImageProcessor):
        return processor([str(file) for file in files], return_tensors="pt")["pixel_values"]
    keep = config.num_channels == 4
    images = [PIL.Image.open(file) if keep else load_image(str(file)) for file in files]
    return to_grey(processor(images, return_tensors="pt")["pixel_values"], config.num_channels)
