"""How well a classifier does: `evaluate.Metric` classes over scikit-learn, which need no network."""

import datasets
import evaluate
import numpy as np


TOP = 5


class ClassificationMetric(evaluate.Metric):
    """Made without arguments. Predictions and references are class numbers, or predictions are lists of them.

    Args:
        summary: what it measures.
    """

    summary = ""
    predictions = datasets.Value("int64")

    def __init__(self):
        super().__init__(keep_in_memory=True)  # else it would leave files in the cache of `evaluate`

    def _info(self):
        features = datasets.Features({"predictions": self.predictions, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.summary, citation="", features=features)


class Accuracy(ClassificationMetric):
    summary = "Percent of the images whose class is predicted."

    def _compute(self, predictions, references):
        from sklearn.metrics import accuracy_score

        return {"accuracy": 100 * float(accuracy_score(references, predictions))}


class TopAccuracy(ClassificationMetric):
    summary = "Percent of the images whose class is among those predicted."
    predictions = datasets.List(datasets.Value("int64"))

    def _compute(self, predictions, references):
        right = (np.asarray(predictions) == np.asarray(references)[:, None]).any(axis=1)
        return {"top_accuracy": 100 * float(right.mean())}


class Confusion(ClassificationMetric):
    summary = "How many images of every class (row) are predicted to be of every class (column)."

    def _compute(self, predictions, references, num_classes=None):
        from sklearn.metrics import confusion_matrix as count

        classes = num_classes or int(max(np.max(predictions), np.max(references))) + 1
        return {"confusion": count(references, predictions, labels=np.arange(classes)).tolist()}


class MacroF1(ClassificationMetric):
    summary = """Mean over the classes of the harmonic mean of precision and recall, in percent; classes that are
    neither there nor predicted are left out."""

    def _compute(self, predictions, references):
        from sklearn.metrics import f1_score

        return {"f1_macro": 100 * float(f1_score(references, predictions, average="macro"))}


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Percent. Here and below: logits (images, classes), labels (images,)."""
    return Accuracy().compute(predictions=logits.argmax(axis=1), references=labels)["accuracy"]


def top_accuracy(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Percent of the images whose class is among the best `TOP`; None where there are no more classes than that."""
    if logits.shape[1] <= TOP:
        return None
    best = np.argpartition(-logits, TOP, axis=1)[:, :TOP]
    return TopAccuracy().compute(predictions=best, references=labels)["top_accuracy"]


def f1_macro(logits: np.ndarray, labels: np.ndarray) -> float:
    """Percent."""
    return MacroF1().compute(predictions=logits.argmax(axis=1), references=labels)["f1_macro"]


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean, nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    of_the_class = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - of_the_class))


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes), int: images of the row's class that are taken for the column's."""
    result = Confusion().compute(predictions=logits.argmax(axis=1), references=labels, num_classes=logits.shape[1])
    return np.array(result["confusion"])
