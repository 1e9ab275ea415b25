"""Multi-order interactions: how strongly two parts of an image act together, given how much of the rest is seen (Deng
et al., 2111.06236; used by A2MIM, 2205.13943, section 3)."""

import hashlib
import itertools
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


# Resampled images for an interval; 95 percent of their curves lie within it.
RESAMPLED, INTERVAL = 2000, (2.5, 97.5)


@dataclass(frozen=True)
class Plan:
    """What is sampled. The same plan gives the same pairs and contexts for every model.

    The defaults end within minutes on a CPU for small models; `PAPER` has Deng et al.'s counts.

    Args:
        images, pairs, contexts: pairs for each image; contexts for each pair and order, all there are where they are
            fewer.
        orders: shares of the other players that are present, in [0, 1].
        grid: rows and columns of the players, the parts of an image; the same for models that are compared.
        reach: how many rows and columns the second player of a pair may be from the first.
        absent: what an absent part is replaced by, after normalisation: zero, or mean (of the image).
        seed: of pairs and contexts.

    Raises:
        ValueError: a count below 1, an order outside [0, 1], or an unknown replacement.
    """

    images: int = 10
    pairs: int = 10
    contexts: int = 8
    orders: tuple[float, ...] = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    grid: tuple[int, int] = (14, 14)
    reach: int = 2
    absent: str = "zero"
    seed: int = 0

    def __post_init__(self):
        for name in ("images", "pairs", "contexts", "reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"analyze.interaction.{name} must be at least 1, not {getattr(self, name)}")
        if not self.orders or any(not 0 <= order <= 1 for order in self.orders):
            raise ValueError(f"analyze.interaction.orders are shares from 0 to 1, not {list(self.orders)}")
        if len(self.grid) != 2 or math.prod(self.grid) < 4 or min(self.grid) < 1:
            raise ValueError(f"analyze.interaction.grid needs at least 4 parts, as in [14, 14], not {list(self.grid)}")
        if self.absent not in ("zero", "mean"):
            raise ValueError(f"analyze.interaction.absent must be zero or mean, not {self.absent!r}")

    @property
    def players(self) -> int:
        return math.prod(self.grid)

    @property
    def sizes(self) -> list[int]:
        """How many players are in a context, per order."""
        return [math.floor(order * (self.players - 2) + 1e-9) for order in self.orders]

    def contexts_of(self, size: int) -> int:
        return min(self.contexts, math.comb(self.players - 2, size))

    @property
    def rows_per_image(self) -> int:
        """How many masked versions of an image are classified."""
        return 4 * self.pairs * sum(self.contexts_of(size) for size in self.sizes)


# Those of A2MIM's analysis for ImageNet; for CIFAR it takes 50 images, 200 pairs, 100 contexts and 16 x 16 parts.
PAPER_ORDERS = (0.0, 0.05, *(tenth / 10 for tenth in range(1, 10)), 0.95, 1.0)
PAPER: dict[str, object] = {"images": 500, "pairs": 50, "contexts": 50, "orders": PAPER_ORDERS}


# ---- the estimator -------------------------------------------------------------------------------------------------
def choose_pairs(plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """(pairs, 2) players; the second within `reach` of the first."""
    rows, cols = plan.grid
    first = rng.integers(plan.players, size=plan.pairs)
    pairs = []
    for player in first.tolist():
        row, col = divmod(player, cols)
        near = [
            r * cols + c
            for r in range(max(0, row - plan.reach), min(rows, row + plan.reach + 1))
            for c in range(max(0, col - plan.reach), min(cols, col + plan.reach + 1))
            if (r, c) != (row, col)
        ]
        pairs.append((player, int(rng.choice(near))))
    return np.array(pairs)


def choose_contexts(plan: Plan, pair: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sets of `size` of the other players, bool (contexts, players): drawn at random, or all where they are few."""
    others = np.setdiff1d(np.arange(plan.players), pair)
    count = plan.contexts_of(size)
    if count == math.comb(len(others), size):
        chosen = np.array(list(itertools.combinations(range(len(others)), size)), dtype=int).reshape(count, size)
    else:
        chosen = rng.random((count, len(others))).argsort(axis=1)[:, :size]
    contexts = np.zeros((count, plan.players), dtype=bool)
    np.put_along_axis(contexts, others[chosen], True, axis=1)
    return contexts


def four_sets(contexts: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """Each context with both players of the pair, the first, the second, and neither: bool (contexts, 4, players)."""
    sets = np.repeat(contexts[:, None], 4, axis=1)
    sets[:, [0, 1], pair[0]] = True
    sets[:, [0, 2], pair[1]] = True
    return sets


def interactions(value, plan: Plan, image: int) -> tuple[np.ndarray, np.ndarray]:
    """The interactions of one image's sampled pairs.

    I(i, j) of order m is the mean over contexts S of m other players of v(S+i+j) - v(S+i) - v(S+j) + v(S).

    Args:
        value: bool (rows, players), True = present, -> (rows,) the value v of these players for the model.
        image: the position of the image; with the plan's seed it decides on pairs and contexts.

    Returns:
        (orders, pairs) the interactions, and the standard errors that the sampling of contexts leaves, 0 where all
        contexts were taken and nan for a single one of many.
    """
    rng = np.random.default_rng((plan.seed, image))
    pairs = choose_pairs(plan, rng)
    contexts = [[choose_contexts(plan, pair, size, rng) for pair in pairs] for size in plan.sizes]
    sets = [four_sets(found, pair) for per_order in contexts for found, pair in zip(per_order, pairs, strict=True)]
    values = np.asarray(value(np.concatenate(sets).reshape(-1, plan.players)), dtype=np.float64).reshape(-1, 4)
    changes = values @ np.array([1.0, -1.0, -1.0, 1.0])
    found, errors, at = [], [], 0
    for size in plan.sizes:
        count = plan.contexts_of(size)
        part = changes[at : at + plan.pairs * count].reshape(plan.pairs, count)
        at += part.size
        found.append(part.mean(axis=1))
        if count == math.comb(plan.players - 2, size):
            errors.append(np.zeros(plan.pairs))
        else:
            spread = part.std(axis=1, ddof=1) if count > 1 else np.full(plan.pairs, np.nan)
            errors.append(spread / math.sqrt(count))
    return np.stack(found), np.stack(errors)


def strengths(found: np.ndarray) -> np.ndarray:
    """Interactions (images, orders, pairs) -> (orders,) J: the mean of |I| over images and pairs, over its mean over
    the sampled orders, so that the mean of J is 1; zeros where no players interact."""
    absolute = np.abs(found).mean(axis=(0, 2))
    return absolute / absolute.mean() if absolute.mean() > 0 else absolute


def summarize(found: np.ndarray, errors: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """J with its confidence.

    Args:
        found, errors: (images, orders, pairs), of `interactions`.

    Returns:
        each (orders,). "J"; "low", "high": 95 percent of `resampled_strengths` (equal to J for one image); and of |I|
        itself, unnormalised: "mean", "between_images" and "between_pairs" its standard deviations, "from_contexts" the
        standard error of one pair's I.
    """
    absolute = np.abs(found)
    low, high = np.percentile(resampled_strengths(found, seed), INTERVAL, axis=0)
    return {
        "J": strengths(found),
        "low": low,
        "high": high,
        "mean": absolute.mean(axis=(0, 2)),
        "between_images": absolute.mean(axis=2).std(axis=0, ddof=min(1, len(found) - 1)),
        "between_pairs": absolute.std(axis=2, ddof=min(1, found.shape[2] - 1)).mean(axis=0),
        "from_contexts": np.sqrt(np.square(errors).mean(axis=(0, 2))),
    }


def resampled_strengths(found: np.ndarray, seed: int = 0) -> np.ndarray:
    """J of `RESAMPLED` bootstrap resamples of the images, which carry their pairs and contexts along: (resamples,
    orders)."""
    drawn = np.random.default_rng(seed).integers(len(found), size=(RESAMPLED, len(found)))
    curves = np.abs(found).mean(axis=2)[drawn].mean(axis=1)
    level = curves.mean(axis=1, keepdims=True)
    return np.divide(curves, level, out=np.zeros_like(curves), where=level > 0)


def mean_strength(found: np.ndarray, which: list[bool], seed: int = 0) -> tuple[float, float, float]:
    """The mean of J over some of the orders, and its 95 percent interval."""
    low, high = np.percentile(resampled_strengths(found, seed)[:, which].mean(axis=1), INTERVAL)
    return float(strengths(found)[which].mean()), float(low), float(high)


# ---- of a model ----------------------------------------------------------------------------------------------------
def log_odds(logits: Tensor, label: int) -> Tensor:
    """logits (rows, classes) -> (rows,) log p / (1 - p) of the label, exact where p rounds to 0 or 1."""
    logits = logits.double()
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)


def hide_absent(image: Tensor, present: Tensor, plan: Plan) -> Tensor:
    """One normalised image (channels, height, width) and present players (rows, players), bool -> (rows, channels,
    height, width) without the absent ones. Where the grid does not divide the image, parts differ by a pixel."""
    height, width = image.shape[1:]
    down = torch.arange(height) * plan.grid[0] // height
    across = torch.arange(width) * plan.grid[1] // width
    shown = present.view(-1, 1, *plan.grid)[:, :, down][..., across].to(image.device)
    absent = image.mean(dim=(1, 2), keepdim=True) if plan.absent == "mean" else image.new_zeros(1)
    return torch.where(shown, image, absent)


@torch.inference_mode()
def interactions_of_image(
    classify, image: Tensor, label: int, plan: Plan, position: int, batch_size: int = 128, advance=lambda rows: None
) -> tuple[np.ndarray, np.ndarray]:
    """As `interactions`, of a classifier on one image.

    Args:
        classify: (rows, channels, height, width), normalised -> logits (rows, classes).
        image: (channels, height, width), normalised.
        label: the class whose log-odds are the value; the image's own.
        advance: is told how many masked images were classified.
    """

    def value(present: np.ndarray) -> np.ndarray:
        values = []
        for rows in torch.from_numpy(present).split(batch_size):
            values.append(log_odds(classify(hide_absent(image, rows, plan)), label).cpu())
            advance(len(rows))
        return torch.cat(values).numpy()

    return interactions(value, plan, position)


@torch.inference_mode()
def seconds_per_row(classify, image: Tensor, batch_size: int = 128) -> float:
    """How long one masked image takes, measured on two batches, the first of which warms up."""
    batch = image.expand(batch_size, *image.shape).contiguous()
    classify(batch[: batch_size // 4])
    started = time.perf_counter()
    classify(batch)
    return (time.perf_counter() - started) / batch_size


# ---- results that survive an interruption --------------------------------------------------------------------------
class Partial:
    """The images that are done, in a file that is replaced as a whole after each.

    Args:
        folder: where the file lies.
        plan: of the sampling.
        identity: what else the results depend on: the classifier's weights, the images.
    """

    def __init__(self, folder: Path, plan: Plan, identity: str):
        key = json.dumps([asdict(plan), identity], sort_keys=True)
        self.path = Path(folder) / f"interaction-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        shape = (plan.images, len(plan.orders), plan.pairs)
        self.found, self.errors, self.done = np.zeros(shape), np.zeros(shape), np.zeros(plan.images, dtype=bool)
        if self.path.is_file():
            with np.load(self.path) as file:
                self.found, self.errors, self.done = file["found"], file["errors"], file["done"]

    def add(self, image: int, found: np.ndarray, errors: np.ndarray) -> None:
        self.found[image], self.errors[image], self.done[image] = found, errors, True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(file, found=self.found, errors=self.errors, done=self.done)
        os.replace(unfinished, self.path)


def weights_of(model: torch.nn.Module) -> str:
    """A fingerprint of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
