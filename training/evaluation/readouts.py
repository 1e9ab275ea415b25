"""Classifiers fitted to the features of a frozen encoder: k nearest neighbours and logistic regression.

Both are called with (features, labels, classes, held_out, score) to be fitted, and with features to give the scores of
the classes. They take any features: constant or repeated ones, more of them than images, none at all, one class only.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.training.data.splits import hold_out


NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of scikit-learn, from the strongest penalty to the weakest
FOLDS = 5  # of a cross-validation
PATIENCE = 2  # penalties in a row that do worse than the best, after which weaker ones are not tried
MAX_STEPS, TOLERANCE = 200, 3e-4  # of L-BFGS; the tolerance is of the slope of the mean loss
UNSEEN = -1e4  # the logit of a class without a training example; finite, since maps of logits are interpolated

Score = Callable[[Tensor, Tensor], float]  # (predicted classes, true classes), both (examples,)


def percent(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy, percent."""
    return 100 * (predicted == labels).double().mean().item()


class NearestNeighbours:
    """A vote of the k nearest training examples by cosine, each weighing exp(cosine / temperature) (DINO, 2104.14294).

    Args:
        features: (examples, dim).
        labels: class numbers (examples,).
        classes: how many there are; None is up to the highest label.
        held_out, score: not used, since there is no setting to choose.
        temperature: None lets all neighbours count the same.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int | None = None,
        held_out: Tensor | None = None,
        score: Score = percent,
        k: int = NEIGHBOURS,
        temperature: float | None = TEMPERATURE,
    ):
        self.features, self.labels, self.temperature = F.normalize(features, dim=1), labels, temperature
        self.classes = classes or int(labels.max()) + 1
        self.k = min(k, len(features))

    def __call__(self, features: Tensor) -> Tensor:
        """(examples, dim) -> shares of the vote (examples, classes)."""
        shares = []
        for part in F.normalize(features, dim=1).split(1000):
            similarity, nearest = (part @ self.features.T).topk(self.k)
            weights = torch.ones_like(similarity)
            if self.temperature is not None:
                weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
            votes = torch.zeros(len(part), self.classes).scatter_add_(1, self.labels[nearest], weights)
            shares.append(votes / votes.sum(1, keepdim=True))
        return torch.cat(shares)


class LinearProbe:
    """scikit-learn's logistic regression on standardised features.

    How strong a penalty features need differs so much (raw pixels a strong one, pooled tokens a weak one) that any
    fixed one is unfair: it is chosen on held-out training examples, and the probe is then fitted to all of them.

    Args:
        features: (examples, dim).
        labels: class numbers (examples,).
        classes: how many there are; None is up to the highest label.
        held_out: bool (examples,), to choose the penalty by, or several of them, whose scores are averaged; None is a
            fifth of every class. Without any the penalty is 1.
        score: what the best penalty has most of.

    Attributes:
        penalty: the C that was chosen.
        mean, varies: of the features (dim,); those that do not vary, or are not finite, are left out.
        weight, bias: (those that vary, classes) and (classes,), of features less their mean.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int | None = None,
        held_out: Tensor | list[Tensor] | None = None,
        score: Score = percent,
    ):
        self.classes = classes or int(labels.max()) + 1
        held_out = draw_fifth(labels) if held_out is None else held_out
        held_out = held_out if isinstance(held_out, list) else [held_out]
        self.mean, deviation, self.varies = moments(features)
        deviation = deviation[self.varies]
        standardized = (features - self.mean)[:, self.varies] / deviation
        axes = span(standardized)
        weight, self.bias = self._fit(standardized if axes is None else standardized @ axes, labels, held_out, score)
        self.weight = (weight if axes is None else axes @ weight) / deviation[:, None]

    def __call__(self, features: Tensor) -> Tensor:
        """(examples, dim) -> logits (examples, classes)."""
        return (features - self.mean)[:, self.varies] @ self.weight + self.bias

    def _fit(self, features: Tensor, labels: Tensor, held_out: list[Tensor], score: Score) -> tuple[Tensor, Tensor]:
        """The weight (dim, classes) and bias (classes,) for the best penalty."""
        folds = [fold for fold in held_out if fold.any() and not fold.all()]
        fits: list[tuple[Tensor, Tensor] | None] = [None] * len(folds)
        self.penalty, best_score, best, worse = 1.0, -1.0, None, 0
        for penalty in PENALTIES if folds else ():
            reached = 0.0
            for i, fold in enumerate(folds):
                fits[i] = weight, bias = fit_logistic(features[~fold], labels[~fold], self.classes, penalty, fits[i])
                reached += score((features[fold] @ weight + bias).argmax(1), labels[fold]) / len(folds)
            worse = worse + 1 if reached < best_score else 0
            if reached > best_score:
                self.penalty, best_score, best = penalty, reached, fits[0]
            if worse == PATIENCE:
                break
        return fit_logistic(features, labels, self.classes, self.penalty, best)


