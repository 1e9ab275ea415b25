"""Masks whose values are no class ids: refused with the remedy, or mapped by `data.mask_values`."""

import io

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from helpers import png, tiny_config

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.masked import load_masked_splits
from hf_mim.training.data.masks import IGNORE, BadMask, decode_mask


def circle(i: int, values=(0, 1)) -> np.ndarray:
    """A disc of the last value with a bar of the middle one, on the first: (32, 32), uint8."""
    image = PIL.Image.new("L", (32, 32), values[0])
    draw = PIL.ImageDraw.Draw(image)
    draw.ellipse((4 + i % 5, 4, 20 + i % 5, 20), fill=values[-1])
    draw.rectangle((2, 24, 29, 30), fill=values[len(values) // 2])
    return np.array(image)


def encoded(mask: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(mask).save(file, kind, **options)
    return file.getvalue()


def write(root, masks: list[bytes], ending: str = "png") -> str:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(masks):
        (root / "images" / f"{i:02}.png").write_bytes(png(np.full((32, 32, 3), 5 * i, dtype=np.uint8)))
        (root / "masks" / f"{i:02}.{ending}").write_bytes(mask)
    return str(root)


def load(place: str, classes=None, **data):
    return load_masked_splits(DataArguments(dataset=place, **data), tiny_config(), classes)


VALUES = (0, 128, 255)


def smooth(i: int) -> bytes:
    """A mask that was resized with interpolation."""
    large = PIL.Image.fromarray(circle(i, VALUES)).resize((128, 128), PIL.Image.Resampling.NEAREST)
    return encoded(np.array(large.rotate(10 + i).resize((32, 32), PIL.Image.Resampling.BICUBIC)))


def colours(i: int) -> bytes:
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[[128, 255]] = [[255, 0, 0], [0, 0, 255]]
    return encoded(palette[circle(i, VALUES)])


KINDS = {
    "jpeg": (lambda i: encoded(circle(i, VALUES), "JPEG", quality=75), "jpg", "lossy JPEG file.*data.mask_values"),
    "jpeg as png": (
        lambda i: encoded(np.array(PIL.Image.open(io.BytesIO(encoded(circle(i, VALUES), "JPEG", quality=75))))),
        "png",
        "most of them on edges only|no training mask has a pixel of id",
    ),
    "anti-aliased": (smooth, "png", "most of them on edges only|no training mask has a pixel of id"),
    "colours": (colours, "png", r"colours and no class ids.*\[0,0,0\].*\[255,0,0\]"),
    "0 and 255": (lambda i: encoded(circle(i, (0, 255))), "png", r"one class only.*data.mask_values=\[0,255\]"),
    "0, 100, 200": (
        lambda i: encoded(circle(i, (0, 100, 200))),
        "png",
        r"no training mask has a pixel of id 1, 2.*hold 0, 100, 200.*data.mask_values",
    ),
}


@pytest.mark.parametrize("make, ending, message", KINDS.values(), ids=KINDS)
def test_values_that_are_no_ids_are_refused_with_the_remedy(tmp_path, make, ending, message):
    place = write(tmp_path, [make(i) for i in range(10)], ending)
    with pytest.raises(DataError, match=message) as caught:
        load(place)
    assert "\n" not in str(caught.value)


def test_a_suggestion_for_a_lossy_mask_names_what_was_drawn(tmp_path):
    with pytest.raises(BadMask, match=r"such as \[\d+, 12\d, 2[45]\d\]") as caught:
        load(write(tmp_path, [encoded(circle(i, VALUES), "JPEG", quality=90) for i in range(4)], "jpg"))
    assert int(str(caught.value).rpartition("[")[2].partition(",")[0]) < 8


@pytest.mark.parametrize("kind", ["jpeg", "jpeg as png", "anti-aliased", "colours"])
def test_values_are_mapped_where_the_option_says_so(tmp_path, kind):
    make, ending, _ = KINDS[kind]
    place = write(tmp_path, [make(i) for i in range(10)], ending)
    values = [[0, 0, 0], [255, 0, 0], [0, 0, 255]] if kind == "colours" else list(VALUES)
    splits = load(place, mask_values=values)
    assert len(splits.classes) == 3 and (splits.shares > 0.05).all()
    if kind != "anti-aliased":  # those were turned
        expected = [circle(i, (0, 1, 2)) for i in range(10)]
        for split in (splits.train, splits.validation, splits.test):
            for i in range(len(split)):
                _, ids = split[i]
                same = [(ids == mask).mean() for mask in expected]
                assert max(same) > (0.999 if kind == "colours" else 0.97)


def test_mapping_by_hand():
    pixels = np.array([[0, 20, 60, 110], [125, 190, 201, 255]], dtype=np.uint8)
    # Halfway between two values is 50: 60 is 40 from 100, and 255 is 55 from 200, which makes it no class.
    expected = [[0, 0, 1, 1], [1, 2, 2, IGNORE]]
    assert decode_mask(encoded(pixels), mask_values=[0, 100, 200]).tolist() == expected
    palette = PIL.Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_mask(palette).tolist() == [[0, 1]]
    assert decode_mask(palette, mask_values=[[255, 0, 0], [0, 0, 0]]).tolist() == [[1, 0]]
    assert decode_mask(np.array([[0.0, 3.0]])).tolist() == [[0, 3]]
    with pytest.raises(BadMask, match="holds colours, and data.mask_values grey values"):
        decode_mask(encoded(np.array([[[1, 2, 3]]], dtype=np.uint8)), mask_values=[0, 1])


@pytest.mark.parametrize("values", [[], [3], [0, [1, 2, 3]], [[0, 0], [1, 1]], [0, 0], ["a", "b"]])
def test_mask_values_are_checked(values):
    with pytest.raises(ValueError, match="data.mask_values must be"):
        DataArguments(mask_values=values)


def test_many_true_classes_are_no_edges(tmp_path):
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    assert len(load(write(tmp_path, [encoded(ids) for _ in range(5)])).classes) == 64


def test_a_class_without_a_training_pixel_is_an_error_unless_it_is_named(tmp_path):
    place = write(tmp_path, [encoded(circle(i, (0, 2, 3))) for i in range(10)])
    with pytest.raises(DataError, match="no training mask has a pixel of id 1 .they hold 0, 2, 3.: name all classes"):
        load(place)
    splits = load(place, ["sky", "sea", "boat", "sun"])
    assert splits.shares[1] == 0 and any("no pixel of 1 classes: sea" in line for line in splits.report)
    with pytest.raises(DataError, match="no training mask has a pixel of id 2, 3"):
        load(write(tmp_path / "b", [encoded(circle(i)) for i in range(9)]), mask_values=[0, 1, 9, 20])


def test_parts_keep_the_classes(tmp_path):
    masks = [circle(i) for i in range(40)]
    masks[5][:4, :4] = 2  # in one image only
    for i in (8, 30):
        masks[i][:4, :4] = 3
    place = write(tmp_path, [encoded(mask) for mask in masks])
    splits = load(place)
    assert (splits.shares > 0).all() and len(splits.train) == 32
    for seed in range(5):
        few = load_masked_splits(DataArguments(dataset=place, max_train_images=4), tiny_config(), seed=seed)
        assert len(few.train) == 4 and (few.shares > 0).all()
