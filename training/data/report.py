"""What a run uses and what it leaves out, in the lines that are printed before it begins."""

from collections.abc import Iterable

import numpy as np

from hf_mim.training.data.labels import Labels
from hf_mim.training.data.splits import Opened, draw_labelled


CLASSES_NAMED = 8  # with their counts


def describe_columns(image: str, label: str | None, **others: str) -> str:
    """Which columns were taken."""
    columns = {"images": image, "labels": label, **others}
    return "columns: " + ", ".join(f"{kind} from {name!r}" if name else f"no {kind}" for kind, name in columns.items())


def describe_classes(classes: list[str]) -> str:
    names = ", ".join(classes[:CLASSES_NAMED]) + (", ..." if len(classes) > CLASSES_NAMED else "")
    return f"classes: {len(classes)} ({names})"


def describe_part(name: str, count: int, labels: Labels | None = None, note: str = "", drawn: int | None = None) -> str:
    """How many images of which classes a split or a part of one has.

    Args:
        drawn: how many of those with a label are used at most, as of `draw_labelled`; None is all.
    """
    part = "" if drawn is None or drawn >= count else f"{drawn:,} of "
    line = f"{name}: {part}{count:,} images" + (f" ({note})" if note else "")
    if labels is None:
        return line
    numbers = labels.numbers.numpy()
    numbers = numbers[draw_labelled(numbers, drawn)] if part else numbers
    counts = np.bincount(numbers[numbers >= 0], minlength=len(labels.classes))
    if len(counts) <= CLASSES_NAMED:
        parts = [f"{name} {number:,}" for name, number in zip(labels.classes, counts)]
    else:
        empty = f", none of {(counts == 0).sum():,}" if (counts == 0).any() else ""
        low, high = (counts[counts > 0].min(), counts.max()) if counts.any() else (0, 0)
        parts = [f"{low:,}{f' to {high:,}' if high > low else ''} of each class{empty}"] if high else []
    parts += [f"{labels.missing:,} without a label"] if labels.missing else []
    return f"{line}: {', '.join(parts)}" if parts else line


def unused_splits(opened: Opened, used: Iterable[str | None], remedy: str = "") -> list[str]:
    """A line for each split that is not used."""
    return [f"split {name} ({len(opened[name]):,} images) is not used{remedy}" for name in opened if name not in used]


def without_evaluation(report: Iterable[str]) -> list[str]:
    """The lines of a report for commands that evaluate nothing."""
    return [line for line in report if not line.startswith("Not evaluated")]
