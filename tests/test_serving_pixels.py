"""What training decodes and what the saved image processor makes of the same file: the same within a level, for every
kind of file. Files are written here; expected values come from the numbers that they were written with."""

import io
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from helpers import tiny_config
from test_own_data import TINY
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline
from transformers.image_utils import load_image

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.conversion.export import export
from hf_mim.doctor.checks import check_pixels, examine
from hf_mim.modeling.encoder_base import to_grey
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.modeling.resizing import fit_whole, resized_shape
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.decoding import Undecodable, kind_of, read_image
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.processors import processor_for


SIZE = (20, 24)
FIXTURES = Path(__file__).parent / "fixtures" / "bits"
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, (24, 16)])
def test_training_pixels_are_serving_pixels(kind, size, tmp_path):
    files, config, splits, processor = run_of(kind, tmp_path, size)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(len(files))))["pixel_values"]
    served = prepared(processor, files, config)
    level = 1 / (255 * torch.tensor(config.image_std)[:, None, None])
    assert trained.shape == served.shape and ((trained - served) / level).abs().max() <= 1.01


# ---- values --------------------------------------------------------------------------------------------------------
def test_values_become_levels_of_the_range(tmp_path):
    """Against the numbers that the file was written with."""
    files, _, splits, _ = run_of("12 bits in a png", tmp_path, SIZE)
    for seed in range(len(files)):
        expected = np.clip(np.rint(levels(seed, top=4095, kind=np.uint16) * (255 / 4095)), 0, 255)
        assert np.abs(splits.train.without_augmentation()[seed].images[0, 0].numpy() - expected).max() <= 1
    assert splits.sample.levels[0] > 200 and splits.sample.warning is None


def test_missing_values_become_the_mean_and_are_counted(tmp_path):
    _, config, splits, processor = run_of("nodata", tmp_path, SIZE)
    whole = splits.train.without_augmentation()
    image = MIMCollator(config)([whole[0]])["pixel_values"][0]
    assert image[:, :4, :4].abs().max() <= 0.5 / 255 / min(config.image_std) + 1e-6  # 0 within half a level
    assert whole.missing_values() == {"images": 4, "share": pytest.approx(16 / (20 * 24), abs=1e-4)}
    assert "% are data.nodata and become the mean" in splits.sample.line
    assert all(low > -1000 for low, _ in splits.data.value_range) and processor.nodata == -9999


@pytest.mark.parametrize(
    "array, message",
    [
        (np.float32([[0, np.nan]]), r"holds float32 from 0.0 to 0.0 and NaN; .* set data.nodata"),
        (np.float32([[0, np.inf]]), r"and infinity; .* data.nodata"),
        (np.int16([[-9999, 5]]), r"holds int16 from -9999 to 5; say in data.value_range .* set data.nodata to it"),
        (np.float32([[0, 200]]), "holds float32 from 0.0 to 200.0; say in data.value_range"),
        (np.uint32([[0, 70000]]), "holds uint32 from 0 to 70000; say in data.value_range"),
        (np.complex64([[1j, 2]]), "use whole numbers or floats"),
    ],
)
def test_values_that_need_an_option_name_it(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as error:
        load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1))
    assert "\n" not in str(error.value)


def test_lost_levels_are_said(tmp_path):
    for seed in range(4):
        (tmp_path / f"{seed}.tif").write_bytes(tiff(levels(seed, top=235, kind=np.uint16)))
    sample = load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1)).sample
    assert sample.line.startswith("values: uint16 from 0 to 235 in 4 images looked at; 2 of 256 levels used")
    assert "warning: only 2 levels are left of" in sample.warning and "[0,235]" in sample.warning
    data = DataArguments(dataset=str(tmp_path), value_range="auto")
    assert load_splits(data, tiny_config(num_channels=1)).sample.warning is None
    few = DataArguments(dataset=str(tmp_path / "few"))
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.png").write_bytes(pillow(levels(0), "1"))
    assert load_splits(few, tiny_config(num_channels=1)).sample.warning is None  # two, and nothing lost


