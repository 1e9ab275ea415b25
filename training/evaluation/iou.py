"""How well masks were predicted: counts of pixels, and mean IoU and pixel accuracy of them."""

import datasets
import evaluate
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from hf_mim.training.data.masks import IGNORE


DESCRIPTION = """Mean over the classes of intersection / union of predicted and true pixels, counted over all images; a
class that is neither there nor predicted is left out. Pixels whose true id is `ignore_index` do not count."""


def predict_mask(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class scores (classes, rows, cols) -> the best class of every pixel (height, width), scores upsampled first."""
    return F.interpolate(scores[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(0)


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


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """(..., 3, classes) -> percent (...), the mean over the classes that are there or predicted."""
    by_class = ious(counts)
    present = ~np.isnan(by_class)
    return 100 * np.where(present, by_class, 0).sum(-1) / np.maximum(present.sum(-1), 1)


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """(..., 3, classes) -> percent (...)."""
    return 100 * counts[..., 0, :].sum(-1) / np.maximum(counts[..., 2, :].sum(-1), 1)


class MeanIoU(evaluate.Metric):
    """`MeanIoU().compute(predictions=maps, references=masks, num_classes=K)`: "mean_iou" and "pixel_accuracy", percent,
    and "iou", a list with one entry per class, NaN where there is no union. Maps are (height, width), of any sizes."""

    def __init__(self):
        super().__init__(keep_in_memory=True)  # else it would leave files in the cache of `evaluate`

    def _info(self):
        ids = datasets.List(datasets.List(datasets.Value("int32")))
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(self, predictions, references, num_classes: int, ignore_index: int = IGNORE):
        pairs = zip(predictions, references, strict=True)
        counts = [pixel_counts(np.array(p), np.array(r), num_classes, ignore_index) for p, r in pairs]
        total = np.sum(counts, axis=0)
        scores = {"mean_iou": float(mean_iou(total)), "pixel_accuracy": float(pixel_accuracy(total))}
        return {**scores, "iou": (100 * ious(total)).tolist()}
