"""How alike two representations of the same images are: linear CKA (1905.00414) by unbiased estimates (2010.15327)."""

import torch
from torch import Tensor


FEWEST = 4  # images that the unbiased estimate needs


def centred_gram(features: Tensor) -> Tensor:
    """(images, dim) -> (images * images,) float32: the Gram matrix U-centred (1310.5095, definition 2), so that the
    inner product of two of them over n (n - 3) is the unbiased HSIC (1211.4811, equation 5)."""
    features = features.double()
    features = features - features.mean(dim=0)  # changes nothing but the rounding
    gram = features @ features.T
    count = len(gram)
    gram.fill_diagonal_(0)
    rows = gram.sum(dim=1) / (count - 2)
    gram = gram - rows[:, None] - rows + gram.sum() / ((count - 1) * (count - 2))
    return gram.fill_diagonal_(0).float().flatten()


def hsic(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Per window the unbiased HSIC of all pairs of layers: lists of (layers, n * n) -> (windows, layers, layers), each
    weighted by its number of images."""
    windows = []
    for one, other in zip(first, second):
        count = round(one.shape[1] ** 0.5)
        windows.append(one.double() @ other.double().T / (count * (count - 3)) * count)
    return torch.stack(windows)


def ratio(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """CKA (layers, layers) from HSICs (windows, ...); nan where a layer does not vary between images."""
    own = [part.sum(dim=0).diagonal().clamp(min=0).sqrt() for part in (first, second)]
    return cross.sum(dim=0) / (own[0][:, None] * own[1])


def linear_cka(first: Tensor, second: Tensor) -> float:
    """CKA of two features of the same images, (images, dim) and (images, other dim): 1 is the same up to rotation and
    scale, 0 unrelated; an estimate from few images may lie somewhat outside. nan where one does not vary between
    images, or of fewer than `FEWEST` images."""
    if len(first) < FEWEST:
        return float("nan")
    grams = [centred_gram(features)[None] for features in (first, second)]
    cross, *own = (hsic([a], [b]) for a, b in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1])))
    return ratio(cross, *own).item()
