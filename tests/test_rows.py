"""Rows that are not what they should be: named, counted and replaced, or refused in one line; streamed or not."""

import io
import itertools
import json
import re
import tarfile

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from test_data import config, picture

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import TooManyBadImages
from hf_mim.training.data.pairs import open_pairs
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.data.tars import BadTar


STREAMED = pytest.mark.parametrize("streaming", [False, True])
COUNT = 30


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    if kind == "NPY":
        np.save(file, np.asarray(picture(number)))
    else:
        picture(number).save(file, kind)
    return file.getvalue()


def parquet(path, images: list, kind=None):
    """A parquet file without the type of `datasets`, as other programs write them."""
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(images, kind)}), path)
    return path


def tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def images_of(place, streaming: bool, **data):
    data = {"max_bad_images": 5, "horizontal_flip": False, "shuffle_buffer": 0, **data}
    return load_splits(DataArguments(dataset=str(place), streaming=streaming, **data), config()).train


def read(images, count: int = COUNT) -> int:
    """How many images come; of a stream the first `count`."""
    if isinstance(images, datasets.Dataset) or hasattr(images, "__len__"):
        return sum(len(batch.images) for batch in images.__getitems__(list(range(len(images)))))
    return sum(len(batch.images) for batch in itertools.islice(images, count))


# ---- parquet -------------------------------------------------------------------------------------------------------
STRUCT = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
BAD_ROWS = {
    "null": (None, STRUCT, "row 7.* is missing"),
    "null inside": ({"bytes": None, "path": None}, STRUCT, "row 7.* is missing"),
    "empty": ({"bytes": b"", "path": None}, STRUCT, "row 7.* is missing"),
    "no image": ({"bytes": b"some text", "path": None}, STRUCT, "row 7.* is not a recognised image"),
    "a file that is not there": ({"bytes": None, "path": "nowhere/a.png"}, STRUCT, "nowhere/a.png"),
    "null bytes": (None, pyarrow.binary(), "row 7.* is missing"),
    "text bytes": (b"some text", pyarrow.binary(), "row 7.* is not a recognised image"),
}


