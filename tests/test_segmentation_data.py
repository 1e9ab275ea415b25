"""Images with masks: composed scenes, reading, checks, crops of both together; mean IoU."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import png, tiny_config, write_pairs
from rich.console import Console
from sklearn.metrics import confusion_matrix, jaccard_score

from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import TooManyBadImages
from hf_mim.training.data.files import list_files
from hf_mim.training.data.masked import load_masked_splits
from hf_mim.training.data.masks import IGNORE, BadMask, decode_mask
from hf_mim.training.data.pairs import find_pairs
from hf_mim.training.data.scenes import Scenes
from hf_mim.training.data.segmentation import MaskedDataset, SegmentationCollator, crop_pair
from hf_mim.training.evaluation.iou import MeanIoU, pixel_counts
from hf_mim.training.evaluation.metrics import mask_intervals, score_masks


QUIET = Console(quiet=True)


# ---- composed scenes -----------------------------------------------------------------------------------------------
def test_a_scene_follows_from_seed_split_and_index():
    image, ids = Scenes("train")[7]
    again = Scenes("train", count=8)[7]
    assert image.shape == (1, 56, 56) and image.dtype == np.uint8 and ids.shape == (56, 56)
    assert np.array_equal(image, again[0]) and np.array_equal(ids, again[1])
    for other in (Scenes("train")[8], Scenes("validation")[7], Scenes("test")[7], Scenes("train", seed=1)[7]):
        assert not np.array_equal(image, other[0])


def test_scenes_hold_every_class_and_each_piece_is_half_visible():
    scenes = Scenes("test", count=60, size=(64, 48), num_channels=3)
    images, masks = zip(*(scenes[i] for i in range(60)), strict=True)
    assert images[0].shape == (3, 64, 48) and np.array_equal(images[0][0], images[0][2])
    assert scenes.classes[0] == "canvas" and len(scenes.classes) == 11
    counts = np.bincount(np.stack(masks).ravel(), minlength=11)
    assert (counts > 0).all() and len(counts) == 11
    assert 0.4 < counts[0] / counts.sum() < 0.9
    with pytest.raises(ValueError, match="unknown split of the composed scenes 'dev'"):
        Scenes("dev")


# ---- reading masks -------------------------------------------------------------------------------------------------
def test_masks_are_read_as_the_ids_that_they_hold():
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    array = io.BytesIO()
    np.save(array, ids.astype(np.int32)[None])
    for value in (png(ids), png(ids, "P"), png(np.dstack([ids] * 3)), array.getvalue(), ids.tolist(), ids):
        assert np.array_equal(decode_mask(value), ids)
    assert np.array_equal(decode_mask(png(1000 * ids.astype(np.uint16))), 1000 * ids.astype(int))
    assert np.array_equal(decode_mask(png(ids > 3)), ids > 3)


@pytest.mark.parametrize(
    "value, message",
    [
        (png(np.random.default_rng(0).integers(255, size=(3, 4, 3), dtype=np.uint8)), "holds colours and no class ids"),
        ([[0.5, 1.0]], "whole numbers"),
        ([[-1, 3]], "ids from -1 to 3; use 255"),
        (b"nothing", "cannot read mask"),
        (None, "is missing"),
    ],
)
def test_what_is_no_mask_is_refused(value, message):
    with pytest.raises(BadMask, match=message):
        decode_mask(value)


def test_folders_of_images_and_masks(tmp_path):
    write_pairs(tmp_path / "a/images", tmp_path / "a/masks", 3, ending="jpg")
    assert {k: len(v) for k, v in find_pairs(str(tmp_path / "a"), list_files(str(tmp_path / "a"))).items()} == {
        "train": 3
    }
    for split, count in (("train", 3), ("val", 2)):
        write_pairs(tmp_path / "b" / split / "images", tmp_path / "b" / split / "annotations", count)
        write_pairs(tmp_path / "c/images" / split, tmp_path / "c/masks" / split, count)
    for name in "bc":
        found = find_pairs(str(tmp_path / name), list_files(str(tmp_path / name)))
        assert {k: len(v) for k, v in found.items()} == {"train": 3, "val": 2}
        assert all(Path(image).stem == Path(mask).stem for pairs in found.values() for image, mask in pairs)
    splits = load_masked_splits(DataArguments(dataset=str(tmp_path / "b")), tiny_config())
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [2, 1, 2]
    image, ids = splits.test[0]
    assert image.shape == (3, *ids.shape) and splits.classes == ["class 0", "class 1", "class 2"]
    assert abs(splits.shares.sum() - 1) < 1e-9


@pytest.mark.parametrize("kind", ["image", "list", "bytes"])
def test_parquet_with_masks(kind, tmp_path):
    rng = np.random.default_rng(0)
    images = [png(rng.integers(255, size=(8, 8), dtype=np.uint8)) for _ in range(6)]
    masks = [rng.integers(2, size=(8, 8), dtype=np.uint8) for _ in range(6)]
    columns = {"label": list(range(6)), "image": [{"bytes": b, "path": None} for b in images]}
    feature = {"image": datasets.Image(), "list": datasets.List(datasets.List(datasets.Value("uint8")))}.get(kind)
    values = {"image": [{"bytes": png(m), "path": None} for m in masks], "list": [m.tolist() for m in masks]}
    columns["mask"] = values.get(kind, [png(m) for m in masks])
    features = {"label": datasets.Value("int64"), "image": datasets.Image()}
    features["mask"] = feature or datasets.Value("binary")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "train.parquet")
    splits = load_masked_splits(DataArguments(dataset=str(tmp_path)), tiny_config(num_channels=1))
    read = [split[i] for split in (splits.train, splits.validation, splits.test) for i in range(len(split))]
    assert len(read) == 6
    assert all(any(np.array_equal(ids, mask) for mask in masks) for _, ids in read)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_masks_that_a_table_names(tmp_path, kind):
    for split, count in (("train", 6), ("test", 3)):
        write_pairs(tmp_path / split / "photos", tmp_path / split / "maps", count)
        rows = [{"file_name": f"photos/p{i}.png", "mask_file_name": f"maps/p{i}.png"} for i in range(count)]
        table = datasets.Dataset.from_list(rows)
        write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind]
        write(str(tmp_path / split / f"metadata.{kind}"))
    splits = load_masked_splits(DataArguments(dataset=str(tmp_path)), tiny_config())
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [5, 1, 3]
    image, ids = splits.test[2]
    expected = np.array(PIL.Image.open(tmp_path / "test/maps/p2.png"))
    assert np.array_equal(ids, expected) and image.shape == (3, *ids.shape)


# ---- bad images ----------------------------------------------------------------------------------------------------
def write_bad(root: Path, kind: str) -> None:
    """24 pairs in `root`, of which two are bad."""
    write_pairs(root / "images", root / "masks", 24)
    first, second = (sorted((root / "images").iterdir())[i] for i in (3, 9))
    if kind == "no image":
        first.write_bytes(b"nothing")
        second.write_bytes(b"")
    if kind == "cut short":  # the header is whole: it is noticed when the image is decoded
        for path in (first, second):
            path.write_bytes(path.read_bytes()[:-60])
    if kind == "other channels":
        for path in (first, second):
            height, width = np.array(PIL.Image.open(path)).shape[:2]
            np.save(path.with_suffix(".npy"), np.zeros((height, width, 5), dtype=np.uint8))
            path.unlink()
    if kind == "broken mask":
        for path in (first, second):
            (root / "masks" / path.name).write_bytes(b"nothing")


@pytest.mark.parametrize("kind", ["no image", "cut short", "other channels", "broken mask"])
def test_a_bad_pair_is_counted_and_replaced(tmp_path, kind):
    write_bad(tmp_path, kind)
    splits = load_masked_splits(DataArguments(dataset=str(tmp_path), max_bad_images=2), tiny_config())
    for split in (splits.train, splits.validation, splits.test):
        for i in range(len(split)):
            image, ids = split[i]
            assert image.shape[1:] == ids.shape
            # as `write_pairs` draws them: a replaced image has its own mask, not that of the one it replaces
            assert (np.abs(image[0].astype(int) - 60 * ids - 10) < 16).mean() > 0.95
    report = splits.bad_images()
    assert report.count == 2 and report.first is not None
    with pytest.raises(TooManyBadImages, match="2 of .* cannot be used, more than data.max_bad_images=1 allows"):
        splits = load_masked_splits(DataArguments(dataset=str(tmp_path), max_bad_images=1), tiny_config())
        for split in (splits.train, splits.validation, splits.test):
            _ = [split[i] for i in range(len(split))]


def test_rows_without_image_or_mask_are_bad_pairs(tmp_path):
    rng = np.random.default_rng(0)
    images = [{"bytes": png(rng.integers(255, size=(8, 8), dtype=np.uint8)), "path": None} for _ in range(20)]
    masks = [{"bytes": png(rng.integers(2, size=(8, 8), dtype=np.uint8)), "path": None} for _ in range(20)]
    images[4], masks[11] = None, None
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images, "mask": masks}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    splits = load_masked_splits(DataArguments(dataset=str(tmp_path), max_bad_images=2), tiny_config(num_channels=1))
    for split in (splits.train, splits.validation, splits.test):
        assert all(split[i][0].shape[1:] == (8, 8) for i in range(len(split)))
    assert splits.bad_images().count == 2
    firsts = [split.bad_images().first for split in (splits.train, splits.validation, splits.test)]
    assert {first for first in firsts if first} <= {"row 4 is missing", "mask of row 11 is missing"}


# ---- crops ---------------------------------------------------------------------------------------------------------
def test_image_and_mask_are_cropped_together():
    rng = np.random.default_rng(0)
    ids = rng.integers(2, size=(5, 7)).repeat(12, 0).repeat(12, 1)
    image = torch.from_numpy((200 * ids).astype(np.uint8))[None]
    shares, padded = [], []
    for i in range(60):
        found, mask = crop_pair(image, ids, (40, 56), np.random.default_rng(i), np.array([90], dtype=np.uint8))
        assert found.shape == (1, 40, 56) and mask.shape == (40, 56)
        known = mask != IGNORE
        assert (found[0].numpy()[~known] == 90).all()
        shares.append(((found[0].numpy() > 100) == mask)[known].mean())
        padded.append((~known).mean())
    assert min(shares) > 0.93 and np.mean(shares) > 0.96  # a pixel at an edge may fall either way
    assert 0.2 < np.mean(np.array(padded) > 0) < 0.8  # half of the factors are below 1


def test_training_pairs_follow_from_seed_epoch_and_index():
    config, source = tiny_config(num_channels=1), Scenes("train", count=4)
    first = MaskedDataset(source, config, (32, 48), True, seed=3)
    second = MaskedDataset(source, config, (32, 48), True, seed=3)
    for epoch in (0, 1):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert torch.equal(first[2][0], second[2][0]) and np.array_equal(first[2][1], second[2][1])
    second.set_epoch(0)
    assert not torch.equal(first[2][0], second[2][0])
    other = MaskedDataset(source, config, (32, 48), True, seed=4)
    other.set_epoch(1)
    assert not torch.equal(first[2][0], other[2][0])
    image, ids = MaskedDataset(source, config, (32, 48), False)[2]
    assert image.shape == (1, 32, 48) and np.array_equal(ids, source[2][1])


def test_flips_are_of_both():
    config = tiny_config(num_channels=1)
    ids = np.zeros((16, 16), dtype=np.int64)
    ids[:, 8:] = 1
    source = [((100 + 100 * ids).astype(np.uint8)[None], ids)] * 40
    sides = set()
    for i in range(40):
        image, mask = MaskedDataset(source, config, (16, 16), True)[i]
        bright = image[0].float().numpy()
        if (mask == 0).any() and (mask == 1).any():
            assert bright[mask == 1].mean() > bright[mask == 0].mean() + 60
            sides.add(np.argwhere(mask == 1)[:, 1].mean() > np.argwhere(mask == 0)[:, 1].mean())
    assert sides == {True, False}


def test_masks_of_several_sizes_make_a_batch():
    config = tiny_config(num_channels=1)
    items = [(torch.full((1, 8, 8), 255, dtype=torch.uint8), np.full(size, 1)) for size in ((3, 9), (5, 4))]
    batch = SegmentationCollator(config)(items)
    assert batch["labels"].shape == (2, 5, 9) and batch["sizes"].tolist() == [[3, 9], [5, 4]]
    assert (batch["labels"] == 1).sum() == 27 + 20 and (batch["labels"] == IGNORE).sum() == 90 - 47
    assert torch.allclose(batch["pixel_values"], torch.ones(2, 1, 8, 8))


# ---- mean IoU ------------------------------------------------------------------------------------------------------
def test_mean_iou_is_that_of_the_confusion_matrix_and_of_sklearn():
    rng = np.random.default_rng(0)
    maps = [rng.integers(5, size=size) for size in ((8, 9), (4, 12), (8, 9))]
    masks = [np.where(rng.random(m.shape) < 0.6, m, rng.integers(4, size=m.shape)) for m in maps]
    masks[0][:3] = IGNORE
    found = MeanIoU().compute(predictions=maps, references=masks, num_classes=6)
    predicted, true = (np.concatenate([m.ravel() for m in part]) for part in (maps, masks))
    predicted, true = predicted[true != IGNORE], true[true != IGNORE]
    matrix = confusion_matrix(true, predicted, labels=range(6))
    by_hand = [matrix[i, i] / (matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]) for i in range(5)]
    assert np.allclose(found["iou"][:5], 100 * np.array(by_hand)) and np.isnan(found["iou"][5])
    assert np.isclose(found["mean_iou"], 100 * jaccard_score(true, predicted, average="macro"))
    assert np.isclose(found["pixel_accuracy"], 100 * (true == predicted).mean())
    counts = np.stack([pixel_counts(p, m, 6) for p, m in zip(maps, masks)])
    assert score_masks(counts) == {key: found[key] for key in ("mean_iou", "pixel_accuracy")}


def test_bootstrap_intervals_over_images():
    rng = np.random.default_rng(0)
    right = rng.integers(30, 60, size=400)  # of 100 pixels of one class; the rest is taken for another one
    counts = np.zeros((400, 3, 2), dtype=np.int64)
    counts[:, 0, 0], counts[:, 1, 0], counts[:, 2, 0], counts[:, 1, 1] = right, right, 100, 100 - right
    low, high = mask_intervals(counts)["pixel_accuracy"]
    half = 1.96 * right.std() / 20
    assert abs(low - (right.mean() - half)) < 0.15 and abs(high - (right.mean() + half)) < 0.15
    assert mask_intervals(counts, counts)["mean_iou"] == [0.0, 0.0]
