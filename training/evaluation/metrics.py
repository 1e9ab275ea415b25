"""Every metric, in one place: one entry gives its key in metrics.json and probe.json, its title in tables, pictures and
model cards, how it is computed, and what is said of it. All but CKA are in percent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_mim.training.evaluation.bootstrap import draw_counts, interval
from hf_mim.training.evaluation.cka import linear_cka
from hf_mim.training.evaluation.classification import TOP, accuracy, cross_entropy, f1_macro, top_accuracy
from hf_mim.training.evaluation.iou import mean_iou, pixel_accuracy
from hf_mim.training.evaluation.readouts import NEIGHBOURS, PENALTIES, TEMPERATURE, LinearProbe, NearestNeighbours


@dataclass(frozen=True)
class Metric:
    """An entry of the dicts below; its name there is its key in the files of results.

    Args:
        title: for people.
        compute: what the dict says.
        protocol: the sentence of metrics.json, probe.json and the model card.
        hub_type: what the Hub calls it.
    """

    title: str
    compute: Callable[..., Any]
    protocol: str = ""
    hub_type: str = "accuracy"


# Accuracies of frozen features. `compute` fits a classifier to the features of the training images; see `readouts.py`.
READOUTS = {
    "knn": Metric(
        "k-NN",
        NearestNeighbours,
        f"k-NN: a vote of the {NEIGHBOURS} nearest training examples by cosine, each weighing "
        f"exp(cosine / {TEMPERATURE}).",
    ),
    "linear": Metric(
        "linear probe",
        LinearProbe,
        "Linear probe: scikit-learn's logistic regression on standardised features, by L-BFGS; its penalty is the best "
        f"of {len(PENALTIES)} on a held-out fifth of the training images.",
    ),
}
# The vectors of an image that they read. The first, which every encoder has, stands beside the raw pixels.
POOLINGS = {"mean": "mean of the patches", "cls": "class token"}

# What becomes of an encoder that is trained further: readouts, in percent, and a likeness, which is a share.
FORGETTING = READOUTS | {
    "cka": Metric(
        "CKA to the start",
        linear_cka,
        "CKA to the start: how like the features are to those before training; 1 is the same up to rotation and scale.",
    )
}

# Of a classifier. `compute`: logits (images, classes), labels (images,) -> percent, or None where it says nothing.
CLASSIFICATION = {
    "accuracy": Metric("accuracy", accuracy),
    f"top{TOP}_accuracy": Metric(f"top-{TOP} accuracy", top_accuracy),
    "f1_macro": Metric("macro F1", f1_macro, hub_type="f1"),
}

# Of predicted masks. `compute`: counts (..., 3, classes), as of `pixel_counts` -> percent (...).
SEGMENTATION = {
    "mean_iou": Metric("mean IoU", mean_iou, hub_type="mean_iou"),
    "pixel_accuracy": Metric("pixel accuracy", pixel_accuracy),
}


@dataclass(frozen=True)
class FrozenScore:
    """A row of the table of a frozen encoder: a readout of a pooling.

    Args:
        key: below "trained" and "untrained" of metrics.json.
        raw_key: below "raw_pixels"; None without a counterpart there.
    """

    readout: str
    pooling: str
    title: str
    key: str
    raw_key: str | None


def frozen_scores() -> list[FrozenScore]:
    """Every readout of every pooling, in the order of tables and cards."""
    first = next(iter(POOLINGS))
    return [
        FrozenScore(name, pooling, f"{metric.title}, {vector}", f"{name}_{pooling}", name if pooling == first else None)
        for pooling, vector in POOLINGS.items()
        for name, metric in READOUTS.items()
    ]


def readout_protocol() -> dict[str, str]:
    """{key: sentence} of what reads out frozen features."""
    return {name: metric.protocol for name, metric in READOUTS.items()}


def format_forgetting(name: str, value: float) -> str:
    """A score of `FORGETTING`, for tables."""
    return f"{value:.2f}" if name == "cka" else f"{value:.1f}"


def score_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What `CLASSIFICATION` says, in percent, and "loss", the mean cross entropy. (Trainer's own counts the images of a
    short last batch several times, on several processes.)

    Args:
        logits: (images, classes).
        labels: (images,).
    """
    scores = {name: metric.compute(logits, labels) for name, metric in CLASSIFICATION.items()}
    known = {name: value for name, value in scores.items() if value is not None}
    return {**known, "loss": cross_entropy(logits, labels)}


def score_masks(counts: np.ndarray) -> dict[str, float]:
    """What `SEGMENTATION` says, in percent.

    Args:
        counts: (images, 3, classes), as of `pixel_counts`.
    """
    total = counts.sum(axis=0)
    return {name: float(metric.compute(total)) for name, metric in SEGMENTATION.items()}


def mask_intervals(counts: np.ndarray, other: np.ndarray | None = None, seed: int = 0) -> dict[str, list[float]]:
    """Bootstrap intervals of `score_masks` over the images.

    Args:
        counts: (images, 3, classes).
        other: of another prediction of the same images; the intervals are then those of the differences to it.
    """
    drawn = draw_counts(len(counts), np.random.default_rng(seed))

    def resampled(of: np.ndarray) -> np.ndarray:
        return (drawn @ of.reshape(len(of), -1)).reshape(-1, *of.shape[1:])

    totals, baseline = resampled(counts), None if other is None else resampled(other)
    return {
        name: interval(metric.compute(totals) - (0 if baseline is None else metric.compute(baseline)))
        for name, metric in SEGMENTATION.items()
    }
