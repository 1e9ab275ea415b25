"""What a classifier is worth: `evaluate.Metric` classes that need no network, and the picture of its confusions."""

from pathlib import Path

import datasets
import evaluate
import numpy as np


TOP = 5
NAMED = 40  # classes whose names, and
NUMBERED = 20  # classes whose counts are still legible in the picture


class ClassificationMetric(evaluate.Metric):
    """Made without arguments. Predictions and references are class numbers, or predictions are lists of them.

    Args:
        words: what it measures.
    """

    words = ""
    predictions = datasets.Value("int64")

    def __init__(self):
        super().__init__(keep_in_memory=True)  # else it would leave files in the cache of `evaluate`

    def _info(self):
        features = datasets.Features({"predictions": self.predictions, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.words, citation="", features=features)


class Accuracy(ClassificationMetric):
    words = "Percent of the images whose class is predicted."

    def _compute(self, predictions, references):
        return {"accuracy": 100 * float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopAccuracy(ClassificationMetric):
    words = "Percent of the images whose class is among those predicted."
    predictions = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions, references):
        found = (np.asarray(predictions) == np.asarray(references)[:, None]).any(axis=1)
        return {"top_accuracy": 100 * float(found.mean())}


class Confusion(ClassificationMetric):
    words = "How many images of every class (row) are predicted to be of every class (column)."

    def _compute(self, predictions, references, num_classes=None):
        predictions, references = np.asarray(predictions), np.asarray(references)
        count = num_classes or int(max(predictions.max(), references.max())) + 1
        flat = np.bincount(references * count + predictions, minlength=count**2)
        return {"confusion": flat.reshape(count, count).tolist()}


class MacroF1(ClassificationMetric):
    words = "Mean over the classes of the harmonic mean of precision and recall, in percent; classes that are neither "
    words += "there nor predicted are left out, as scikit-learn leaves them out."

    def _compute(self, predictions, references):
        matrix = np.array(Confusion().compute(predictions=predictions, references=references)["confusion"])
        right, either = matrix.diagonal(), matrix.sum(axis=0) + matrix.sum(axis=1)
        return {"f1_macro": 100 * float(np.mean(2 * right[either > 0] / either[either > 0]))}


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"accuracy", "f1_macro"} in percent, with more than five classes "top5_accuracy", and "loss", the mean cross
    entropy. (Trainer's own counts the images of a short last batch several times, on several processes.)

    Args:
        logits: (images, classes).
        labels: (images,).
    """
    predictions = logits.argmax(axis=1)
    scores = Accuracy().compute(predictions=predictions, references=labels)
    scores |= MacroF1().compute(predictions=predictions, references=labels)
    if logits.shape[1] > TOP:
        best = np.argpartition(-logits, TOP, axis=1)[:, :TOP]
        scores[f"top{TOP}_accuracy"] = TopAccuracy().compute(predictions=best, references=labels)["top_accuracy"]
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return scores | {"loss": float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - own))}


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes), int: images of the row's class that are taken for the column's."""
    found = Confusion().compute(predictions=logits.argmax(axis=1), references=labels, num_classes=logits.shape[1])
    return np.array(found["confusion"])


def draw_confusion(matrix: np.ndarray, classes: list[str], path: Path) -> None:
    """Writes the picture of a confusion matrix: shares of every row in colour, counts as long as they are legible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(classes)
    side = min(max(5.0, 1.5 + 0.5 * count), 12.0)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")  # no pyplot: it would ask for a display
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the images of the row's class", shrink=0.8)
    right = 100 * matrix.diagonal().sum() / max(1, matrix.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"{matrix.sum():,} images, {right:.1f} percent right")
    if count <= NAMED:
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in classes]
        axes.set_xticks(range(count), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), short)
    if count <= NUMBERED:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path)
