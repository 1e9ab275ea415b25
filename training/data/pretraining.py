"""What pretraining and probing work on: the images of a recipe, to train on and to evaluate on."""

from dataclasses import dataclass

import datasets

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import choose_splits, first_rows, hold_out_rows
from hf_mim.training.data.streaming import StreamedImages


FEWEST = 20  # images that a labelled data set must have for some to be held out


@dataclass
class Splits:
    """What a command works on.

    Args:
        train: to pretrain on, with crops and flips.
        train_eval, test: the same images, and others, without; None without labels.
        note: where `test` comes from, or why there is none, for people.
    """

    train: MIMDataset | StreamedImages
    train_eval: MIMDataset | None
    test: MIMDataset | None
    note: str


def load_splits(data: DataArguments, config: MIMConfig, seed: int = 0) -> Splits:
    """Opens the data set of a recipe.

    Raises:
        ValueError, OSError: it is missing, empty, without images, or its channels are not those of the config.
    """
    splits = open_dataset(data)
    train_name, test_name = choose_splits(splits, data)
    train = splits[train_name]
    if isinstance(train, datasets.IterableDataset):
        return Splits(StreamedImages(train, config, data, seed), None, None, "streaming data has no test split")
    _, label_column = find_columns(train.features, data)
    test, note = None, f"split {test_name}"
    if label_column is None:
        note = "no labels"
    elif test_name is not None:
        test = splits[test_name]
    elif len(train) < FEWEST:
        note = "too few images to hold any out"
    else:
        (train, test), note = hold_out_rows(train, label_column), f"held out from {train_name}"
    training = MIMDataset(first_rows(train, data.max_train_images), config, data, True, seed)
    if test is None:
        return Splits(training, None, None, note)
    testing = MIMDataset(test, config, data, False, seed, training.classes)
    if data.max_eval_images == 0:
        return Splits(training, None, None, "data.max_eval_images is 0")
    if not (all_labelled(training) and all_labelled(testing)):
        return Splits(training, None, None, "not every image has a label")
    return Splits(training, training.without_augmentation(), testing, note)


def all_labelled(dataset: MIMDataset) -> bool:
    return dataset.labels is not None and bool((dataset.labels >= 0).all())
