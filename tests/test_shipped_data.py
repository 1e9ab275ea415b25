"""The data set that ships with the package: complete, balanced, lossless, small, and readable offline."""

import collections
import importlib.util
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest


FOLDER = Path(__file__).resolve().parents[1] / "hf_mim/data/fashion_mnist"
SCRIPT = FOLDER.parent / "make_fashion_mnist.py"
SPLITS = {"train": 2000, "test": 300}
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

spec = importlib.util.spec_from_file_location("make_fashion_mnist", SCRIPT)
make_fashion_mnist = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_fashion_mnist)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> datasets.DatasetDict:
    return datasets.load_dataset(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


def pixels_and_labels(dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels (n, 28, 28) and labels (n,)."""
    return np.stack([np.asarray(image) for image in dataset["image"]]), np.asarray(dataset["label"])


def test_together_at_most_13_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 13_000_000


def test_licence_and_card_lie_beside_the_images():
    assert "Copyright (c) 2017 Zalando SE" in (FOLDER / "LICENSE").read_text()
    assert "MIT License" in (FOLDER / "LICENSE").read_text()
    assert SCRIPT.name in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("split", SPLITS)
def test_features_and_balance(shipped, split):
    dataset = shipped[split]
    assert dataset.features == datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    assert collections.Counter(dataset["label"]) == dict.fromkeys(range(10), SPLITS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_parquet_builder_reads_the_same(shipped, split, tmp_path):
    files = {split: str(FOLDER / f"{split}.parquet")}
    dataset = datasets.load_dataset("parquet", data_files=files, split=split, cache_dir=str(tmp_path))
    assert dataset.features == shipped[split].features
    assert dataset.data.to_pydict() == shipped[split].data.to_pydict()


@pytest.mark.parametrize("split", SPLITS)
def test_every_stretch_of_rows_mixes_the_classes(shipped, split):
    labels = np.asarray(shipped[split]["label"])
    # 100 rows drawn evenly from ten classes miss one of them with probability below 1e-3.
    present = [len(set(labels[start : start + 100])) for start in range(0, len(labels), 100)]
    assert min(present) >= 9


def test_images_are_grey_and_28_by_28(shipped):
    assert {(image.mode, image.size, image.format) for image in shipped["test"]["image"]} == {("L", (28, 28), "PNG")}


@pytest.mark.parametrize("split", SPLITS)
def test_no_path_of_the_machine_that_made_it(split):
    table = pq.read_table(FOLDER / f"{split}.parquet")
    assert {row["path"] for row in table["image"].to_pylist()} == {None}
    assert not re.search(rb"/(home|root|tmp|work|usr)/", b"".join(table.schema.metadata.values()))


@pytest.mark.skipif(not make_fashion_mnist.SOURCE.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("split", SPLITS)
def test_equals_the_official_pixels(shipped, split):
    images, labels = pixels_and_labels(shipped[split])
    official, official_labels = make_fashion_mnist.read_split(make_fashion_mnist.SOURCE, split)
    # Independent of the script's choice: each shipped (pixels, label) occurs in the official split, and as often.
    available = collections.Counter((image.tobytes(), label) for image, label in zip(official, official_labels))
    used = collections.Counter((image.tobytes(), label) for image, label in zip(images, labels))
    assert used <= available
    # And the script, run again, would choose the same images in the same order.
    rows = make_fashion_mnist.choose(official_labels, SPLITS[split])
    assert np.array_equal(images, official[rows]) and np.array_equal(labels, official_labels[rows])


def test_choice_is_balanced_and_repeatable():
    labels = np.arange(1000) % 10
    rows = make_fashion_mnist.choose(labels, 7)
    assert np.bincount(labels[rows]).tolist() == [7] * 10
    assert len(set(rows)) == 70
    assert np.array_equal(rows, make_fashion_mnist.choose(labels, 7))


def test_writing_twice_gives_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for name in ("one", "two"):
        make_fashion_mnist.write(make_fashion_mnist.to_table(images, np.arange(20) % 10), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_missing_source_is_one_clear_line(tmp_path, capsys):
    assert make_fashion_mnist.main(["--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error and "dataset-fashion-mnist" in error and "--source" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
