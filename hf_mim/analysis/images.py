"""The images that encoders are measured on: the same for all of them, each at its own size and normalisation."""

import copy
from collections import Counter
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import DataError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.labels import Labels, read_labels
from hf_mim.training.data.report import describe_classes, describe_columns, unused_splits
from hf_mim.training.data.sample import look_at
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import choose_splits, hold_out, limit_rows
from hf_mim.training.evaluation import frozen


@dataclass
class Choice:
    """Which rows of a data set are measured, and which others class prototypes come from.

    measured: rows; in random order, so that the first few are a fair sample of the classes.
    others: rows for prototypes, as many of every class as possible; None without labels.
    classes: the classes' names where labels are text; None lets a data set's own names count.
    note: where the images come from, for people.
    report: what is used of the data and what is left out, a line each, for people.
    """

    measured: datasets.Dataset
    others: datasets.Dataset | None
    classes: list[str] | None
    note: str
    report: list[str] = field(default_factory=list)


def choose_images(data: DataArguments, count: int, prototypes: int) -> Choice:
    """Chooses `count` images to measure, those of the test split where there is one, and `prototypes` others.

    Raises:
        ValueError, OSError: the data set is missing, has fewer than two images, or is to be streamed.
    """
    if data.streaming:
        raise RecipeError("data.streaming must be false here: every encoder must see the same images", "data.streaming")
    splits = open_dataset(data)
    train_name, test_name = choose_splits(splits, data)
    train = splits[train_name]
    label, labels = usable_labels(train, data)
    note = f"split {test_name or train_name}"
    test, rest = (train, None) if test_name is None else (splits[test_name], train)
    if test_name is None and labels is not None:
        # Half of every class of two; what has no label stays with the rest.
        half = np.flatnonzero(labels.numbers.numpy() >= 0)
        half = half[hold_out(labels.numbers.numpy()[half], 0.5)[1]]
        test, rest = train.select(half), train.select(np.setdiff1d(np.arange(len(train)), half))
        note = f"half of split {train_name}"
    report = [*splits.notes, describe_columns(find_columns(train.features, data)[0], label or None)]
    report += [describe_classes(labels.classes)] if labels is not None else []
    report += unused_splits(splits, [train_name if rest is not None else None, test_name or train_name])
    test_labels = read_labels(test, label, labels.classes) if labels is not None and label in test.features else None
    if test_labels is not None and test_labels.missing and test_labels.missing < len(test):
        note += f" without {test_labels.missing:,} images that have no label"
        test = test.select(np.flatnonzero(test_labels.numbers.numpy() >= 0))
    limit = min(count, data.max_eval_images or count)
    measured = limit_rows(test, label if test_labels is not None else None, limit)
    measured = measured.select(np.random.default_rng(0).permutation(len(measured)))
    if len(measured) < 2:
        message = f"an analysis needs at least 2 images, and {data.dataset} has {len(measured)} in its {note}"
        raise DataError(message, data.dataset or "")
    if labels is None or test_labels is None or rest is None or not len(rest):
        return Choice(measured, None, None, note, report)
    others = read_labels(rest, label, labels.classes)
    positions = in_turn(others.numbers.tolist(), prototypes)
    return Choice(measured, rest.select(positions), labels.classes, note, report)


def usable_labels(train: datasets.Dataset, data: DataArguments) -> tuple[str, Labels | None]:
    """The label column and the labels of the training images; "" and None where they make no two classes."""
    _, label = find_columns(train.features, data)
    try:
        labels = None if label is None else read_labels(train, label)
    except DataError:
        return "", None
    counts = torch.bincount(labels.numbers[labels.numbers >= 0]) if labels is not None else torch.zeros(1)
    several = bool((counts > 0).sum() > 1 and (counts > 1).any())
    return (label or "", labels) if several else ("", None)


def in_turn(labels: list, count: int) -> list[int]:
    """`count` positions at random but always the same: one of every class, then another of every class, and so on."""
    order = np.random.default_rng(0).permutation(len(labels))
    rounds, seen = [], Counter[object]()
    for position in order:
        value = labels[position]
        if value is not None and value != -1:
            seen[value] += 1
            rounds.append((seen[value], int(position)))
    return [position for _, position in sorted(rounds, key=lambda entry: entry[0])[:count]]


class EncoderImages:
    """A choice of images as one encoder sees them.

    Args:
        image_size: instead of the encoder's own.

    Raises:
        ValueError: they cannot be decoded, or have other channels.
    """

    def __init__(self, choice: Choice, config: MIMConfig, data: DataArguments, image_size=None):
        self.config = config
        if image_size is not None:
            self.config = copy.copy(config)
            self.config.image_size = image_size
        self.size = pair(self.config.image_size)
        self.sample, data = look_at(choice.measured, self.config, data)
        self.measured = MIMDataset(choice.measured, self.config, data, False, 0, choice.classes)
        self.others: MIMDataset | None = None
        labels = self.measured.labels
        if choice.others is not None and labels is not None and not bool((labels < 0).any()):
            self.others = MIMDataset(choice.others, self.config, data, False, 0, choice.classes)
        self.classes = self.measured.classes if self.others is not None else []

    def log_sample(self, console: RunConsole) -> None:
        """Prints what the images hold, where they are other than 8-bit ones."""
        if set(self.sample.values) - {"uint8"}:
            console.log(self.sample.line)
        if self.sample.warning:
            console.warn(self.sample.warning)

    @property
    def passes(self) -> int:
        """How many images one encoder is run on."""
        return len(self.measured) + (0 if self.others is None else len(self.others))

    def batches(self, batch_size: int):
        """Of the measured images, in order: pixel values (batch, channels, height, width), labels (batch,) or None."""
        return self._batches(self.measured, batch_size)

    @property
    def labelled(self) -> MIMDataset:
        """The labelled images set aside.

        Raises:
            DataError: there are none.
        """
        if self.others is None:
            raise DataError("the images have no labels")
        return self.others

    def prototype_batches(self, batch_size: int):
        return self._batches(self.labelled, batch_size)

    def _batches(self, dataset: MIMDataset, batch_size: int):
        start = 0
        for pixel_values in frozen.pixel_loader(dataset, self.config, batch_size):
            indices = list(range(start, start + len(pixel_values)))
            labels = dataset.true_labels(indices) if self.others is not None else None
            yield pixel_values, labels
            start = indices[-1] + 1
