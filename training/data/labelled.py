"""Labelled images in three splits: to train on, to choose the best checkpoint by, and to test on once."""

from dataclasses import dataclass

import datasets

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.augment import LabelledImages
from hf_mim.training.data.columns import find_label_column
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.labels import check_classes, check_known, check_labelled
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import (
    HELD_OUT_LIMIT,
    choose_splits,
    draw_subset,
    first_rows,
    hold_out,
    hold_out_rows,
    other_test_split,
)


@dataclass
class LabelledSplits:
    """
    Args:
        classes: names, in the order of their numbers.
        notes: {"validation", "test"}: where each comes from, for people.
        test: None where `data.max_eval_images` is 0.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages | None
    classes: list[str]
    notes: dict[str, str]


def load_labelled_splits(data: DataArguments, config: MIMConfig, seed: int = 0) -> LabelledSplits:
    """Opens the data set of a recipe. `test` is the split that pretraining and probing test on too; `validation` is a
    split of its own where there is one besides, else a tenth of the training images.

    Raises:
        ValueError, OSError: as of `load_splits`, or the labels are not those of a classification.
    """
    splits = open_dataset(data)
    train_name, test_name = choose_splits(splits, data)
    train, column = splits[train_name], find_label_column(splits[train_name].features, data)
    notes = {"test": f"split {test_name}"}
    if test_name is None:
        (train, test), notes["test"] = hold_out_rows(train, column), f"held out from {train_name}"
    else:
        test = splits[test_name]
    train = first_rows(train, data.max_train_images)
    check_labelled(train, column, f"the split {train_name}")
    training = LabelledImages(MIMDataset(train, config, data, True, seed))
    classes = training.dataset.classes
    check_classes(training.labels, classes)
    name = other_test_split(splits, train_name, test_name)
    if name is None:
        notes["validation"] = f"held out from {train_name}"
        training, validation = hold_out_validation(training, data.max_eval_images)
    else:
        notes["validation"] = f"split {name}"
        validation = evaluation_images(splits[name], column, name, training, config, data)
    testing = None
    if data.max_eval_images != 0:
        testing = evaluation_images(test, column, test_name or "test", training, config, data)
    return LabelledSplits(training, validation, testing, classes, notes)


def hold_out_validation(training: LabelledImages, limit: int | None) -> tuple[LabelledImages, LabelledImages]:
    """Images to train on, and up to `limit` of a tenth of them, whole, to choose the best checkpoint by."""
    labels = training.labels.numpy()
    chosen, held = hold_out(labels, limit=HELD_OUT_LIMIT)
    held = held[draw_subset(labels[held], limit or len(held))]
    return LabelledImages(training.dataset, chosen), LabelledImages(training.dataset.without_augmentation(), held)


def evaluation_images(
    split: datasets.Dataset, column: str, name: str, training: LabelledImages, config: MIMConfig, data: DataArguments
) -> LabelledImages:
    """At most `data.max_eval_images` of a split, whole.

    Raises:
        DataError: an image has no label, or a class that is not among the training images.
    """
    check_labelled(split, column, f"the split {name}")
    check_known(split, column, name, training.labels, training.dataset.classes)
    if data.max_eval_images:
        split = split.select(draw_subset(split[column][:], data.max_eval_images))
    return LabelledImages(MIMDataset(split, config, data, False, 0, training.dataset.classes))
