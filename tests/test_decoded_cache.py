"""The decoded cache: the pixels of the files, whatever interrupts its making."""

import io
import pickle

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from hf_mim import MIMConfig
from hf_mim.training.data import decoded_cache, mapped_file
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.decoded_cache import DecodedCache
from hf_mim.training.data.decoding import decode
from hf_mim.training.data.images import MIMDataset


SIZES = [(40, 52), (36, 36), (70, 33), (41, 60), (38, 45)]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (3, *size), dtype=np.uint8) for size in SIZES]


def make(folder, images, read=None, **options) -> DecodedCache:
    options = {"num_channels": 3, "report": lambda text: None, **options}
    return DecodedCache(folder, "print", len(images), read or images.__getitem__, **options)


def check(cache, images):
    assert len(cache) == len(images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(cache[index].numpy(), image)


def test_holds_the_pixels_and_reads_no_file_again(tmp_path, images):
    said = []
    check(make(tmp_path, images, report=said.append), images)
    assert len(said) == 1 and "5 of 5 images" in said[0] and "GB are free" in said[0]
    again = make(tmp_path, images, read=pytest.fail, report=pytest.fail)
    check(again, images)
    check(pickle.loads(pickle.dumps(again)), images)


@pytest.mark.parametrize("torn", [0, 7])
def test_goes_on_after_an_interruption(tmp_path, images, monkeypatch, torn):
    """Also where half an image and half a row were left behind."""
    monkeypatch.setattr(decoded_cache, "FLUSH", 2)
    monkeypatch.setattr(decoded_cache, "SAMPLE", 1)  # looks at the first image only

    def breaks(index):
        if index == 3:
            raise KeyboardInterrupt
        return images[index]

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, images, read=breaks)
    for file in (*tmp_path.glob("*.pixels"), *tmp_path.glob("*.table")):
        with open(file, "ab") as end:
            end.write(b"x" * torn)
    asked = []
    check(make(tmp_path, images, read=lambda index: asked.append(index) or images[index]), images)
    assert asked == [0, 2, 3, 4]  # 0 for the estimate


def test_another_data_set_or_size_is_another_file(tmp_path, images):
    make(tmp_path, images)
    DecodedCache(tmp_path, "other", 5, images.__getitem__, 3, report=lambda text: None)
    small = make(tmp_path, images, short_side=36)
    assert len(list(tmp_path.glob("*.pixels"))) == 3
    assert [tuple(small[index].shape[1:]) for index in range(5)] == [(36, 47), (36, 36), (70, 33), (36, 53), (36, 43)]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, images, monkeypatch):
    usage = mapped_file.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(mapped_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"do not fit .*data\.cache_size"):
        make(tmp_path, images)
    assert not list(tmp_path.glob("*.pixels"))


def jpegs(images) -> datasets.Dataset:
    files = []
    for image in images:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": files}, features=features)


@pytest.mark.parametrize("crop_scale", [None, [0.2, 1.0]])
def test_training_sees_the_same_pixels_with_and_without(tmp_path, images, crop_scale):
    config, dataset = MIMConfig(image_size=32), jpegs(images)
    options = {"crop_scale": crop_scale, "memory_limit_mb": 0}
    plain = MIMDataset(dataset, config, DataArguments(**options))
    cached = MIMDataset(dataset, config, DataArguments(**options, cache_decoded=True, cache_dir=str(tmp_path)))
    assert plain.cache is None and cached.cache is not None
    for epoch in range(3):
        plain.set_epoch(epoch), cached.set_epoch(epoch)
        (wanted,), (found,) = plain.__getitems__([3, 0, 4]), cached.__getitems__([3, 0, 4])
        assert torch.equal(found.images, wanted.images)


def test_jpegs_are_decoded_as_pil_does_it(images):
    """The fast way for JPEGs: same pixels, upright, and an error where a file is cut short."""
    image = PIL.Image.fromarray(np.kron(images[0], np.ones((1, 8, 8), np.uint8)).transpose(1, 2, 0))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for options in ({}, {"exif": exif}):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        wanted = np.array(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(buffer.getvalue()))))
        np.testing.assert_array_equal(decode(buffer.getvalue(), 3), wanted.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="cannot decode"):
        decode(buffer.getvalue()[:2000], 3)
