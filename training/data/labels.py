"""The labels of images: class numbers, the names of the classes, and whether they make a classification."""

import datasets
import torch

from hf_mim.training.errors import DataError


def read_labels(
    dataset: datasets.Dataset, column: str | None, classes: list[str] | None = None
) -> tuple[torch.Tensor | None, list[str]]:
    """Class numbers (count,), and the classes' names; an image without a class has -1.

    Args:
        column: None is a data set without labels.
        classes: names of the classes, in the order of their numbers, where labels are text; None takes all in sight.
    """
    if column is None:
        return None, []
    values, feature = dataset[column][:], dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return torch.tensor([-1 if value is None else value for value in values]), list(feature.names)
    names = classes or sorted({str(value) for value in values if value is not None})
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number.get(str(value), -1) for value in values]), names


def check_labelled(dataset: datasets.Dataset, column: str, place: str) -> None:
    """Raises:
    DataError: an image has no label.
    """
    if column not in dataset.features:
        raise DataError(f"{place} has no column {column!r}", place)
    values = dataset[column][:]
    marks_none = isinstance(dataset.features[column], datasets.ClassLabel)  # by -1
    missing = sum(value is None or (marks_none and value < 0) for value in values)
    if missing:
        raise DataError(f"{missing:,} of the {len(values):,} images in {place} have no label in {column!r}", place)


def check_classes(labels: torch.Tensor, classes: list[str]) -> None:
    """Raises:
    DataError: there are no two classes, or more classes than images.
    """
    present, count = labels.unique(), len(labels)
    if len(present) < 2:
        name = classes[int(present[0])]
        raise DataError(f"all {count:,} training images are of one class, {name!r}: there is nothing to tell apart")
    if count < len(classes):
        raise DataError(f"{count:,} training images for {len(classes):,} classes: fewer than one each")


def check_known(dataset: datasets.Dataset, column: str, name: str, labels: torch.Tensor, classes: list[str]) -> None:
    """
    Args:
        name: of the split.
        labels, classes: of the training images.

    Raises:
        DataError: a class of a split that is not among the training images.
    """
    values, feature = set(dataset[column][:]), dataset.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        unseen = {str(value) for value in values} - set(classes)
    else:
        unseen = {feature.names[value] for value in values} - {classes[number] for number in labels.unique()}
    if unseen:
        more = f", and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        raise DataError(
            f"class {min(unseen)!r} is in the split {name} but not in the training images{more}: nothing could be "
            "learned of it"
        )


def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """images / (classes * images of the class), as scikit-learn's "balanced"; 1 for a class without images."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1)), 1.0)
