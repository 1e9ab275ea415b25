"""Which part of a data set is what: the splits that it has, and the parts that are drawn from one.

Every part is drawn here, at random from a seed and in proportion to the classes. A subset (`draw_subset`) has every
class, as long as there is room for one image of each; a part held out (`hold_out`) every class of at least two images.
"""

import re
from collections.abc import Iterable, Sequence

import datasets
import numpy as np

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.errors import DataError


# Names of a split, in order of preference. A folder or a file that begins with one of them is that split.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev")
HELD_OUT = 0.1  # share of a data set without a test split that is held out
HELD_OUT_LIMIT = 5000  # images; where there are more classes, it is one of each

Labels = Sequence | np.ndarray | int


# ---- splits that there are -----------------------------------------------------------------------------------------
def split_of(name: str) -> str | None:
    """The split that a file or folder of this name belongs to: train2017 and test-00000-of-00001 name one as well."""
    first = re.split("[^a-z]", name.lower(), maxsplit=1)[0]
    if first in TRAIN_NAMES:
        return "train"
    return first if first in TEST_NAMES else None


def choose_splits(splits: Iterable[str], data: DataArguments) -> tuple[str, str | None]:
    """The names of the split to train on and of the one to test on; None where there is no other.

    Raises:
        ValueError: a named split does not exist, or it is not clear which one to train on.
    """
    names = list(splits)
    for key in ("split", "eval_split"):
        if getattr(data, key) is not None and getattr(data, key) not in names:
            raise unknown_choice(f"data.{key}", getattr(data, key), names)
    train = data.split or next((name for name in TRAIN_NAMES if name in names), None)
    if train is None and len(names) > 1:
        raise DataError(f"which split to train on? Set data.split to one of {', '.join(names)}")
    train = train or names[0]
    return train, data.eval_split or other_test_split(names, train)


def other_test_split(splits: Iterable[str], *taken: str | None) -> str | None:
    """The first of `TEST_NAMES` that there is and that is not taken."""
    names = list(splits)
    return next((name for name in TEST_NAMES if name in names and name not in taken), None)


# ---- parts of a split ----------------------------------------------------------------------------------------------
def draw_subset(labels: Labels, count: int, seed: int = 0) -> np.ndarray:
    """Positions drawn at random, in order: of each class in proportion to its images, and at least one.

    Args:
        labels: the class of each image, by number or name; or how many images there are, without classes.
        count: how many to draw, at most; below the number of classes, they are of different ones.

    Returns:
        (up to count,), int64.
    """
    classes = _class_numbers(labels)
    order, ranks = _random_ranks(classes, seed)
    shares = ranks / np.bincount(classes)[classes]
    return np.sort(order[np.argsort(shares[order], kind="stable")[:count]])


def hold_out(
    labels: Labels, share: float = HELD_OUT, seed: int = 0, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and positions held out, drawn at random: `share` of each class, rounded, but at least one
    of every class of two, and at least one stays to train on.

    Args:
        labels: as of `draw_subset`.
        limit: about how many to hold out at most.

    Raises:
        DataError: no class has two images, so that there is none to spare.
    """
    classes = _class_numbers(labels)
    sizes = np.bincount(classes)
    if not (sizes > 1).any():
        raise DataError(f"of {len(classes)} images none can be held out: no class has two images. Give more images")
    share = share if limit is None else min(share, limit / len(classes))
    held_of = np.where(sizes > 1, np.clip(np.rint(share * sizes), 1, sizes - 1), 0)
    held = _random_ranks(classes, seed)[1] < held_of[classes]
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_rows(dataset: datasets.Dataset, label_column: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A data set without a test split in two, to train and to test on: always the same, whatever a run's seed is."""
    labels = len(dataset) if label_column is None else dataset[label_column][:]
    train, held = hold_out(labels, limit=HELD_OUT_LIMIT)
    return dataset.select(train), dataset.select(held)


def first_rows(dataset: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """The first `count` rows; None is all."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


def _random_ranks(classes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random order of the images, and of each image how many of its class come before it in that order."""
    order = np.random.default_rng(seed).permutation(len(classes))
    sizes = np.bincount(classes)
    ranks = np.empty(len(classes), dtype=np.int64)
    by_class = order[np.argsort(classes[order], kind="stable")]
    ranks[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order, ranks


def _class_numbers(labels: Labels) -> np.ndarray:
    if isinstance(labels, int):
        return np.zeros(labels, dtype=np.int64)
    values = np.asarray(labels)
    if values.dtype.kind == "O":  # names, and None where there is none
        values = values.astype(str)
    return np.unique(values, return_inverse=True)[1]
