"""Labelled images in three splits: to learn from, to choose the best checkpoint by, and to test on once."""

from dataclasses import dataclass

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data import sources
from hf_mim.training.data.augment import LabelledImages
from hf_mim.training.data.pretraining import MIMDataset
from hf_mim.training.data.sources import HELD_OUT, HELD_OUT_MOST, DataArguments
from hf_mim.training.evaluation import metrics


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
    splits = sources.open_dataset(data)
    train_name, test_name = sources.choose_splits(splits, data)
    train, column = splits[train_name], label_column(splits[train_name].features, data)
    notes = {"test": f"split {test_name}"}
    if test_name is None:
        (train, test), notes["test"] = sources.hold_out(train), f"held out from {train_name}"
    else:
        test = splits[test_name]
    if data.max_train_images is not None:
        train = train.select(range(min(data.max_train_images, len(train))))
    count_labels(train, column, f"the split {train_name}")
    training = MIMDataset(train, config, data, True, seed)
    check_classes(training)
    chosen, most = np.arange(len(training)), data.max_eval_images
    name = next((n for n in sources.TEST_NAMES if n in splits and n not in (train_name, test_name)), None)
    if name is None:
        chosen, held = hold_out_labelled(training.labels.numpy())
        held = held[metrics.subset_indices(len(held), most or len(held))]
        validation = LabelledImages(training.without_augmentation(), held)
    else:
        validation = other_split(splits[name], column, name, training, config, data)
    notes["validation"] = f"held out from {train_name}" if name is None else f"split {name}"
    testing = None if most == 0 else other_split(test, column, test_name or "test", training, config, data)
    return LabelledSplits(LabelledImages(training, chosen), validation, testing, training.classes, notes)


def other_split(split, column: str, name: str, training: MIMDataset, config, data) -> LabelledImages:
    """At most `data.max_eval_images` of a split, whole images.

    Raises:
        ValueError: an image has no label, or a class that is not among the training images.
    """
    count_labels(split, column, f"the split {name}")
    values, feature = set(split[column][:]), split.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        unseen = {str(value) for value in values} - set(training.classes)
    else:
        known = {training.classes[number] for number in training.labels.unique()}
        unseen = {feature.names[value] for value in values} - known
    if unseen:
        more = f", and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise ValueError(
            f"class {sorted(unseen)[0]!r} is in the split {name} but not in the training images{more}: nothing could "
            "be learned of it"
        )
    if data.max_eval_images:
        split = split.select(metrics.subset_indices(len(split), data.max_eval_images))
    return LabelledImages(MIMDataset(split, config, data, False, 0, training.classes))


# ---- labels --------------------------------------------------------------------------------------------------------
def label_column(features: dict, data: DataArguments) -> str:
    """The name of the column with the classes.

    Raises:
        ValueError: there is none, or what is named holds no classes.
    """
    _, column = sources.find_columns(features, data)
    named = column or next((name for name in sources.LABEL_NAMES if name in features), None)
    if named is None:
        raise ValueError(
            f"fine-tuning needs labels, and the columns are only {', '.join(features)}: name one in data.label_column; "
            "a folder of images has labels if it holds one folder for each of at least two classes"
        )
    feature = features[named]
    if not isinstance(feature, datasets.ClassLabel):
        dtype = getattr(feature, "dtype", None)
        if dtype not in ("string", "large_string", "bool") and "int" not in str(dtype):
            kind = f"{dtype} values" if isinstance(feature, datasets.Value) else "several values an image"
            raise ValueError(
                f"the column {named!r} holds {kind}, and fine-tuning learns classes: one whole number or text an image"
            )
    return named


def count_labels(split, column: str, where: str) -> None:
    """Raises:
    ValueError: an image has no label.
    """
    if column not in split.features:
        raise ValueError(f"{where} has no column {column!r}")
    values = split[column][:]
    marks_none = isinstance(split.features[column], datasets.ClassLabel)  # by -1
    missing = sum(value is None or (marks_none and value < 0) for value in values)
    if missing:
        raise ValueError(f"{missing:,} of the {len(values):,} images in {where} have no label in {column!r}")


def check_classes(training: MIMDataset) -> None:
    """Raises:
    ValueError: there are no two classes, or more classes than images.
    """
    present, count = training.labels.unique(), len(training)
    if len(present) < 2:
        name = training.classes[int(present[0])]
        raise ValueError(f"all {count:,} training images are of one class, {name!r}: there is nothing to tell apart")
    if count < len(training.classes):
        raise ValueError(f"{count:,} training images for {len(training.classes):,} classes: fewer than one each")


def hold_out_labelled(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> positions to train on and a tenth of them held out, at random but always the same; every class keeps an image
    to train on.

    Raises:
        ValueError: there is no image to spare.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    spare = np.delete(order, first)
    if len(spare) == 0:
        raise ValueError(
            f"{len(labels)} training images, one of each class: none can be held out to choose the best by"
        )
    held = np.sort(spare[: max(1, min(int(len(labels) * HELD_OUT), HELD_OUT_MOST))])
    return np.setdiff1d(np.arange(len(labels)), held), held


def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """images / (classes * images of the class), as scikit-learn's "balanced"; 1 for a class without images."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1)), 1.0)
