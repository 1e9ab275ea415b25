"""How alike the representations of two layers are: linear CKA (1905.00414) by unbiased mini-batches (2010.15327)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_mim.analysis.measurement import NORMAL_95, Layer, Measurement, Setting, nested, number
from hf_mim.analysis.numbers import readable
from hf_mim.training.evaluation.cka import FEWEST, centred_gram, hsic, ratio


WINDOW = 64  # images whose similarities are compared with one another, whatever the batch size


def in_words(value: Tensor) -> str:
    return f"a CKA of {value:.2f}" if value == value else "no CKA (one of them does not vary between images)"


def without_nan(values: list) -> list:
    return [[None if value != value else value for value in row] for row in values]


class CKA(Measurement):
    """Linear CKA between what enters the first block and what leaves each block, and between encoders: the mean patch
    tokens of 64 images at a time are rows. 1: the same up to rotation and scale; 0: unrelated. Unbiased: values
    somewhat below 0 or above 1 are noise.
    """

    title = "Similarity of layers (linear CKA)"
    normal = (
        "Neighbouring blocks are alike (near 1), and likeness fades with distance. A sign of trouble is a large square "
        "of blocks that are all alike: they change little, and the encoder may be deeper than it needs to be. The "
        "untrained encoder is often such a square; a last block that is as like its first one says little was learned."
    )

    def __init__(self, model, setting: Setting):
        super().__init__(model, setting)
        self.count = 0
        self.waiting: list[list[Tensor]] = []
        self.windows: list[Tensor] = []
        if setting.images < FEWEST:
            self.absent = f"It needs at least {FEWEST} images, and there are {setting.images}."

    def layer(self, index: int, layer: Layer) -> None:
        if index == len(self.waiting):
            self.waiting.append([])
        self.waiting[index].append(layer.mean.cpu())

    def update(self, seen) -> None:
        self.count += len(seen.pixel_values)
        while sum(map(len, self.waiting[0])) >= WINDOW:
            self._close(WINDOW)

    def _close(self, count: int) -> None:
        """Compares the first `count` of the images that wait."""
        together = [torch.cat(parts) for parts in self.waiting]
        self.windows.append(torch.stack([centred_gram(features[:count]) for features in together]))
        self.waiting = [[features[count:]] for features in together]

    def finish(self) -> None:
        """The images that did not fill a window make a smaller one, or are left out where they are too few."""
        left = sum(map(len, self.waiting[0])) if self.waiting else 0
        if left >= FEWEST:
            self._close(left)
        self.waiting = []

    def result(self) -> dict:
        self.finish()
        own = hsic(self.windows, self.windows)
        values = ratio(own, own, own)
        return {
            "title": self.title,
            "summary": f"What leaves the last block has {in_words(values[-1, 0])} with what enters the first and "
            f"{in_words(values[-1, -2])} with what leaves the one before.",
            "normal": self.normal,
            "images": self.count,
            "heatmaps": {"layers": heatmap("between the blocks of this encoder", values)},
        }

    @classmethod
    def compare(cls, measured: Mapping[str, "CKA"]) -> dict | None:
        """Between all layers of every two encoders, and of the last blocks with an interval by jackknife."""
        for measurement in measured.values():
            measurement.finish()
        labels, own = list(measured), {label: hsic(m.windows, m.windows) for label, m in measured.items()}
        heatmaps, scalars = {}, {}
        for i, one in enumerate(labels):
            for other in labels[i + 1 :]:
                cross = hsic(measured[one].windows, measured[other].windows)
                values, name = ratio(cross, own[one], own[other]), f"{one} / {other}"
                heatmaps[name] = heatmap(f"between {one} and {other}", values, one, other)
                scalars[name] = jackknife(f"last blocks of {one} and {other}", cross, own[one], own[other])
        known = [scalar for scalar in scalars.values() if scalar["value"] is not None]
        if not known:
            return None
        nearest = max(known, key=lambda scalar: scalar["value"])
        return {
            "title": cls.title,
            "summary": f"Most alike are the {nearest['title']}, with a CKA of {readable(nearest['value'])}.",
            "normal": cls.normal,
            "images": next(iter(measured.values())).count,
            "heatmaps": heatmaps,
            "scalars": scalars,
        }


def heatmap(title: str, values: Tensor, one: str = "", other: str = "") -> dict:
    """Rows are the layers of `one`: they are the y axis."""
    rows, cols = (list(range(count)) for count in values.shape)
    labels = [f"block of {label}" if label else "block" for label in (other, one)]
    shown = without_nan(nested(values))
    return {"title": title, "values": shown, "x": cols, "y": rows, "x_label": labels[0], "y_label": labels[1]}


def jackknife(title: str, cross: Tensor, first: Tensor, second: Tensor) -> dict:
    """The CKA of the last layers, with a 95 % interval where there are at least 3 windows, by leaving each out."""
    last = [part[:, -1:, -1:] for part in (cross, first, second)]
    value, count = ratio(*last).item(), len(cross)
    if value != value:
        return number(title, None)
    if count < 3:
        return number(title, value)
    left = torch.stack([ratio(*(part[torch.arange(count) != i] for part in last)) for i in range(count)])
    margin = NORMAL_95 * ((count - 1) * left.var(correction=0).item()) ** 0.5
    return {**number(title, value), "low": value - margin, "high": value + margin}
