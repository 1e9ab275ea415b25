"""Batches of images with masks: both are scaled, cropped and flipped together."""

import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.batches import normalize, statistics
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.data.pairs import MaskedSource
from hf_mim.training.data.transforms import resize, sample_rng


SCALES = (0.5, 2.0)  # of the image before it is cropped, as in UperNet's and BEiT's recipes
TRIES = 10  # crops without a labelled pixel are drawn again


class MaskedDataset(torch.utils.data.Dataset):
    """What `SegmentationCollator` makes batches of.

    Every image is brought to `size` first, as the saved image processor does it. For training it is then
    scaled by a factor of `SCALES`, cut or padded to that size and flipped, together with its mask, by numbers that
    follow from (seed, epoch, index) alone. For testing the masks keep their own size.

    Args:
        source: by index image and ids, as of `MaskedSplits`.
        size: (height, width) of the images, pixels.
    """

    def __init__(
        self,
        source: MaskedSource,
        config: MIMConfig,
        size: tuple[int, int],
        train: bool,
        seed: int = 0,
        flip: bool = True,
    ):
        self.source, self.config, self.size = source, config, size
        self.train, self.seed, self.flip = train, seed, flip
        self.fill = np.rint(255 * np.array(statistics(config)[0])).clip(0, 255).astype(np.uint8)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # the loader's workers see it too

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        return self.source.bad_images()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        image, ids = self.source[index]
        if not self.train:
            return resize(torch.from_numpy(image), self.size), ids
        rng = sample_rng(self.seed, int(self._epoch), index)
        image, ids = crop_pair(torch.from_numpy(image), ids, self.size, rng, self.fill)
        if self.flip and rng.random() < 0.5:
            image, ids = image.flip(-1), ids[:, ::-1]
        return image, ids


def crop_pair(image: torch.Tensor, ids: np.ndarray, size: tuple[int, int], rng: np.random.Generator, fill: np.ndarray):
    """A random part of an image and of its mask, at a random scale.

    Args:
        image: (channels, height, width), uint8.
        ids: (height, width); `IGNORE` where the result is padded.
        size: (height, width) of the result. At factor 1 it holds the whole image.
        fill: (channels,), uint8.

    Returns:
        image (channels, *size), ids size; bicubic and nearest.
    """
    factor = np.exp(rng.uniform(*np.log(SCALES)))
    sides = np.array(ids.shape)
    kept = np.maximum(1, np.rint(sides / max(factor, 1))).astype(int)  # of the image
    shown = np.maximum(1, np.rint(np.array(size) * min(factor, 1))).astype(int)  # of the result
    for _ in range(TRIES):
        top, left = (rng.integers(side - length + 1) for side, length in zip(sides, kept))
        part = ids[top : top + kept[0], left : left + kept[1]]
        if (part != IGNORE).any():
            break
    nearest = [((np.arange(n) + 0.5) * length / n).astype(int) for n, length in zip(shown, kept)]
    at = [rng.integers(side - length + 1) for side, length in zip(size, shown)]
    place = tuple(slice(start, start + length) for start, length in zip(at, shown))
    pixels = torch.from_numpy(fill)[:, None, None].repeat(1, *size)
    pixels[(slice(None), *place)] = resize(image, tuple(shown.tolist()), (top, left, *kept))
    padded = np.full(size, IGNORE, dtype=np.int64)
    padded[place] = part[np.ix_(*nearest)]
    return pixels, padded


class SegmentationCollator:
    """`pixel_values` (batch, channels, height, width), float32; `labels` (batch, rows, cols), int64, where masks of
    several sizes are padded at the bottom and right with `IGNORE`; `sizes` (batch, 2), how large each mask is."""

    def __init__(self, config: MIMConfig):
        self.config = config

    def __call__(self, items: list) -> dict[str, torch.Tensor]:
        images, masks = zip(*items, strict=True)
        sizes = np.array([ids.shape for ids in masks])
        labels = np.full((len(masks), *sizes.max(axis=0)), IGNORE, dtype=np.int64)
        for padded, ids in zip(labels, masks):
            padded[: ids.shape[0], : ids.shape[1]] = ids
        pixel_values = normalize(torch.stack(images), *statistics(self.config))
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(labels), "sizes": torch.from_numpy(sizes)}
