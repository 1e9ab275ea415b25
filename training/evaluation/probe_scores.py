"""Scores of a frozen encoder with an interval: trained heads, k-NN, linear probe, few labels."""

import numpy as np
import torch
from torch import Tensor

from hf_mim.training.data.splits import draw_subset
from hf_mim.training.evaluation.bootstrap import LEVEL, ROUNDS, accuracy_interval
from hf_mim.training.evaluation.features import ImageViews
from hf_mim.training.evaluation.frozen import TEST_IMAGES, TRAIN_IMAGES, frozen_protocol, raw_pixels
from hf_mim.training.evaluation.metrics import POOLINGS, READOUTS
from hf_mim.training.evaluation.readouts import LinearProbe, stratified_folds


SHOTS = (1, 5, 10)  # labelled images of every class
SHARES = (0.01, 0.1)  # of the labelled images


def probe_protocol() -> dict[str, str]:
    """What the figures mean, in the words of probe.json and the model card."""
    return {
        "poolers": "Each pooler is trained on frozen features, followed by a batch norm without parameters and a "
        "linear classifier; layer, learning rate and epoch are chosen on images held out of the training images, the "
        "first two with the first seed.",
        **frozen_protocol(),
        "low_shot": "Few labels: the linear probe on so many images of every class, or on a share of each, drawn anew "
        "with every seed.",
        "interval": f"Intervals: {LEVEL:.0%}, by {ROUNDS:,} bootstrap rounds over the test images and, where there "
        "are several, the seeds.",
    }


def pooled_vectors(source, images: ImageViews, layer: int, model, most: int) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of the patches and class token of at most so many images, always the same.

    Returns:
        {"mean", "cls"}: (images, dim), without "cls" where there is no class token; and their labels (images,).
    """
    positions, encoder = torch.from_numpy(draw_subset(images.labels.numpy(), most)), model.encoder
    vectors: dict[str, list[Tensor]] = {name: [] for name in POOLINGS if name != "cls" or encoder.has_cls_token}
    for chosen in positions.split(256):
        features = source.fetch(0, chosen)
        for name, parts in vectors.items():
            pooled = features.get(f"{name}/{layer}")
            if pooled is None:
                tokens = features[f"tokens/{layer}"]
                patches = tokens[:, encoder.num_prefix_tokens :]
                pooled = encoder.class_token(tokens) if name == "cls" else patches.mean(dim=1)
            parts.append(pooled.cpu())
    return {name: torch.cat(parts) for name, parts in vectors.items()}, images.labels[positions]


def draw(labels: Tensor, shots: float, seed: int) -> Tensor | None:
    """Positions of `shots` images of every class; below 1, of that share of them, rounded. None where a class has too
    few, or no image is left out."""
    rng, chosen = np.random.default_rng(seed), []
    for label in labels.unique().tolist():
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        count = int(shots) if shots >= 1 else round(shots * len(members))
        if not 1 <= count <= len(members):
            return None
        chosen.append(members[:count])
    positions = np.concatenate(chosen)
    return torch.from_numpy(positions) if len(positions) < len(labels) else None


def score_readouts(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, dict]:
    """{"knn", "linear": entry}, as of `accuracy_interval`.

    Args:
        train, test: features (images, dim).
        train_labels, test_labels: class numbers (images,).
    """
    return {
        name: accuracy_interval(metric.compute(train, train_labels)(test).argmax(1) == test_labels)
        for name, metric in READOUTS.items()
    }


def score_few_labels(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seeds: list[int]) -> dict:
    """{"1", "5", "10", "1%", "10%": entry}, as of `accuracy_interval`; without those that the data do not allow.

    Args: as of `score_readouts`. seeds: of the images that are drawn.
    """
    entries = {}
    for shots in (*SHOTS, *SHARES):
        subsets = [chosen for seed in seeds if (chosen := draw(train_labels, shots, seed)) is not None]
        if len(subsets) == len(seeds):
            predicted = []
            for chosen in subsets:
                labels = train_labels[chosen]
                probe = LinearProbe(train[chosen], labels, held_out=stratified_folds(labels))
                predicted.append(probe(test).argmax(1))
            name = str(shots) if shots >= 1 else f"{shots:.0%}"
            entries[name] = accuracy_interval(torch.stack(predicted) == test_labels)
    return entries


def score_features(sources: dict, images: dict[str, ImageViews], layer: int, model, seeds: list[int]) -> dict:
    """What is known without a trained pooler: {"knn": {pooling: entry}, "linear": ..., "low_shot": {pooling: {...}}}.

    Args:
        sources, images: "train" and "test".
    """
    train, train_labels = pooled_vectors(sources["train"], images["train"], layer, model, TRAIN_IMAGES)
    test, test_labels = pooled_vectors(sources["test"], images["test"], layer, model, TEST_IMAGES)
    scores: dict[str, dict] = {name: {} for name in (*READOUTS, "low_shot")}
    for pooling in train:
        sides = (train[pooling], train_labels, test[pooling], test_labels)
        for name, entry in {**score_readouts(*sides), "low_shot": score_few_labels(*sides, seeds)}.items():
            scores[name][pooling] = entry
    return scores


def score_raw_pixels(images: dict[str, ImageViews]) -> dict:
    """k-NN and linear probe of the normalised pixels themselves: {"knn": entry, "linear": entry}."""
    sides = []
    for split, most in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        positions = torch.from_numpy(draw_subset(images[split].labels.numpy(), most))
        pixels = raw_pixels(images[split].fetch(0, chosen) for chosen in positions.split(256))
        sides += [pixels, images[split].labels[positions]]
    return score_readouts(*sides)


def weights_over_images(source, positions: Tensor, groups, heads: list) -> dict[str, Tensor]:
    """Where poolers look: {pooler: weights (images, rows * cols) that sum to one, the mean over heads or queries}, of
    those that weigh patches.

    Args:
        source: of the images at `positions`.
        groups: {(pooler, layer): `Group`}.
        heads: one trained head for each pooler.
    """
    features, weights_of = source.fetch(0, positions), {}
    for head in heads:
        group = groups[head.name, head.layer]
        if group.vectors_only:
            continue
        with torch.no_grad():
            weights = group.pool(features, head.head.pooler)[1]
        if weights is not None:
            weights = weights if weights.ndim == 2 else weights.mean(dim=1)
            weights_of[head.name] = (weights / weights.sum(dim=1, keepdim=True)).float().cpu()
    return weights_of
