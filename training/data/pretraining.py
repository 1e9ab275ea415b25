"""What pretraining and probing work on: the images of a recipe, to train on and to evaluate on."""

from dataclasses import dataclass, field, replace

import datasets
import numpy as np

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.labels import Labels, read_labels, unknown_class
from hf_mim.training.data.report import describe_classes, describe_columns, describe_part, unused_splits
from hf_mim.training.data.sample import PixelSample, look_at
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import Opened, choose_splits, hold_out_rows, limit_rows
from hf_mim.training.data.streaming import StreamedImages


FEWEST = 20  # labelled images that a data set must have for some to be held out


@dataclass
class Splits:
    """What a command works on.

    Args:
        train: to pretrain on, with crops and flips.
        train_eval, test: the same images, and others, without; None where nothing is evaluated. Images of `train_eval`
            without a label, -1, are not for evaluation; `test` has none.
        note: where `test` comes from, or why there is none, for people.
        report: what is used and what is left out, a line each, for people.
        sample: what some of the training images hold.
        data: the recipe's, with the numbers that `value_range=auto` stands for.
        digest: of the files; see `Opened`.
    """

    train: MIMDataset | StreamedImages
    train_eval: MIMDataset | None
    test: MIMDataset | None
    note: str
    report: list[str] = field(default_factory=list)
    sample: PixelSample = field(default_factory=PixelSample)
    data: DataArguments = field(default_factory=DataArguments)
    digest: str = ""

    def sample_seen(self) -> PixelSample:
        """The sample, with the sizes of all images that were decoded since."""
        if not isinstance(self.train, MIMDataset):
            return self.sample
        return replace(self.sample, sizes=self.sample.sizes | self.train.sizes_seen())

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        parts = [part for part in (self.train, self.test) if part is not None]
        return sum((part.bad_images() for part in parts), BadImageReport())


def load_splits(data: DataArguments, config: MIMConfig, seed: int = 0) -> Splits:
    """Opens the data set of a recipe. Pretraining needs no labels: where they do not allow an evaluation, `note` says
    why.

    Raises:
        ValueError, OSError: it is missing, empty, without images, or its channels are not those of the config.
    """
    opened = open_dataset(data)
    sample, data = look_at(opened[choose_splits(opened, data)[0]], config, data, seed)
    return replace(_load(opened, data, config, seed), sample=sample, data=data, digest=opened.digest)


def _load(opened: Opened, data: DataArguments, config: MIMConfig, seed: int) -> Splits:
    train_name, test_name = choose_splits(opened, data)
    train = opened[train_name]
    if isinstance(train, datasets.IterableDataset):
        images = StreamedImages(train, config, data, seed)
        report = [*opened.notes, describe_columns(*find_columns(train.features or {}, data))]
        return Splits(images, None, None, "streaming data has no test split", report)
    image_column, label_column = find_columns(train.features, data)
    labels, note = labels_or_reason(train, label_column)
    test = None
    if labels is not None and label_column is not None:
        train, test, note = split_rows(opened, train_name, test_name, label_column, labels)
    train = limit_rows(train, label_column, data.max_train_images, seed)
    train = add_extra(train, opened, train_name, data)
    training = MIMDataset(train, config, data, True, seed, labels and labels.classes)
    labels = training.label_info
    used = [train_name, *(data.extra_splits or []), test_name if test is not None else None]
    report = [*opened.notes, describe_columns(image_column, label_column)]
    report += [describe_classes(labels.classes)] if labels is not None else []
    report += [describe_part("training", len(training), labels)]
    report += unused_splits(opened, used, "; pretraining takes it by data.extra_splits")
    if test is None or data.max_eval_images == 0:
        note = note if test is None else "data.max_eval_images is 0"
        return Splits(training, None, None, note, [*report, f"Not evaluated: {note}"])
    testing = MIMDataset(test, config, data, False, seed, training.classes)
    report.append(describe_part("test", len(testing), testing.label_info, note, data.max_eval_images))
    if test_name is not None and len(testing) < len(opened[test_name]):
        report.append(f"{len(opened[test_name]) - len(testing):,} test images without a label are left out")
    return Splits(training, training.without_augmentation(), testing, note, report)