@pytest.mark.parametrize("top", [300, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_colours_of_a_ppm_keep_all_their_bits(top, plain):
    values = levels(0, 3, top, np.uint16)
    read, _ = read_image(ppm16(values, top, plain), 3)
    assert read.dtype == np.uint16 and np.abs(read - values * (65535 / top)).max() <= 0.5
    for broken in (ppm16(values, top, plain)[:-9], ppm16(values, values.max() - 20, plain)):
        with pytest.raises(Undecodable, match="cut short, or holds more than its highest value"):
            read_image({"bytes": broken, "path": "a.ppm"}, 3)


@pytest.mark.parametrize("file, bits", [("rgb16.jp2", 16), ("rgb10.avif", 10)])
def test_bits_that_pillow_drops_are_said(file, bits, tmp_path):
    shutil.copy(FIXTURES / file, tmp_path)
    sample = load_splits(DataArguments(dataset=str(tmp_path)), tiny_config()).sample
    assert f"of files with {bits} bits a channel" in sample.warning and "save them as PNG" in sample.warning
    for kind in ("jpeg 2000", "16-bit jpeg 2000", "avif"):
        assert kind_of(KINDS[kind][0](0)).lost_bits == 0


def test_pages_that_are_not_read_are_said(tmp_path):
    stack = levels(0, 5).transpose(2, 0, 1)
    frames = [PIL.Image.fromarray(page) for page in stack]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    warning = load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1)).sample.warning
    assert "files with 5 pages or frames, only the first is read" in warning and "model.num_channels=5" in warning
    assert load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=5)).sample.warning is None
    # smaller copies for quick display are no pages
    half = frames[0].resize((frames[0].width // 2, frames[0].height // 2))
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=[half])
    assert load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1)).sample.warning is None


@pytest.mark.parametrize("kind, mode", [("tif", "RGB"), ("webp", "RGB"), ("gif", "L")])
def test_frames_that_cannot_be_channels_are_said(kind, mode, tmp_path):
    """As many as the model has channels."""
    frames = [PIL.Image.fromarray(levels(seed, 3)).convert(mode) for seed in range(3)]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    splits = load_splits(DataArguments(dataset=str(tmp_path)), tiny_config())
    check = check_pixels(splits)
    assert check.seen == "of files with 3 pages or frames, only the first is read"
    assert check.remedy == "write a file for each"


def test_a_stream_is_looked_at_in_several_shards(tmp_path):
    """Sources often lie one after another: the first shards have 8-bit images here, the last ones 16 bits."""
    for seed in range(60):
        deep = seed >= 30
        array = levels(seed, top=4000, kind=np.uint16) if deep else levels(seed)
        (tmp_path / f"{seed:02}.png").write_bytes(pillow(array))
    sample = load_splits(DataArguments(dataset=str(tmp_path), streaming=True), tiny_config(num_channels=1)).sample
    assert sample.count == 48 and sample.values["uint8"] > 10 and sample.values["uint16"] > 10
    assert "in the first 48 images of 48 shards" in sample.line and "17 levels" in sample.warning


@pytest.mark.parametrize(
    "options, message",
    [
        ({"value_range": [5, 5]}, r"data.value_range must be a pair like \[0, 4000\], low before high"),
        ({"value_range": "automatic"}, "data.value_range must be a pair, one pair per channel, or auto"),
        ({"value_range": [0, 1, 2]}, "data.value_range must be a pair"),
        ({"nodata": "none"}, "data.nodata must be a number or nan"),
        ({"eval_crop": 1.5}, "data.eval_crop must be squeeze, none, or a share"),
        ({"display_bands": [1, 2]}, "data.display_bands must be one or three"),
        ({"max_pixels": 0}, "data.max_pixels must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


def test_a_range_for_other_channels_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", smooth(0, 3))
    data = DataArguments(dataset=str(tmp_path), value_range=[[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="data.value_range has 2 pairs for num_channels=3"):
        load_splits(data, tiny_config())


# ---- size ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending, content", [("npy", npy), ("tif", tiff), ("png", pillow)])
def test_images_beyond_the_limit_are_bad_ones_with_the_remedy(ending, content, tmp_path):
    for seed in range(30):
        (tmp_path / f"{seed:02}.{ending}").write_bytes(content(levels(seed)))
    (tmp_path / f"big.{ending}").write_bytes(content(levels(0, size=(40, 50))))
    data = {"dataset": str(tmp_path), "max_pixels": 1999}
    report = load_splits(DataArguments(**data), tiny_config(num_channels=1)).train.bad_images()
    assert report.count == 1 and "has 2,000 pixels, more than data.max_pixels=1999: raise it" in report.first
    allowed = load_splits(DataArguments(**{**data, "max_pixels": 2000}), tiny_config(num_channels=1)).train
    assert allowed.images is None and allowed.bad_images().count == 0


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**4, 10**4)})
    (tmp_path / "a.npy").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="cannot decode .*a.npy: it is cut short"):
        load_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1))


