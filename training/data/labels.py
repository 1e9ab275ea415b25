"""The labels of images: class numbers, the names of the classes, and whether they make a classification.

- Whole numbers, as numbers or as text or as floats, are classes in the order of the numbers. If they begin with 0, each
  keeps its number, and a number in between that no image has is a class without images.
- Text, and class labels of `datasets`, are classes by name.
- An image whose label is missing, empty, NaN or negative has no label.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import datasets
import torch

from hf_mim.training.common.errors import DataError


WHOLE = re.compile(r"-?(0|[1-9]\d*)(\.0*)?")  # 007 is a name
MAX_GAP = 2  # classes from 0 on are numbered through if there are not more numbers than so many times classes


@dataclass
class Labels:
    """
    Args:
        numbers: (count,), -1 for images without a label and those of another class than `classes`.
        classes: names of the classes, in the order of their numbers.
        unknown: how many images there are of each other class.
    """

    numbers: torch.Tensor
    classes: list[str]
    unknown: Counter[str] = field(default_factory=Counter)

    @property
    def missing(self) -> int:
        """How many images have no label."""
        return int((self.numbers < 0).sum()) - self.unknown.total()

    @property
    def present(self) -> int:
        """Of how many classes there are images."""
        return len(self.numbers[self.numbers >= 0].unique())


def read_labels(dataset: datasets.Dataset, column: str, classes: list[str] | None = None) -> Labels:
    """The labels of a data set.

    Args:
        classes: those of the training images; None takes the ones in sight.

    Raises:
        DataError: the column holds something else than classes.
    """
    names, all_classes = class_names(dataset, column)
    classes = list(classes or all_classes)
    number = {name: i for i, name in enumerate(classes)}
    unknown = Counter(name for name in names if name is not None and name not in number)
    return Labels(torch.tensor([-1 if name is None else number.get(name, -1) for name in names]), classes, unknown)


def class_names(dataset: datasets.Dataset, column: str) -> tuple[list[str | None], list[str]]:
    """The name of each image's class, None without one; and the names of all classes, in order.

    Raises:
        DataError: as of `read_labels`.
    """
    values, feature = dataset[column][:], dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values], list(feature.names)
    values = [None if value is None or isinstance(value, float) and math.isnan(value) else value for value in values]
    texts = {value: str(value).strip() for value in set(values) - {None}}
    if not all(WHOLE.fullmatch(text) for text in texts.values() if text):
        if any(isinstance(value, float) for value in texts):
            example = next(value for value in texts if isinstance(value, float) and not value.is_integer())
            raise DataError(
                f"the column {column!r} holds {feature.dtype} values such as {example}, and classes are one whole "
                "number or text an image",
                column,
            )
        name_of = {value: text or None for value, text in texts.items()}
        return [name_of.get(value) for value in values], sorted(set(filter(None, name_of.values())))
    whole = {value: int(text.partition(".")[0]) for value, text in texts.items() if text}
    numbers = sorted({number for number in whole.values() if number >= 0})
    if numbers and numbers[0] == 0 and numbers[-1] < MAX_GAP * len(numbers):
        numbers = list(range(numbers[-1] + 1))
    name_of = {value: str(number) if number >= 0 else None for value, number in whole.items()}
    return [name_of.get(value) for value in values], [str(number) for number in numbers]


def check_classes(labels: Labels) -> None:
    """Raises:
    DataError: there are no two classes, or more classes than images.
    """
    count = len(labels.numbers) - labels.missing
    if labels.present < 2:
        name = labels.classes[int(labels.numbers.max())] if count else None
        unlabelled = f" ({labels.missing:,} others have none)" if labels.missing else ""
        if name is None:
            raise DataError("no training image has a label (missing, empty and negative ones are none)")
        raise DataError(
            f"all {count:,} labelled training images are of one class, {name!r}{unlabelled}: there is nothing to tell "
            "apart"
        )
    if count < len(labels.classes):
        raise DataError(f"{count:,} training images for {len(labels.classes):,} classes: fewer than one each")


def unknown_class(labels: Labels, name: str) -> str | None:
    """What is wrong with a split that has a class which the training images lack; None where it has no such.

    Args:
        labels, name: of the split.
    """
    if not labels.unknown:
        return None
    more = f", and {len(labels.unknown) - 1} more" if len(labels.unknown) > 1 else ""
    return f"class {min(labels.unknown)!r} is in the split {name} but not in the training images{more}"


def balanced_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """images / (classes * images of the class), as scikit-learn's "balanced"; 1 for a class without images."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1)), 1.0)