def draw_fifth(labels: Tensor) -> Tensor:
    """A fifth of every class of at least two examples, bool (examples,); none where there is no such class."""
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    if len(labels) > len(labels.unique()):
        drawn[hold_out(labels.numpy(), 0.2)[1]] = True
    return drawn


def stratified_folds(labels: Tensor) -> list[Tensor]:
    """`FOLDS` parts that together are all examples, each bool (examples,), every class in each of them and in the rest;
    none where a class has fewer examples than that."""
    numbers = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < FOLDS:
            return []
        numbers[members] = torch.arange(len(members)) % FOLDS
    return [numbers == fold for fold in range(FOLDS)]


def moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of features (examples, dim) the mean (dim,), the standard deviation (dim,), and which of them vary, bool (dim,):
    a feature that is constant but for rounding says nothing, and must not be blown up."""
    values = features.numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = (torch.from_numpy(of(values, axis=0, dtype=np.float64)) for of in (np.mean, np.std))
    finite = deviation.isfinite()
    largest = deviation[finite].max() if finite.any() else 0.0
    return mean.float(), deviation.float(), finite & (deviation > 1e-6 * mean.abs().clamp(min=largest))


def span(features: Tensor) -> Tensor | None:
    """Orthonormal axes (dim, examples) that span features (examples, dim), None unless it has more dimensions than
    examples. The weights of a linear classifier with a round penalty lie in it."""
    return torch.linalg.qr(features.T.double()).Q.float() if features.shape[1] > len(features) else None


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by scikit-learn. One class, or no features, give how frequent the classes are.

    Args:
        features: (examples, dim), centred.
        labels: (examples,), in [0, classes); those that do not occur have the logit `UNSEEN`.
        penalty: scikit-learn's C: the objective is the sum of losses + |weight|^2 / (2 C); of two classes, one
            has the weight zero.
        start: weight and bias to start from.

    Returns:
        weight (dim, classes), bias (classes,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    counts = torch.bincount(labels, minlength=classes)
    seen = counts.nonzero().flatten()
    weight, bias = torch.zeros(features.shape[1], classes), torch.full((classes,), UNSEEN)
    if len(seen) < 2 or features.shape[1] == 0:
        bias[seen] = (counts[seen] / len(labels)).log()
        return weight, bias
    model = LogisticRegression(C=penalty, max_iter=MAX_STEPS, tol=TOLERANCE, warm_start=True)
    fitted = seen[1:] if len(seen) == 2 else seen  # of two classes it fits the second, the first is zero
    if start is not None and (start[1][seen] > UNSEEN).all():
        model.coef_, model.intercept_ = start[0][:, fitted].T.numpy(), start[1][fitted].numpy()
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # see MAX_STEPS
        model.fit(features.numpy(), labels.numpy())
    bias[seen] = 0
    weight[:, fitted] = torch.from_numpy(model.coef_.T).float()
    bias[fitted] = torch.from_numpy(model.intercept_).float()
    return weight, bias