# ---- geometry ------------------------------------------------------------------------------------------------------
def test_the_whole_image_is_shrunk_and_cut_as_the_papers_do_it():
    assert resized_shape(300, 400, (224, 224), 0.875) == (256, 341)
    assert resized_shape(400, 300, (224, 224), 0.875) == (341, 256)
    assert resized_shape(100, 400, (96, 160), 1.0) == (96, 384) and resized_shape(400, 160, (96, 160), 1.0) == (
        400,
        160,
    )
    image = torch.from_numpy(levels(0, 3, size=(60, 80))).permute(2, 0, 1)
    pil = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    shrunk = np.array(pil.resize((48, 36), PIL.Image.Resampling.BICUBIC))[2:34, 8:40]  # 32 / 36 of the shorter side
    ours = fit_whole(image, (32, 32), 32 / 36).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - shrunk).max() <= 1
    assert fit_whole(image, (60, 80), 0.5) is image
    squeezed = np.array(pil.resize((32, 32), PIL.Image.Resampling.BICUBIC))
    assert np.abs(fit_whole(image, (32, 32), "squeeze").permute(1, 2, 0).numpy().astype(int) - squeezed).max() <= 1
    assert torch.equal(fit_whole(image, (32, 32), "none"), fit_whole(image, (32, 32), 1.0))


@pytest.mark.parametrize("eval_crop", ["squeeze", "none", 0.8, None])
@pytest.mark.parametrize("size", [16, (12, 20)])
def test_a_processor_of_any_crop(eval_crop, size, tmp_path):
    files, config, splits, processor = run_of("colours", tmp_path, size, eval_crop=eval_crop)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(4)))["pixel_values"]
    served = prepared(processor, files, config)
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)
    assert isinstance(processor, MIMImageProcessor) == (size != 16 and eval_crop != "squeeze")


def test_sizes_that_vary_around_the_models(tmp_path):
    (tmp_path / "images").mkdir()
    for seed, size in enumerate([(16, 16), (20, 24), (16, 30)]):
        (tmp_path / "images" / f"{seed}.png").write_bytes(pillow(levels(seed, 3, size=size)))
    config = tiny_config(image_size=16)
    splits = load_splits(DataArguments(dataset=str(tmp_path / "images")), config)
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__(range(3)))["pixel_values"]
    images = [load_image(str(tmp_path / "images" / f"{seed}.png")) for seed in range(3)]
    served = processor_for(config, splits.sample)(images, return_tensors="pt")["pixel_values"]
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)


