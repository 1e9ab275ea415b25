"""What the patch tokens of a frozen encoder say of the place that they see: labels of patches, and readouts of them."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_base import Grid, patchify
from hf_mim.training.common.console import RunConsole
from hf_mim.training.data.masked import MaskedSplits
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.data.segmentation import MaskedDataset, SegmentationCollator
from hf_mim.training.data.splits import hold_out_scenes
from hf_mim.training.evaluation.features import Features
from hf_mim.training.evaluation.iou import mean_iou, pixel_counts, predict_mask
from hf_mim.training.evaluation.metrics import READOUTS, readout_protocol


NEITHER = -1  # the label of a cell without a labelled pixel
RAW_SIDE = 8  # pixels of a patch, where they stand for its token: beyond, their linear probe costs gigabytes
BATCH = 16  # images encoded at once
UNITS = ("pixels", "patches")  # that are counted


def dense_protocol() -> dict[str, str]:
    """What the figures mean, in the words of dense.json."""
    return {
        "patches": "A patch has the class of most labelled pixels in its cell; cells without one are left out. Patches "
        "are the examples of k-NN and linear probe, whose penalty is the best by mean IoU on held-out images.",
        **readout_protocol(),
        "pixels": "Pixels: the classes' scores of the patches, upsampled bilinearly to the mask, and the best of them.",
        "raw_pixels": "Raw pixels: the normalised pixels of a patch in the place of its token, averaged down to at "
        f"most {RAW_SIDE} a side.",
    }


def patch_labels(ids: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """The class of most labelled pixels in every cell, the lowest of equally frequent ones: (rows * cols,), int64;
    `NEITHER` where a cell has none.

    Args:
        ids: (height, width), of any size: pixel y lies in row floor(y * rows / height).
    """
    rows, cols = ((np.arange(side) * count) // side for side, count in zip(ids.shape, grid))
    cells, known = rows[:, None] * grid[1] + cols, ids != IGNORE
    counts = np.bincount(cells[known] * classes + ids[known], minlength=grid[0] * grid[1] * classes)
    counts = counts.reshape(-1, classes)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), NEITHER)


class DenseProbeData:
    """The images and masks of a dense probing, the same for every encoder.

    Attributes:
        quota: how many labelled patches of a training image are kept at most.
    """

    def __init__(self, splits: MaskedSplits, config: MIMConfig, size: tuple[int, int], grid: Grid, patches: int):
        self.splits, self.config, self.size, self.grid = splits, config, size, grid
        self.train, self.test = (MaskedDataset(split, config, size, False) for split in (splits.train, splits.test))
        self.quota = max(1, min(grid[0] * grid[1], patches // len(self.train)))

    @property
    def classes(self) -> int:
        return len(self.splits.classes)

    def batches(self, dataset: MaskedDataset) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
        """-> `pixel_values` (batch, channels, height, width), and the masks of the images, of their own sizes."""
        collate = SegmentationCollator(self.config)
        for start in range(0, len(dataset), BATCH):
            items = [dataset[index] for index in range(start, min(start + BATCH, len(dataset)))]
            yield collate(items)["pixel_values"], [ids for _, ids in items]


def read_tokens(pixel_values: Tensor, features: Features | None, layer: int, grid: tuple[int, int]) -> Tensor:
    """What is known of every patch, (batch, rows * cols, dim) float32 on the CPU: its token, or without `features` the
    pixels in its cell, averaged down to at most `RAW_SIDE` a side."""
    if features is None:
        rows, cols = (max(1, min(RAW_SIDE, side // n)) * n for side, n in zip(pixel_values.shape[2:], grid))
        return patchify(F.adaptive_avg_pool2d(pixel_values, (rows, cols)), grid)
    prefix = features.model.encoder.num_prefix_tokens
    return features(pixel_values)[f"tokens/{layer}"][:, prefix:].float().cpu()


def collect(images: DenseProbeData, features: Features | None, layer: int, advance) -> tuple[Tensor, Tensor, Tensor]:
    """Training patches: tokens (patches, dim), labels (patches,), and the image that each is of (patches,)."""
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    sources: list[Tensor] = []
    for pixel_values, masks in images.batches(images.train):
        for image_tokens, ids in zip(read_tokens(pixel_values, features, layer, images.grid), masks):
            number, classes = len(tokens), patch_labels(ids, images.grid, images.classes)
            usable = np.flatnonzero(classes != NEITHER)
            kept = np.sort(np.random.default_rng((0, number)).permutation(usable)[: images.quota])
            tokens.append(image_tokens[kept])
            labels.append(torch.from_numpy(classes[kept]))
            sources.append(torch.full((len(kept),), number))
        advance(len(masks))
    return torch.cat(tokens), torch.cat(labels), torch.cat(sources)


def fit_readouts(tokens: Tensor, labels: Tensor, sources: Tensor, classes: int) -> dict:
    """{name: a fitted entry of `READOUTS`}. Settings are chosen by mean IoU on the patches of a fifth of the images.

    Args: as `collect` returns them.
    """
    images, image = np.unique(sources.numpy(), return_inverse=True)
    presence = np.zeros((len(images), classes), dtype=bool)
    presence[image, labels.numpy()] = True
    scenes = hold_out_scenes(presence, 0.2)[1] if len(images) > 1 else np.empty(0, dtype=np.int64)
    held_out = torch.from_numpy(np.isin(image, scenes))

    def score(predicted: Tensor, labels: Tensor) -> float:
        return float(mean_iou(pixel_counts(predicted.numpy(), labels.numpy(), classes, NEITHER)))

    return {name: metric.compute(tokens, labels, classes, held_out, score) for name, metric in READOUTS.items()}


def measure(
    images: DenseProbeData, columns: dict[str, Features | None], layer: int, shown: int, console: RunConsole
) -> dict:
    """{column: {readout: {"pixels", "patches": counts (images, 3, classes), "maps": of the first `shown` images}}}."""
    results = {}
    with console.progress() as bar:
        task = bar.add_task("", total=len(columns) * (len(images.train) + len(images.test)))
        advance = partial(bar.advance, task)
        for column, features in columns.items():
            title = column.replace("_", " ")
            bar.update(task, description=f"encoding, {title}")
            patches = collect(images, features, layer, advance)
            bar.update(task, description=f"fitting, {title}")
            readouts = fit_readouts(*patches, images.classes)
            bar.update(task, description=f"testing, {title}")
            results[column] = test(images, features, layer, readouts, shown, advance)
    return results


def test(images: DenseProbeData, features: Features | None, layer: int, readouts: dict, shown: int, advance) -> dict:
    """Of every readout the counts of the test images, by patches and by pixels, and its first maps."""
    results: dict[str, dict] = {name: {"pixels": [], "patches": [], "maps": []} for name in readouts}
    for pixel_values, masks in images.batches(images.test):
        tokens = read_tokens(pixel_values, features, layer, images.grid)
        for name, readout in readouts.items():
            logits = readout(tokens.flatten(0, 1)).view(len(masks), *images.grid, -1)
            for image_logits, ids in zip(logits, masks):
                predicted = predict_mask(image_logits.permute(2, 0, 1), ids.shape).numpy()
                labels = patch_labels(ids, images.grid, images.classes)
                guesses = image_logits.argmax(-1).flatten().numpy()
                results[name]["pixels"].append(pixel_counts(predicted, ids, images.classes))
                results[name]["patches"].append(pixel_counts(guesses, labels, images.classes, NEITHER))
                if len(results[name]["maps"]) < shown:
                    results[name]["maps"].append(predicted)
        advance(len(masks))
    for entry in results.values():
        entry.update({unit: np.stack(entry[unit]) for unit in UNITS})
    return results
