"""Every form of data: shards, streams, arrays, deep and transparent images, and files that cannot be decoded."""

import io
import itertools
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from rich.console import Console
from test_data import config, folder, picture, rows
from test_pretrain import TINY

from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import TooManyBadImages, allowed
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.decoding import decode, is_plain_jpeg, read_image
from hf_mim.training.data.pretraining import load_splits


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def shard(path, numbers, names=("png", "cls")):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            for name, content in zip(names, (png(picture(i)), str(i % 3).encode())):
                entry = tarfile.TarInfo(f"{i:04}.{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def forms(tmp_path):
    """The same 12 images as shards, as parquet files and as a folder."""
    for name in ("shards", "parquet"):
        (tmp_path / name).mkdir()
    for part, numbers in enumerate((range(5), range(5, 12))):
        shard(tmp_path / "shards" / f"train-{part:05}.tar", numbers)
        rows().select(numbers).to_parquet(tmp_path / "parquet" / f"train-{part}.parquet")
    folder(tmp_path / "folder", [f"a/b/{i:02}.png" for i in range(12)])
    return tmp_path


@pytest.mark.parametrize("form", ["shards", "parquet", "folder"])
def test_every_form_gives_the_same_images_streamed_or_not(forms, form):
    collate, seen = MIMCollator(config(), (2, 2)), []
    for streamed in (False, True):
        data = DataArguments(
            dataset=str(forms / form),
            streaming=streamed,
            shuffle_buffer=0,
            max_eval_images=0,
            crop_scale=[0.3, 1.0],
            memory_limit_mb=0,
        )
        train = load_splits(data, config(), seed=4).train
        fetched = list(itertools.islice(train, 12)) if streamed else train.__getitems__(range(len(train)))
        seen.append(collate(fetched))
    assert len(seen[0]["pixel_values"]) == 12
    assert torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"])
    assert torch.equal(seen[0]["bool_masked_pos"], seen[1]["bool_masked_pos"])


def test_shards_have_labels_and_splits(tmp_path):
    shard(tmp_path / "train-0.tar", range(6))
    shard(tmp_path / "val-0.tar", range(3))
    splits = load_splits(DataArguments(dataset=str(tmp_path)), config())
    assert (len(splits.train), len(splits.test), splits.note) == (6, 3, "split val")
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    one = load_splits(DataArguments(dataset=str(tmp_path / "val-0.tar")), config())
    assert len(one.train) == 3
    (tmp_path / "bad.tar").write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match="cannot read .*bad.tar as webdataset"):
        load_splits(DataArguments(dataset=str(tmp_path)), config())


