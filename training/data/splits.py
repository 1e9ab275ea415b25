"""Which part of a data set is what: the splits that it has, and the parts that are drawn from one.

Every part is drawn here, at random from a seed and in proportion to the classes. A subset (`draw_subset`) has every
class, as long as there is room for one image of each; a part held out (`hold_out`) every class of at least two images.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress

import datasets
import numpy as np

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.labels import read_labels


# Names of a split, in order of preference. A folder or a file that begins with one of them is that split.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev")
HELD_OUT = 0.1  # share of a data set without a test split that is held out
HELD_OUT_LIMIT = 5000  # images; where there are more classes, it is one of each

Labels = Sequence | np.ndarray | int


class Opened(dict[str, datasets.Dataset]):
    """The splits of a data set, by name.

    Attributes:
        notes: what was left out when it was opened, and why, for people.
        digest: of the names and sizes of its files; "" where that is not known.
    """

    digest = ""

    def __init__(self, splits: dict[str, datasets.Dataset] | None = None, notes: Iterable[str] = ()):
        super().__init__(splits or {})
        self.notes = list(notes)


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


def draw_labelled(labels: np.ndarray, count: int | None = None, seed: int = 0) -> np.ndarray:
    """Positions as of `draw_subset`, among the images that have a label; without a count all of them.

    Args:
        labels: (images,), -1 without a label.
    """
    positions = np.flatnonzero(np.asarray(labels) >= 0)
    return positions if count is None else positions[draw_subset(np.asarray(labels)[positions], count, seed)]


def hold_out_rows(dataset: datasets.Dataset, label_column: str | None) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A data set without a test split in two, to train and to test on: always the same, whatever a run's seed is.
    With labels, no image that lacks one is held out."""
    if label_column is None:
        train, held = hold_out(len(dataset), limit=HELD_OUT_LIMIT)
    else:
        numbers = read_labels(dataset, label_column).numbers.numpy()
        labelled = np.flatnonzero(numbers >= 0)
        held = labelled[hold_out(numbers[labelled], limit=HELD_OUT_LIMIT)[1]]
        train = np.setdiff1d(np.arange(len(dataset)), held)
    return dataset.select(train), dataset.select(held)


def limit_rows(dataset: datasets.Dataset, label_column: str | None, count: int | None, seed: int = 0):
    """`count` rows as of `draw_subset`; None is all."""
    if count is None or count >= len(dataset):
        return dataset
    labels: Labels = len(dataset)
    if label_column is not None:
        with suppress(DataError):  # measured values
            labels = read_labels(dataset, label_column).numbers.numpy()
    return dataset.select(draw_subset(labels, count, seed))


def draw_scenes(presence: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Positions of images with masks, drawn at random, in order: together they have every class, if there is room.

    Args:
        presence: (images, classes), bool: which classes an image has a pixel of.
    """
    order = np.random.default_rng(seed).permutation(len(presence))
    chosen, covered = list[int](), np.zeros(presence.shape[1], dtype=bool)
    for number in np.argsort(presence.sum(axis=0), kind="stable"):  # the rarest class first
        members = order[presence[order, number]]
        if len(members) and not covered[number] and len(chosen) < count:
            chosen.append(int(members[0]))
            covered |= presence[members[0]]
    rest = order[~np.isin(order, chosen)].tolist()
    return np.sort([*chosen, *rest[: max(0, count - len(chosen))]]).astype(np.int64)


def hold_out_scenes(presence: np.ndarray, share: float = HELD_OUT, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions of images with masks to train on, and of `share` of them, at least one, held out: at random, but every
    class stays to train on, unless every image is the only one of some class.

    Args: as of `draw_scenes`; at least two images.
    """
    count = max(1, min(len(presence) - 1, round(share * len(presence)), HELD_OUT_LIMIT))
    order = np.random.default_rng(seed).permutation(len(presence))
    remaining, held = presence.sum(axis=0), list[int]()
    for index in order.tolist():
        if len(held) < count and (remaining[presence[index]] > 1).all():
            held.append(index)
            remaining = remaining - presence[index]
    held = held or order[:count].tolist()
    return np.setdiff1d(np.arange(len(presence)), held), np.sort(held)


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
