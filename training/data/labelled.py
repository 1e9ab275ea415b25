"""Labelled images in three splits: to train on, to choose the best checkpoint by, and to test on once."""

from dataclasses import dataclass, field, replace

import datasets
import numpy as np

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.augment import LabelledImages
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.columns import find_columns, find_label_column
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.labels import Labels, check_classes, read_labels, unknown_class
from hf_mim.training.data.report import describe_classes, describe_columns, describe_part, unused_splits
from hf_mim.training.data.sample import PixelSample, look_at
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import (
    HELD_OUT_LIMIT,
    Opened,
    choose_splits,
    draw_subset,
    hold_out,
    hold_out_rows,
    limit_rows,
    other_test_split,
)


@dataclass
class LabelledSplits:
    """
    Args:
        classes: names, in the order of their numbers.
        notes: {"validation", "test"}: where each comes from, for people.
        test: None where `data.max_eval_images` is 0.
        report: what is used and what is left out, a line each, for people.
        sample, data: as of `Splits`.
        digest: of the files; see `Opened`.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages | None
    classes: list[str]
    notes: dict[str, str]
    report: list[str] = field(default_factory=list)
    sample: PixelSample = field(default_factory=PixelSample)
    data: DataArguments = field(default_factory=DataArguments)
    digest: str = ""

    def sample_seen(self) -> PixelSample:
        """The sample, with the sizes of all images that were decoded since."""
        return replace(self.sample, sizes=self.sample.sizes | self.train.dataset.sizes_seen())

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        parts = [part.dataset for part in (self.train, self.validation, self.test) if part is not None]
        own = {id(part.bad): part.bad_images() for part in parts}  # a part held out shares those of its whole
        return sum(own.values(), BadImageReport())


def load_labelled_splits(data: DataArguments, config: MIMConfig, seed: int = 0) -> LabelledSplits:
    """Opens the data set of a recipe. `test` is the split that pretraining and probing test on too; `validation` is a
    split of its own where there is one besides, else a tenth of the training images. Images without a label are left
    out; a test split without any is replaced by images held out.

    Raises:
        ValueError, OSError: as of `load_splits`, or the labels are not those of a classification.
    """
    opened = open_dataset(data)
    train_name, test_name = choose_splits(opened, data)
    train, column = opened[train_name], find_label_column(opened[train_name].features, data)
    sample, data = look_at(train, config, data, seed)
    report = [*opened.notes, describe_columns(find_columns(train.features, data)[0], column)]
    labels = read_labels(train, column)
    check_classes(labels)
    if labels.missing:
        train = train.select(np.flatnonzero(labels.numbers.numpy() >= 0))
        report.append(f"{labels.missing:,} of {len(labels.numbers):,} images of {train_name} have no label: left out")
    loader = EvaluationLoader(opened, column, config, data, labels, report)
    test, notes = loader.rows(test_name), {"test": f"split {test_name}"}
    if test is None:
        (train, test), notes["test"] = hold_out_rows(train, column), f"held out from {train_name}"
    train = limit_rows(train, column, data.max_train_images, seed)
    training = LabelledImages(MIMDataset(train, config, data, True, seed, labels.classes))
    check_classes(Labels(training.labels, labels.classes))
    loader.check(training, test, test_name or train_name)
    name = other_test_split(opened, train_name, test_name)
    validation_rows = loader.rows(name)
    if validation_rows is None:
        notes["validation"] = f"held out from {train_name}"
        training, validation = hold_out_validation(training, data.max_eval_images)
    else:
        notes["validation"] = f"split {name}"
        loader.check(training, validation_rows, str(name))
        validation = loader.images(validation_rows)
    testing = loader.images(test) if data.max_eval_images != 0 else None
    parts = {"training": training, "validation": validation, "test": testing}
    report.append(describe_classes(labels.classes))
    for title, part in parts.items():
        if part is not None:
            report.append(describe_part(title, len(part), Labels(part.labels, labels.classes), notes.get(title, "")))
    report += unused_splits(opened, [train_name, test_name, name])
    return LabelledSplits(training, validation, testing, labels.classes, notes, report, sample, data, opened.digest)


def hold_out_validation(training: LabelledImages, limit: int | None) -> tuple[LabelledImages, LabelledImages]:
    """Images to train on, and up to `limit` of a tenth of them, whole, to choose the best checkpoint by."""
    labels = training.labels.numpy()
    chosen, held = hold_out(labels, limit=HELD_OUT_LIMIT)
    held = held[draw_subset(labels[held], limit or len(held))]
    return LabelledImages(training.dataset, chosen), LabelledImages(training.dataset.without_augmentation(), held)


@dataclass
class EvaluationLoader:
    """Opens the splits for validation and test.

    Args:
        labels: of the training images.
        report: gets a line for what is left out.
    """

    opened: Opened
    column: str
    config: MIMConfig
    data: DataArguments
    labels: Labels
    report: list[str]

    def rows(self, name: str | None) -> datasets.Dataset | None:
        """The labelled rows of a split; None without such a split, or where it has no labels."""
        if name is None:
            return None
        split = self.opened[name]
        labels = read_labels(split, self.column, self.labels.classes) if self.column in split.features else None
        if labels is None or labels.missing == len(split):
            self.report.append(f"the split {name} has no labels: it is not used, and images are held out instead")
            return None
        if not labels.missing:
            return split
        self.report.append(f"{labels.missing:,} of {len(split):,} images of {name} have no label: left out")
        named = labels.numbers >= 0
        if labels.unknown:
            raise self._unknown(labels, name)
        return split.select(np.flatnonzero(named.numpy()))

    def check(self, training: LabelledImages, rows: datasets.Dataset, name: str) -> None:
        """Raises:
        DataError: a split has a class of which there is no training image.
        """
        labels = read_labels(rows, self.column, self.labels.classes)
        lacking = set(labels.numbers.tolist()) - {-1} - set(training.labels.tolist())
        labels.unknown.update({labels.classes[number]: int((labels.numbers == number).sum()) for number in lacking})
        if labels.unknown:
            raise self._unknown(labels, name)

    def images(self, rows: datasets.Dataset) -> LabelledImages:
        """At most `data.max_eval_images` of them, whole."""
        rows = limit_rows(rows, self.column, self.data.max_eval_images or None)
        return LabelledImages(MIMDataset(rows, self.config, self.data, False, 0, self.labels.classes))

    def _unknown(self, labels: Labels, name: str) -> DataError:
        return DataError(f"{unknown_class(labels, name)}: nothing could be learned of it", name)
