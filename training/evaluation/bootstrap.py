"""Bootstrap intervals over the test images: 95 percent, from 1,000 rounds in which they are drawn with replacement."""

import numpy as np
from torch import Tensor


ROUNDS, LEVEL = 1000, 0.95


def draw_counts(number: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `number` things is drawn in every round, (ROUNDS, number), float64: for sums as products."""
    return rng.multinomial(number, np.full(number, 1 / number), size=ROUNDS).astype(np.float64)


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of a statistic's values (ROUNDS,)."""
    return np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]).tolist()


def accuracy_interval(right: Tensor, seed: int = 0) -> dict[str, float]:
    """Mean accuracy and its interval.

    Args:
        right: bool (seeds, images) or (images,): whether each was classified right. Seeds are drawn anew as images are.

    Returns:
        "accuracy", "low", "high", percent.
    """
    hits, rng = np.atleast_2d(right.numpy()).astype(np.float64), np.random.default_rng(seed)
    seeds, images = hits.shape
    drawn = (draw_counts(images, rng) @ hits.T * draw_counts(seeds, rng)).sum(axis=1) / (seeds * images)
    low, high = interval(100 * drawn)
    return {"accuracy": 100 * float(hits.mean()), "low": low, "high": high}
