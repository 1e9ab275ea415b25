"""How well masks were predicted: mean IoU and pixel accuracy, with bootstrap intervals over the images."""

import datasets
import evaluate
import numpy as np

from hf_mim.training.data.masks import IGNORE


RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap
DESCRIPTION = """Mean over the classes of intersection / union of predicted and true pixels, counted over all images; a
class that is neither there nor predicted is left out. Pixels whose true id is `ignore_index` do not count."""


def pixel_counts(predicted: np.ndarray, mask: np.ndarray, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """How many pixels of one image are right, predicted and true, of each class: int64 (3, classes).

    Args:
        predicted, mask: class ids of the same shape; pixels where the mask is `ignore` do not count.
    """
    known = mask != ignore
    predicted, mask = predicted[known], mask[known]
    values = (mask[predicted == mask], predicted, mask)
    return np.stack([np.bincount(ids.ravel(), minlength=classes) for ids in values]).astype(np.int64)


def ious(counts: np.ndarray) -> np.ndarray:
    """(..., 3, classes) as of `pixel_counts`, summed over images -> IoU by class in [0, 1], NaN without a union."""
    right, predicted, true = np.moveaxis(counts, -2, 0)
    union = predicted + true - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def scores(counts: np.ndarray) -> dict[str, float]:
    """{"mean_iou", "pixel_accuracy"}, percent.

    Args:
        counts: (images, 3, classes), as of `pixel_counts`.
    """
    total = counts.sum(axis=0)
    return {name: float(value) for name, value in _summaries(total).items()}


def _summaries(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Of (..., 3, classes), with the leading axes kept."""
    found = ious(totals)
    present = ~np.isnan(found)
    mean = np.where(present, found, 0).sum(-1) / np.maximum(present.sum(-1), 1)
    accuracy = totals[..., 0, :].sum(-1) / np.maximum(totals[..., 2, :].sum(-1), 1)
    return {"mean_iou": 100 * mean, "pixel_accuracy": 100 * accuracy}


def intervals(counts: np.ndarray, other: np.ndarray | None = None, seed: int = 0) -> dict[str, list[float]]:
    """Bootstrap intervals of `scores`, 95 percent: the images are drawn again, with replacement, `RESAMPLES` times.

    Args:
        counts: (images, 3, classes).
        other: of another prediction of the same images; the intervals are then those of the differences to it.
    """
    rng, images = np.random.default_rng(seed), len(counts)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    found = _summaries(_resampled(weights, counts))
    if other is not None:
        before = _summaries(_resampled(weights, other))
        found = {name: values - before[name] for name, values in found.items()}
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    return {name: np.percentile(values, tails).tolist() for name, values in found.items()}


def _resampled(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(resamples, images), (images, 3, classes) -> (resamples, 3, classes)"""
    return (weights @ counts.reshape(len(counts), -1)).reshape(len(weights), *counts.shape[1:])


class MeanIoU(evaluate.Metric):
    """`MeanIoU().compute(predictions=maps, references=masks, num_classes=K)`: the scores of `scores`, and "iou", a list
    with one entry per class, percent, NaN where there is no union. Maps are (height, width), of any sizes."""

    def __init__(self):
        super().__init__(keep_in_memory=True)  # else it would leave files in the cache of `evaluate`

    def _info(self):
        ids = datasets.List(datasets.List(datasets.Value("int32")))
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, predictions, references, num_classes: int, ignore_index: int = IGNORE):
        pairs = zip(predictions, references, strict=True)
        counts = np.stack([pixel_counts(np.array(p), np.array(r), num_classes, ignore_index) for p, r in pairs])
        return {**scores(counts), "iou": (100 * ious(counts.sum(axis=0))).tolist()}
