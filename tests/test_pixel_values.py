"""What values of files become, and what is said of what is lost: bits, pages, levels, images that are too large. Files
are written here; expected values come from the numbers that they were written with."""

import io
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import tiny_config
from pixel_files import KINDS, SIZE, levels, npy, pillow, ppm16, run_of, smooth, tiff
from test_own_data import TINY

from hf_mim import MIMForPreTraining
from hf_mim.cli import main
from hf_mim.doctor.checks import check_pixels, examine
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.decoding import Undecodable, kind_of, read_image
from hf_mim.training.data.pretraining import load_splits


FIXTURES = Path(__file__).parent / "fixtures" / "bits"


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


# ---- doctor ----------------------------------------------------------------------------------------------------------
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