# ---- pixels --------------------------------------------------------------------------------------------------------
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 65535], [128 * 257, 1000, 300]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    PIL.Image.fromarray(values).save(tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", values)
    PIL.Image.fromarray(values.astype(np.int32)).save(tmp_path / "b.tif")
    for name in ("a.png", "a.tif", "a.npy", "b.tif"):
        pixels = decode(str(tmp_path / name), 3)
        assert pixels.shape == (3, 2, 3) and (pixels == expected).all(), name
    colours = np.stack([values, values[::-1], values // 2], axis=-1)
    tifffile.imwrite(tmp_path / "c.tif", colours, photometric="rgb")
    given = decode(str(tmp_path / "c.tif"), 3).astype(int)  # Pillow takes the upper byte of 16-bit colours
    assert np.abs(given - np.rint(colours / 257).transpose(2, 0, 1)).max() <= 1


def test_transparency_is_dropped_unless_the_config_has_a_channel_for_it():
    clear = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    image = PIL.Image.fromarray(clear)
    assert (decode({"bytes": png(image)}, 3) == clear[..., :3].transpose(2, 0, 1)).all()
    assert (decode({"bytes": png(image)}, 4) == clear.transpose(2, 0, 1)).all()
    grey = PIL.Image.fromarray(clear[..., :2])
    assert grey.mode == "LA" and (decode(grey, 2) == clear[..., :2].transpose(2, 0, 1)).all()
    assert (decode(grey, 1)[0] == clear[..., 0]).all()
    with pytest.raises(ValueError, match="3 channels, but the model is configured for num_channels=4"):
        decode(image.convert("RGB"), 4)


def test_palette_images_of_every_kind():
    palette = picture(0).quantize(16)
    colours = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert (decode(palette, 3) == colours).all()
    palette.info["transparency"] = 0
    assert decode(palette, 4)[3].min() == 0 and decode(palette, 4)[3].max() == 255


@pytest.mark.parametrize("channels", [2, 5, 7])
def test_arrays_of_any_number_of_channels(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (9, 8, channels), dtype=np.uint8)
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", array.transpose(2, 0, 1))
    np.save(tmp_path / "share.npy", (array / 255).astype(np.float32))
    tifffile.imwrite(tmp_path / "last.tif", array, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "pages.tiff", array.transpose(2, 0, 1), photometric="minisblack")
    for file in tmp_path.iterdir():
        assert (decode(str(file), channels) == array.transpose(2, 0, 1)).all(), file.name
    splits = load_splits(DataArguments(dataset=str(tmp_path)), config(16, channels))
    assert splits.train[0].images.shape == (1, channels, 16, 16) and len(splits.train) == 5
    with pytest.raises(ValueError, match=f"has {channels} channels, but .* num_channels=3"):
        decode(str(tmp_path / "last.npy"), 3)


def test_three_grey_pages_are_three_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert (decode(str(tmp_path / "a.tif"), 3) == array).all()
    assert (decode(str(tmp_path / "a.tif"), 1) == array[:1]).all()


# ---- files that cannot be decoded ----------------------------------------------------------------------------------
def broken(root, count=30, bad=(4, 5, 29), labels=False) -> str:
    names = [f"{'ab'[i % 2]}/{i:02}.png" if labels else f"{i:02}.png" for i in range(count)]
    folder(root, names)
    for i in bad:
        (root / names[i]).write_bytes((root / names[i]).read_bytes()[:90])
    return str(root)


@pytest.mark.parametrize("limit", [64, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_good_one(tmp_path, limit, workers):
    data = DataArguments(dataset=broken(tmp_path), max_bad_images=3, memory_limit_mb=limit, horizontal_flip=False)
    train = load_splits(data, config()).train
    loader = torch.utils.data.DataLoader(train, 5, collate_fn=MIMCollator(config(), (2, 2)), num_workers=workers)
    batches = list(loader)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    masks = torch.cat([batch["bool_masked_pos"] for batch in batches])
    assert (
        torch.equal(pixels[4], pixels[6]) and torch.equal(pixels[5], pixels[6]) and torch.equal(pixels[29], pixels[0])
    )
    assert not torch.equal(pixels[6], pixels[7]) and len({tuple(m.tolist()) for m in masks}) > 1
    report = train.bad_images()  # found by the workers, known here
    assert report.count == 3 and "04.png" in report.first


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_the_run_in_one_line(tmp_path, workers):
    data = DataArguments(dataset=broken(tmp_path), max_bad_images=2, memory_limit_mb=0)
    train = load_splits(data, config()).train
    with pytest.raises(TooManyBadImages) as caught:
        list(torch.utils.data.DataLoader(train, 5, collate_fn=MIMCollator(config()), num_workers=workers))
    message = str(caught.value)
    assert message.startswith("3 of 30 images cannot be used, more than data.max_bad_images=2") and "\n" not in message
    assert "04.png" in message
    with pytest.raises(TooManyBadImages, match="12 of 12|1 of 12"):
        load_splits(DataArguments(dataset=broken(tmp_path / "all", 12, range(12)), max_bad_images=100), config())


def test_the_limit_is_a_share_or_a_number():
    assert [allowed(1000, most) for most in (0, 0.01, 0.5, 1, 20)] == [0, 10, 500, 1, 20]
    assert allowed(10, 0.01) == 1


def test_the_labels_are_those_of_what_is_shown(tmp_path):
    data = DataArguments(dataset=broken(tmp_path, labels=True, bad=(4,)), max_bad_images=3, memory_limit_mb=0)
    table = load_splits(data, config()).train
    list(table.__getitems__(range(len(table))))
    bad = table.bad.flags.nonzero().flatten().tolist()
    for index in bad:
        assert table.true_labels([index]) == table.labels[index + 1]
    assert torch.equal(
        table.true_labels([i for i in range(len(table)) if i not in bad]), table.labels[~table.bad.flags]
    )


def test_a_run_reports_what_it_skipped(tmp_path):
    images = broken(tmp_path / "images", 30, (7,))
    out = io.StringIO()
    overrides = [*TINY, f"data.dataset={images}", f"training.output_dir={tmp_path / 'run'}"]
    pretrain("quick", overrides, Console(file=out, width=300))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["bad_images"]
    assert found["count"] == 1 and "07.png" in found["first"]
    assert "skipped 1 image that cannot be used; the first: cannot decode" in out.getvalue()


def jpeg(mode: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels[..., :3]).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_only_plain_jpegs_take_the_short_way():
    plain = jpeg("RGB")
    assert all(
        is_plain_jpeg(jpeg("RGB", **options)) for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0abc"})
    )
    assert not any(
        is_plain_jpeg(file) for file in (jpeg("L"), jpeg("CMYK"), plain[:10], b"", b"\xff\xd8" * 9, plain[2:])
    )
    assert not is_plain_jpeg(plain, 24 * 40 // 2 - 1)  # a bomb, for all that is known
    with pytest.raises(ValueError, match=r"has 960 pixels, more than data.max_pixels=479"):
        read_image(plain, 3, 24 * 40 // 2 - 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_of_pillow(mode):
    file = jpeg(mode, quality=90)
    reference = np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB")).transpose(2, 0, 1).astype(int)
    assert np.abs(decode(file, 3) - reference).max() <= 1
