"""What a measurement is: the contract between the shared pass (`run.py`), the measurements and the report.

A measurement is a class in `MEASUREMENTS`, made once per encoder as `Measurement(model, setting)`. During the one pass
over the images it is called, for every batch, in this order:

    attention(block, weights), branch(block, entering, added)   while the encoder computes, if `watches_attention`
    layer(index, layer)                                         for the tokens entering the first block and leaving each
    update(seen)                                                once, with the final tokens and the labels

and afterwards `result()` once. It overrides what it needs. Where `absent` holds a sentence after `__init__`, the
encoder or the data does not allow the measurement: nothing is called, and the sentence stands in the report.

`result()` is plain JSON:

    {"title": "Attention flow",
     "summary": what the numbers say of this encoder, a sentence or two,
     "normal": what is normal and what is a sign of trouble, a sentence or two,
     "images": how many images the numbers are of,
     "curves": {name: {"x": [...], "mean": [...], "low": [...], "high": [...], "x_label": "block", "y_label": "mass of
                attention", "unit": "", "title": "[cls] to itself"}},
     "scalars": {name: {"title", "value", "low", "high", "unit", "normal": a sentence}},
     "heatmaps": {name: {"title", "values": [[...]], "x": [...], "y": [...], "x_label", "y_label"}},
     "maps": {name: {"title", "images": [image][block][row][column]}}}      of the images `example-<i>.png`

`low` and `high` are the 95 % confidence interval of the mean over images, None where there is none. The last four may
be missing or empty. An absent measurement is {"title", "absent": the sentence}. `compare(measured)` may add a result
of the same form that says something of several encoders together.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_mim.modeling.encoder_base import Grid


NORMAL_95 = 1.959964  # standard errors on either side of the mean


@dataclass
class Setting:
    """What holds for the whole pass of one encoder.

    images: how many images there are.
    grid: (rows, cols) of the encoder's final tokens.
    common_grid: the smallest final grid of four tokens and more among the encoders that are compared; None where
        there is no such grid.
    classes: names of the classes; empty without labels.
    prototypes: (classes, dim), the mean pooled final features of other images of every class, rows of zeros for
        classes that had none; None without labels.
    examples: of how many images, the first ones, maps are wanted.
    seed: of what is drawn at random.
    """

    images: int
    grid: Grid
    common_grid: Grid | None
    classes: list[str]
    prototypes: Tensor | None = None
    examples: int = 4
    seed: int = 0


class Layer:
    """The patch tokens (batch, rows * cols, dim) between two blocks, and what several measurements ask of them."""

    def __init__(self, tokens: Tensor, grid: Grid):
        self.tokens, self.grid = tokens, grid

    @cached_property
    def mean(self) -> Tensor:
        """(batch, dim)"""
        return self.tokens.mean(dim=1)

    @cached_property
    def centred(self) -> Tensor:
        """(batch, rows * cols, dim), less their image's mean."""
        return self.tokens - self.mean[:, None]

    @cached_property
    def norms(self) -> Tensor:
        """(batch, rows * cols), euclidean."""
        return self.tokens.norm(dim=2)

    @cached_property
    def centred_norms(self) -> Tensor:
        """(batch, rows * cols), of `centred`."""
        return self.centred.norm(dim=2)


@dataclass
class Seen:
    """One batch.

    first: the number of its first image.
    pixel_values: (batch, channels, height, width), normalised.
    labels: (batch,), or None.
    tokens: (batch, prefix + rows * cols, dim), after the final norm.
    final: the patches among them.
    """

    first: int
    pixel_values: Tensor
    labels: Tensor | None
    tokens: Tensor
    final: Layer


class Measurement:
    """See the module's docstring."""

    title = ""
    normal = ""
    watches_attention = False
    needs_prototypes = False

    def __init__(self, model, setting: Setting):
        self.setting = setting
        self.absent: str | None = None

    def attention(self, block: int, weights: Tensor) -> None:
        """weights (batch, heads, length, length), rows sum to 1; not to be kept, nor changed."""

    def branch(self, block: int, entering: Tensor, added: Tensor) -> None:
        """entering (batch, length, dim), the tokens that enter the block; added, what its attention adds to them."""

    def layer(self, index: int, layer: Layer) -> None:
        """index 0 is what enters the first block, index i what leaves the i-th."""

    def update(self, seen: Seen) -> None:
        """The end of a batch."""

    def result(self) -> dict:
        raise NotImplementedError

    @classmethod
    def compare(cls, measured: Mapping[str, Any]) -> dict | None:
        """A result on several encoders together; `measured` is {label: the measurement after its pass}."""
        return None


class Averages:
    """Means over images of named numbers per block, with confidence intervals, in constant memory."""

    def __init__(self):
        # name -> {block: [count, sum, sum of squares]}
        self.sums: defaultdict[str, dict[int, list[float]]] = defaultdict(dict)

    def add(self, name: str, block: int, values: Tensor) -> None:
        """values (batch,), one number per image."""
        values = values.cpu().double()  # Apple's GPUs have no float64
        entry = self.sums[name].setdefault(block, [0, 0.0, 0.0])
        entry[0] += len(values)
        entry[1] += values.sum().item()
        entry[2] += values.square().sum().item()

    def mean(self, name: str, block: int) -> float:
        count, total, _ = self.sums[name][block]
        return total / count

    def interval(self, name: str, block: int) -> tuple[float, float, float]:
        """-> mean, low, high"""
        count, total, squares = self.sums[name][block]
        mean = total / count
        variance = max(squares / count - mean**2, 0.0) * count / max(count - 1, 1)
        margin = NORMAL_95 * (variance / count) ** 0.5
        return mean, mean - margin, mean + margin

    def curve(self, name: str, title: str, y_label: str, unit: str = "", x_label: str = "block", x=None) -> dict:
        """The result's form of a curve over the blocks; `x` replaces their numbers."""
        blocks = sorted(self.sums[name])
        mean, low, high = zip(*(self.interval(name, block) for block in blocks))
        axes = {"x": list(x or blocks), "x_label": x_label, "y_label": y_label, "unit": unit, "title": title}
        return {**axes, "mean": list(mean), "low": list(low), "high": list(high)}

    def scalar(self, name: str, title: str, unit: str = "", normal: str = "", block: int = 0) -> dict:
        """The result's form of one number."""
        mean, low, high = self.interval(name, block)
        return {"title": title, "value": mean, "low": low, "high": high, "unit": unit, "normal": normal}


def number(title: str, value: float | None, unit: str = "", normal: str = "") -> dict:
    """The result's form of a number without a confidence interval."""
    return {"title": title, "value": value, "low": None, "high": None, "unit": unit, "normal": normal}


def nested(values: Tensor, digits: int = 5) -> list:
    """As nested lists, rounded: JSON that a person can read and a page can carry."""
    return torch.round(values.cpu().double(), decimals=digits).tolist()
