"""What segmentation works on: images with masks in three splits, and their classes."""

from dataclasses import dataclass

import datasets
import numpy as np

from hf_mim.training.console import RunConsole
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_mask_columns
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.data.pairs import MaskedSource, Pairs, open_pairs
from hf_mim.training.data.scenes import COUNTS, Scenes
from hf_mim.training.data.splits import choose_splits, first_rows, hold_out_rows, other_test_split
from hf_mim.training.errors import DataError


@dataclass
class MaskedSplits:
    """What a command works on.

    Args:
        train, validation, test: by index (image (channels, height, width) uint8, class ids (height, width) int64).
        classes: their names, by id.
        shares: of the labelled training pixels that are of each class.
        note: where `test` comes from, for people.
    """

    train: MaskedSource
    validation: MaskedSource
    test: MaskedSource
    classes: list[str]
    shares: np.ndarray
    note: str


def load_masked_splits(
    data: DataArguments, num_channels: int, classes: int | list[str] | None = None, console: RunConsole | None = None
) -> MaskedSplits:
    """Opens the data, the composed scenes where `data.dataset` is None, and reads every mask once.

    Args:
        classes: how many there are, or their names; None takes the ids in sight.

    Raises:
        ValueError, OSError: missing data, no masks, masks of another size than their image, ids beyond the classes,
            only ignored pixels.
    """
    limits = {"train": data.max_train_images, "validation": data.max_eval_images, "test": data.max_eval_images}
    limits = {name: count if count is None else max(1, count) for name, count in limits.items()}
    sources: dict[str, MaskedSource] = {}
    if data.dataset is None:
        for name, count in COUNTS.items():
            scenes = Scenes(name, min(count, limits[name] or count), num_channels=num_channels)
            sources[name], classes = scenes, classes or scenes.classes
        note = "composed from the test images"
    else:
        rows, note = open_splits(data)
        columns = find_mask_columns(rows["train"].features, data)
        for name, split in rows.items():
            sources[name] = Pairs(first_rows(split, limits[name]), *columns, num_channels)
    counts = [count_ids(source, name, console) for name, source in sources.items()]
    names = name_classes(classes, max(map(len, counts)))
    train_counts = np.pad(counts[0], (0, len(names) - len(counts[0])))
    return MaskedSplits(**sources, classes=names, shares=train_counts / train_counts.sum(), note=note)


def open_splits(data: DataArguments) -> tuple[dict[str, datasets.Dataset], str]:
    """The rows to train on, to choose settings by and to test on, and where the last come from."""
    splits = open_pairs(data)
    train, test = choose_splits(splits, data)
    rows, note = {"train": splits[train]}, f"split {test}"
    if (validation := other_test_split(splits, train, test)) is not None:
        rows["validation"] = splits[validation]
    if test is not None:
        rows["test"] = splits[test]
    for name in ("test", "validation"):
        if name not in rows:
            if len(rows["train"]) < 2:
                raise DataError(f"{data.dataset} has too few images: one to train on, one to validate and one to test")
            rows["train"], rows[name] = hold_out_rows(rows["train"], None)
            note = f"held out from {train}" if name == "test" else note
    return {name: rows[name] for name in COUNTS}, note


def count_ids(source: MaskedSource, name: str, console: RunConsole | None) -> np.ndarray:
    """Pixels of each class id over all masks, (highest id + 1,).

    Raises:
        ValueError: a mask cannot be used, or none has a labelled pixel.
    """
    counts = np.zeros(1, dtype=np.int64)
    with (console or RunConsole(quiet=True)).progress() as bar:
        for index in bar.track(range(len(source)), description=f"reading the {name} masks"):
            ids = source.mask(index)
            pixels = np.bincount(ids[ids != IGNORE])
            length = max(len(counts), len(pixels))
            counts = np.pad(counts, (0, length - len(counts))) + np.pad(pixels, (0, length - len(pixels)))
    if not counts.any():
        raise DataError(f"the {name} masks hold only {IGNORE}, which means that a pixel has no class")
    return counts


def name_classes(classes: int | list[str] | None, count: int) -> list[str]:
    """The names of the classes by id, where the masks hold ids below `count`.

    Raises:
        ValueError: ids beyond the classes, or a single class.
    """
    names = classes if isinstance(classes, list) else [f"class {i}" for i in range(classes or count)]
    if count > len(names):
        raise DataError(
            f"the masks hold ids up to {count - 1}, but there are {len(names)} classes: 0 to {len(names) - 1}"
        )
    if len(names) < 2:
        raise DataError(f"the masks hold one class only, id 0 ({IGNORE} means that a pixel has no class)")
    return names