# ---- what a checkpoint is saved with -------------------------------------------------------------------------------
def test_sizes_that_the_sample_missed_count_when_the_processor_is_saved(tmp_path):
    """One image among many has the model's size, which a stock processor would resize and crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(60):
        (folder / f"{seed:02}.png").write_bytes(pillow(levels(seed, 3)))
    config, data = tiny_config(image_size=16), DataArguments(dataset=str(folder), memory_limit_mb=0)
    splits = load_splits(data, config)
    assert type(processor_for(config, splits.sample_seen())) is ViTImageProcessor
    looked = np.random.default_rng((0, 18)).permutation(60)[:48]
    missed = next(i for i in range(60) if i not in looked)
    (folder / f"{missed:02}.png").write_bytes(pillow(levels(0, 3, size=(16, 16))))
    splits = load_splits(data, config)
    assert type(processor_for(config, splits.sample_seen())) is ViTImageProcessor
    splits.train.__getitems__(range(60))  # an epoch
    processor = processor_for(config, splits.sample_seen())
    assert isinstance(processor, MIMImageProcessor)
    files = [folder / f"{i:02}.png" for i in (missed, 0)]
    trained = MIMCollator(config)(splits.train.without_augmentation().__getitems__([missed, 0]))["pixel_values"]
    served = prepared(processor, files, config)
    assert (trained - served).abs().max() <= 1.01 / 255 / min(config.image_std)


def test_an_exported_encoder_keeps_the_processor_of_its_images(tmp_path):
    _, config, _, processor = run_of("10 bits", tmp_path)
    MIMModel(config).save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out", "transformers")
    kept = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(kept, MIMImageProcessor) and kept.value_range == processor.value_range is not None


def test_without_a_look_at_images_they_are_cropped_as_in_the_papers():
    processor = processor_for(tiny_config(image_size=224, encoder_config={"patch_size": 16}))
    assert type(processor) is ViTImageProcessor and processor.do_center_crop
    assert processor.size.shortest_edge == 256 and processor.crop_size.height == 224


def test_ordinary_checkpoints_have_a_stock_processor(tmp_path):
    *_, processor = run_of("jpeg", tmp_path)
    assert type(processor) is ViTImageProcessor and processor.do_center_crop
    assert processor.size.shortest_edge == 18 and processor.crop_size.height == 16


def test_ours_takes_arrays_and_images_too(tmp_path):
    files, _, _, processor = run_of("12 bits in a png", tmp_path)
    by_path = processor([str(file) for file in files], return_tensors="pt")["pixel_values"]
    images = processor([PIL.Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    arrays = processor([np.array(PIL.Image.open(file)) for file in files], return_tensors="pt")["pixel_values"]
    one = processor(files[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(by_path, images) and torch.equal(by_path, arrays) and torch.equal(one, by_path[:1])


REMOTE = """
import sys
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("hf_mim") for name in sys.modules)
print(processor(sys.argv[2], return_tensors="pt")["pixel_values"].double().sum().item())
"""


def test_ours_travels_as_code_and_works_in_a_pipeline(tmp_path):
    files, config, _, processor = run_of("16-bit png, three channels", tmp_path)
    MIMModel(config).save_pretrained(tmp_path / "model")
    expected = processor(str(files[0]), return_tensors="pt")["pixel_values"].double().sum().item()
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), str(files[0])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(out.stdout) == pytest.approx(expected, abs=1e-3)
    run = pipeline("image-feature-extraction", model=str(tmp_path / "model"))  # the plugin is imported: no trust asked
    assert isinstance(run.image_processor, MIMImageProcessor)
    assert torch.tensor(run(PIL.Image.fromarray(levels(0, 3)))).isfinite().all()


def test_doctor_speaks_of_lost_levels(tmp_path):
    (tmp_path / "images").mkdir()
    for seed in range(4):
        file = tmp_path / "images" / f"{seed}.tif"
        file.write_bytes(tiff(levels(seed, top=235, kind=np.uint16, size=(16, 16))))
    MIMForPreTraining(tiny_config(num_channels=1)).save_pretrained(tmp_path / "model")
    checks = {check.name: check for check in examine(str(tmp_path / "model"), DataArguments(str(tmp_path / "images")))}
    assert checks["pixels"].state == "fault" and "2 levels are left" in checks["pixels"].seen
    assert "data.value_range" in checks["pixels"].remedy


def test_dark_files_from_run_to_doctor(tmp_path, capsys):
    """8-bit microscopy kept in 16 bits: each command names the range and the remedy, which works."""
    for seed in range(40):
        file = tmp_path / "images" / "ab"[seed % 2] / f"{seed}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tiff(levels(seed, top=150 + 85 * (seed % 2), kind=np.uint16, size=(16, 16))))
    half, out = "[0.5]", tmp_path / "run"
    words = [f"data.dataset={tmp_path / 'images'}", *TINY, "model.num_channels=1"]
    words += [f"model.image_mean={half}", f"model.image_std={half}"]
    assert main(["pretrain", "quick", *words, f"training.output_dir={out}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "values: uint16 from 0 to 235 in 40 images looked at; 2 of 256 levels used" in printed
    assert (
        "warning: only 2 levels are left of" in printed
        and "data.value_range=auto, or to numbers such as [0,235]" in printed
    )
    assert "percent of 36 images are all but constant" in printed
    assert main(["doctor", str(out)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "pixels: set data.value_range=auto" in printed and f"data: {tmp_path / 'images'}, as in" in printed
    for check in ("loss", "better than untrained"):
        assert f" {check}: the pixels may be the cause; mend them first. Then: " in printed
    repaired = tmp_path / "repaired"
    assert main(["pretrain", "quick", *words, f"training.output_dir={repaired}", "data.value_range=[0,235]"]) == 0
    assert "levels are left" not in capsys.readouterr().out
    main(["doctor", str(repaired)])
    assert "only 2 levels" not in " ".join(capsys.readouterr().out.split())
