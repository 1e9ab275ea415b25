"""Scores of a frozen encoder with an interval: trained heads, k-NN, linear probe, few labels."""

import numpy as np
import torch
from torch import Tensor

from hf_mim.training.data.splits import draw_subset
from hf_mim.training.evaluation import metrics
from hf_mim.training.evaluation.features import ImageViews, pool


ROUNDS = 1000  # of the bootstrap
SHOTS = (1, 5, 10)  # labelled images of every class
SHARES = (0.01, 0.1)  # of the labelled images
POOLINGS = ("mean", "cls")  # that k-NN, linear probe and few labels see
# What the figures mean, in the words of probe.json and the model card.
PROTOCOL = {
    "poolers": "Each pooler is trained on frozen features, followed by a batch norm without parameters and a linear "
    "classifier; layer, learning rate and epoch are chosen on images held out of the training images, the first two "
    "with the first seed.",
    **{name: metrics.PROTOCOL[name] for name in ("knn", "linear", "raw_pixels")},
    "low_shot": "Few labels: the linear probe on so many images of every class, or on a share of each, drawn anew "
    "with every seed.",
    "interval": f"Intervals: 95 percent, by {ROUNDS:,} bootstrap rounds over the test images and, where there are "
    "several, the seeds.",
}


def bootstrap(right: Tensor, rounds: int = ROUNDS, seed: int = 0) -> dict[str, float]:
    """Mean accuracy and its 95 percent interval.

    Args:
        right: bool (seeds, images) or (images,): whether each was classified right. Both are drawn anew, with
            replacement, in every round.

    Returns:
        "accuracy", "low", "high", percent.
    """
    right = np.atleast_2d(right.numpy()).astype(np.float64)
    seeds, images = right.shape
    rng, found = np.random.default_rng(seed), np.empty(rounds)
    for i in range(rounds):
        drawn = np.bincount(rng.integers(images, size=images), minlength=images)
        found[i] = (right @ drawn)[rng.integers(seeds, size=seeds)].mean() / images
    low, high = np.percentile(100 * found, [2.5, 97.5])
    return {"accuracy": 100 * float(right.mean()), "low": float(low), "high": float(high)}


def pooled_vectors(source, images: ImageViews, layer: int, model, most: int) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of the patches and class token of at most so many images, always the same.

    Returns:
        {"mean", "cls"}: (images, dim), without "cls" where there is no class token; and their positions (images,).
    """
    positions = torch.from_numpy(draw_subset(len(images), most))
    encoder, found = model.encoder, {}
    for chosen in positions.split(256):
        features = source.fetch(0, chosen)
        for name in POOLINGS if encoder.has_cls_token else POOLINGS[:1]:
            if f"{name}/{layer}" in features:
                vectors = features[f"{name}/{layer}"]
            else:
                tokens = features[f"tokens/{layer}"]
                vectors = tokens[:, 0] if name == "cls" else tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
            found.setdefault(name, []).append(vectors.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}, positions


def draw(labels: Tensor, shots: float, seed: int) -> Tensor | None:
    """Positions of `shots` images of every class; below 1, of that share of them, rounded. None where a class has too
    few, or no image is left out."""
    rng, chosen = np.random.default_rng(seed), []
    for label in labels.unique().tolist():
        found = rng.permutation(np.flatnonzero(labels.numpy() == label))
        count = shots if shots >= 1 else round(shots * len(found))
        if not 1 <= count <= len(found):
            return None
        chosen.append(found[:count])
    chosen = np.concatenate(chosen)
    return torch.from_numpy(chosen) if len(chosen) < len(labels) else None


def score_vectors(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seeds: list[int]) -> dict:
    """{"knn", "linear": entry, "low_shot": {"1", "5", "10", "1%", "10%": entry}}, entries as of `bootstrap`; without
    the few labels that the data do not allow.

    Args:
        train, test: features (images, dim).
        train_labels, test_labels: class numbers (images,).
        seeds: of the images with few labels.
    """
    arguments = (train, train_labels, test)
    found = {
        "knn": bootstrap(metrics.knn_predict(*arguments) == test_labels),
        "linear": bootstrap(metrics.linear_predict(*arguments) == test_labels),
        "low_shot": {},
    }
    for shots in (*SHOTS, *SHARES):
        drawn = [draw(train_labels, shots, seed) for seed in seeds]
        if all(chosen is not None for chosen in drawn):
            predicted = [metrics.linear_predict(train[chosen], train_labels[chosen], test) for chosen in drawn]
            name = str(shots) if shots >= 1 else f"{shots:.0%}"
            found["low_shot"][name] = bootstrap(torch.stack(predicted) == test_labels)
    return found


def score_features(sources: dict, images: dict[str, ImageViews], layer: int, model, seeds: list[int]) -> dict:
    """What is known without a trained pooler: {"knn": {pooling: entry}, "linear": ..., "low_shot": {pooling: {...}}}.

    Args:
        sources, images: "train" and "test".
    """
    found = {"knn": {}, "linear": {}, "low_shot": {}}
    sides = []
    for split, most in (("train", metrics.TRAIN_IMAGES), ("test", metrics.TEST_IMAGES)):
        vectors, positions = pooled_vectors(sources[split], images[split], layer, model, most)
        sides.append((vectors, images[split].labels[positions]))
    (train, train_labels), (test, test_labels) = sides
    for pooling in train:
        scores = score_vectors(train[pooling], train_labels, test[pooling], test_labels, seeds)
        for kind, entry in scores.items():
            found[kind][pooling] = entry
    return found


def score_raw_pixels(images: dict[str, ImageViews]) -> dict:
    """k-NN and linear probe of the normalised pixels themselves: {"knn": entry, "linear": entry}."""
    sides = []
    for split, most in (("train", metrics.TRAIN_IMAGES), ("test", metrics.TEST_IMAGES)):
        positions = torch.from_numpy(draw_subset(len(images[split]), most))
        pixels = metrics.raw_pixels(images[split].fetch(0, chosen) for chosen in positions.split(256))
        sides += [pixels, images[split].labels[positions]]
    train, train_labels, test, test_labels = sides
    arguments = (train, train_labels, test)
    return {
        "knn": bootstrap(metrics.knn_predict(*arguments) == test_labels),
        "linear": bootstrap(metrics.linear_predict(*arguments) == test_labels),
    }


def weights_over_images(source, positions: Tensor, groups, heads: list) -> dict[str, Tensor]:
    """Where poolers look: {pooler: weights (images, rows * cols) that sum to one, the mean over heads or queries}, of
    those that weigh patches.

    Args:
        source: of the images at `positions`.
        groups: {(pooler, layer): `Group`}.
        heads: one trained head for each pooler.
    """
    features, found = source.fetch(0, positions), {}
    for one in heads:
        group = groups[one.name, one.layer]
        if group.kept:
            continue
        with torch.no_grad():
            weights = pool_weights(group, features, one)
        if weights is not None:
            weights = weights if weights.ndim == 2 else weights.mean(dim=1)
            found[one.name] = (weights / weights.sum(dim=1, keepdim=True)).float().cpu()
    return found


def pool_weights(group, features: dict[str, Tensor], one) -> Tensor | None:
    row = features.get(f"attention/{group.layer}")
    pooler = one.head.pooler if group.learned else group.fixed
    return pool(pooler, features[f"tokens/{group.layer}"], group.prefix, group.grid, row)[1]