@STREAMED
@pytest.mark.parametrize("value, kind, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_without_an_image_is_a_bad_image(tmp_path, value, kind, message, streaming):
    good = [encoded(i) for i in range(COUNT)]
    rows = good if kind == pyarrow.binary() else [{"bytes": file, "path": None} for file in good]
    rows[7] = value
    place = parquet(tmp_path / "train.parquet", rows, kind)
    images = images_of(place, streaming)
    assert read(images) == COUNT
    report = images.bad_images()
    assert report.count == 1
    assert report.first is not None and re.search(message, report.first)
    with pytest.raises(TooManyBadImages, match=message):
        read(images_of(place, streaming, max_bad_images=0), 2 * COUNT)


@STREAMED
def test_every_missing_row_counts(tmp_path, streaming):
    rows = [None if i in (3, 4, 20) else {"bytes": encoded(i), "path": None} for i in range(COUNT)]
    place = parquet(tmp_path / "train.parquet", rows, STRUCT)
    images = images_of(place, streaming)
    read(images)
    assert images.bad_images().count == 3
    with pytest.raises(TooManyBadImages, match="3 of"):
        read(images_of(place, streaming, max_bad_images=2), 2 * COUNT)


@STREAMED
@pytest.mark.parametrize("inner, named", [("images", True), ("images", False), ("numbers", True)])
def test_a_column_of_lists_is_refused(tmp_path, streaming, inner, named):
    values = [[encoded(0)] * 2 if inner == "images" else [1, 2]] * 3
    place = parquet(tmp_path / "train.parquet", values)
    message = (
        f"column 'image' holds lists of {inner if named and inner == 'images' else '.*'}; one image a row .* Write"
    )
    with pytest.raises(DataError, match=message):
        images_of(place, streaming, image_column="image" if named else None)


@STREAMED
def test_texts_are_paths(tmp_path, streaming):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    texts = [str(tmp_path / f"{i % 4}.png") for i in range(COUNT)]
    texts[7] = "a description"
    place = parquet(tmp_path / "train.parquet", texts)
    images = images_of(place, streaming, image_column="image")
    assert read(images) == COUNT and images.bad_images().count == 1
    assert "a description" in images.bad_images().first


# ---- tars ----------------------------------------------------------------------------------------------------------
@STREAMED
@pytest.mark.parametrize("kinds", [("jpg", "png"), ("png", "NPY"), ("PNG", "jpeg"), ("webp", "jpg")])
def test_kinds_of_files_may_change_in_the_middle(tmp_path, kinds, streaming):
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "npy": "NPY"}
    names = [kinds[i >= COUNT // 2] for i in range(COUNT)]
    place = tar(
        tmp_path / "a.tar",
        [(f"{i:04}.{name.lower()}", encoded(i, formats[name.lower()])) for i, name in enumerate(names)],
    )
    images = images_of(place, streaming)
    assert read(images) == COUNT and images.bad_images().count == 0


@STREAMED
def test_a_sample_without_its_image_is_a_bad_image(tmp_path, streaming):
    members = [
        (f"{i:04}.{end}", content) for i in range(COUNT) for end, content in (("png", encoded(i)), ("cls", b"1"))
    ]
    place = tar(tmp_path / "a.tar", [member for member in members if member[0] != "0011.png"])
    images = images_of(place, streaming)
    assert read(images) == COUNT
    report = images.bad_images()
    assert report.count == 1 and "0011.png (missing) in" in report.first


APART = [*[(f"{i:04}.png", encoded(i)) for i in range(9)], *[(f"{i:04}.cls", b"1") for i in range(9)]]
DOTS = [(f"shot.2021.{i:04}.png", encoded(i)) for i in range(9)]
TWICE = [(f"{i % 5:04}.png", encoded(i)) for i in (0, 0, 1, 2)]
LATER = [(f"{i:04}.png", encoded(i)) for i in range(9)] + [(f"b.{i}.png", encoded(i)) for i in range(3)]
REFUSED = {
    "apart": (APART, "members of sample '0000' lie apart in .*a.tar.*tar --sort=name"),
    "dots": (DOTS, r"would be members of one sample, because its name ends at the first dot"),
    "twice": (TWICE, "holds 0000.png twice: of the two samples one would be lost"),
    "later": (LATER, "would be members of one sample"),
    "no image": ([("a.txt", b"x"), ("a.cls", b"1")], "there is no image in .*its members end in .cls, .txt"),
}


@STREAMED
@pytest.mark.parametrize("members, message", REFUSED.values(), ids=REFUSED)
def test_samples_that_would_be_merged_or_lost_are_refused(tmp_path, members, message, streaming):
    place = tar(tmp_path / "a.tar", members)
    with pytest.raises(BadTar, match=message) as caught:
        read(images_of(place, streaming))
    assert "\n" not in str(caught.value)


def test_labels_of_all_members(tmp_path):
    def members(i: int) -> list[tuple[str, bytes]]:
        said = json.dumps({"label": ["cat", "dog"][i % 2], "size": i, "boxes": [1, 2]}).encode()
        return [(f"{i:04}.jpg", encoded(i, "JPEG")), (f"{i:04}.json", said), (f"._{i:04}.jpg", b"of macOS")]

    place = tar(tmp_path / "a.tar", [member for i in range(COUNT) for member in members(i)])
    splits = load_splits(DataArguments(dataset=str(place)), config())
    assert splits.train.classes == ["cat", "dog"] and any("labels from 'label'" in line for line in splits.report)
    named = load_splits(DataArguments(dataset=str(place), label_column="size"), config())
    assert named.train.classes == [str(i) for i in range(COUNT)]


def test_a_shard_that_changes_is_read_again(tmp_path):
    place = tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(3)])
    assert len(images_of(place, False)) == 3
    tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(5)])
    assert len(images_of(place, False)) == 5


def test_images_and_masks_of_a_tar(tmp_path):
    mask = io.BytesIO()
    PIL.Image.fromarray(np.eye(20, dtype=np.uint8)).save(mask, "PNG")
    pairs = [
        member for i in range(4) for member in ((f"{i}.jpg", encoded(i, "JPEG")), (f"{i}.mask.png", mask.getvalue()))
    ]
    rows = open_pairs(DataArguments(dataset=str(tar(tmp_path / "a.tar", pairs))))["train"]
    assert list(rows.features) == ["jpg", "mask.png"] and len(rows) == 4