def labels_or_reason(train: datasets.Dataset, column: str | None) -> tuple[Labels | None, str]:
    """The labels of the training images, or None and why there are none."""
    if column is None:
        return None, "no labels"
    try:
        return read_labels(train, column), ""
    except DataError as error:
        return None, str(error)


def split_rows(
    opened: Opened, train_name: str, test_name: str | None, label_column: str, labels: Labels
) -> tuple[datasets.Dataset, datasets.Dataset | None, str]:
    """Rows to train on and to test on, and where the latter come from; None and the reason where nothing can be
    evaluated.

    Args:
        labels: of the training images.
    """
    train = opened[train_name]
    if labels.present < 2:
        count, name = len(train) - labels.missing, labels.classes[int(labels.numbers.max())] if labels.present else ""
        return train, None, f"all {count:,} labelled images are of one class, {name!r}" if count else "no labels"
    if test_name is None:
        return hold_out_test(train, train_name, label_column, labels)
    test = opened[test_name]
    if label_column not in test.features:
        return train, None, f"the split {test_name} has no labels"
    test_labels = read_labels(test, label_column, labels.classes)
    return train, *usable_rows(test, test_labels, labels, test_name)


def hold_out_test(train: datasets.Dataset, name: str, column: str, labels: Labels):
    """As of `split_rows`, where there is no test split."""
    labelled = len(train) - labels.missing
    if labelled < FEWEST:
        return train, None, f"{labelled} labelled images are too few to hold any out"
    if not (np.bincount(labels.numbers[labels.numbers >= 0]) > 1).any():
        return train, None, "no class has two images, so that none can be held out"
    return *hold_out_rows(train, column), f"held out from {name}"


def usable_rows(
    test: datasets.Dataset, labels: Labels, train: Labels, name: str
) -> tuple[datasets.Dataset | None, str]:
    """The rows of a test split that have a label; None and the reason where they cannot be used."""
    labels = Labels(labels.numbers.clone(), labels.classes, labels.unknown)
    without = set(range(len(labels.classes))) - set(train.numbers.tolist())
    for number in sorted(without & set(labels.numbers.tolist())):
        labels.unknown[labels.classes[number]] += int((labels.numbers == number).sum())
    if (reason := unknown_class(labels, name)) is not None:
        return None, reason
    labelled = np.flatnonzero(labels.numbers.numpy() >= 0)
    if not len(labelled):
        return None, f"the split {name} has no labels"
    return (test if len(labelled) == len(test) else test.select(labelled)), f"split {name}"


def add_extra(train: datasets.Dataset, opened: Opened, train_name: str, data: DataArguments) -> datasets.Dataset:
    """The training rows and, after them, those of `data.extra_splits`, without labels where they have none.

    Raises:
        OptionError: there is no such split.
    """
    if not data.extra_splits:
        return train
    columns = [column for column in find_columns(train.features, data) if column is not None]
    parts = [train.select_columns(columns)]
    for name in data.extra_splits or []:
        if name not in opened:
            raise unknown_choice("data.extra_splits", name, [split for split in opened if split != train_name])
        extra = opened[name]
        extra = extra.select_columns([column for column in columns if column in extra.features])
        if columns[0] not in extra.features:
            extra = extra.rename_column(find_columns(extra.features, DataArguments())[0], columns[0])
        features = datasets.Features({column: train.features[column] for column in extra.features})
        parts.append(extra if features == extra.features else extra.cast(features))
    if len(parts) == 1:
        return train
    return datasets.concatenate_datasets(
        [part.select_columns([c for c in columns if c in part.features]) for part in parts]
    )
