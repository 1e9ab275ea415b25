"""Labelled batches for fine-tuning: torchvision's augmentations, drawn from (seed, epoch, index).

torchvision draws from torch's global generator. It is set to a seed of the image's own for each call, and put back:
what happens to an image then depends neither on the process, nor on the worker, nor on what came before.
"""

from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import MAGNITUDES, AugmentArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.base import ImageDataset
from hf_mim.training.data.batches import ImageBatch, normalize, statistics
from hf_mim.training.data.images import MIMDataset


ERASED = ((0.02, 1 / 3), (0.3, 10 / 3))  # area and aspect ratio of an erased rectangle, as in timm and in MAE's release


@dataclass
class LabelledBatch(ImageBatch):
    """An `ImageBatch` with labels (batch,); `train` says whether it is to be augmented further."""

    _: KW_ONLY
    labels: Tensor
    train: bool


class LabelledImages(ImageDataset):
    """Some images of a `MIMDataset`, with labels.

    Args:
        indices: which ones; None takes all.

    Raises:
        DataError: there are no labels.
    """

    def __init__(self, dataset: MIMDataset, indices: np.ndarray | None = None):
        if dataset.labels is None:
            raise DataError("the data set has no labels")
        self.dataset = dataset
        self.indices = np.arange(len(dataset)) if indices is None else indices
        self.labels = dataset.labels[torch.as_tensor(self.indices)]

    def without_augmentation(self) -> "LabelledImages":
        return LabelledImages(self.dataset.without_augmentation(), self.indices)

    def bad_images(self) -> BadImageReport:
        return self.dataset.bad_images()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> LabelledBatch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[LabelledBatch]:
        indices = self.indices[positions].tolist()
        (batch,) = self.dataset.__getitems__(indices)
        labels = self.dataset.true_labels(indices)
        return [LabelledBatch(batch.images, batch.rngs, labels=labels, train=self.dataset.train)]

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


@contextmanager
def own_randomness():
    """Inside, `torch.default_generator` may be seeded at will."""
    state = torch.get_rng_state()
    try:
        yield torch.default_generator  # not torch.manual_seed, which would seed the GPU too
    finally:
        torch.set_rng_state(state)


class ClassificationCollator:
    """Makes model inputs of `LabelledBatch`es.

    Training images get RandAugment (on levels 0 to 255) and random erasing (after normalisation, by noise of unit
    variance), each from a generator of (seed, epoch, index). MixUp and CutMix then mix neighbours, the first with the
    second, the third with the fourth, and so on, with a share drawn from the first one's generator (timm's mode `pair`,
    where MAE's release draws one share per batch). So what is mixed with what depends on the order of the images alone:
    batches of any even size, accumulated or on several processes, give the same. The last of an odd number stays as it
    is.

    Args:
        config: gives channels, mean and std.
        options: see `AugmentArguments`.
        num_classes: labels are in [0, num_classes).
    """

    def __init__(self, config: MIMConfig, options: AugmentArguments, num_classes: int):
        self.config, self.num_classes, self.probability = config, num_classes, options.mix_probability
        self.randaugment = rand_augment(config, options) if options.randaugment else None
        scale, ratio = ERASED
        erases = options.random_erasing > 0
        self.erasing = v2.RandomErasing(options.random_erasing, scale, ratio, value="random") if erases else None
        kinds = ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix))
        self.mixers = [kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, features: list[LabelledBatch]) -> dict[str, Tensor]:
        """-> `pixel_values` (batch, channels, height, width), float32, and `labels`: (batch,), or where images are
        mixed (batch, num_classes) of shares that sum to one."""
        images = torch.cat([feature.images for feature in features])
        labels = torch.cat([feature.labels for feature in features])
        rngs = [rng for feature in features for rng in feature.rngs]
        train = features[0].train
        if not train:
            return {"pixel_values": self._normalize(images), "labels": labels}
        # Always three numbers: switching one augmentation off leaves the others as they are.
        seeds = np.stack([rng.integers(2**63, size=3) for rng in rngs])
        with own_randomness() as generator:
            if self.randaugment is not None:
                augmented = []
                for image, seed in zip(images, seeds[:, 0]):
                    generator.manual_seed(int(seed))
                    augmented.append(augment(self.randaugment, image))
                images = torch.stack(augmented)
            pixels = self._normalize(images)
            if self.erasing is not None:
                for i, seed in enumerate(seeds[:, 1]):
                    generator.manual_seed(int(seed))
                    pixels[i] = self.erasing(pixels[i])
            if self.mixers:
                pixels, labels = self._mix(generator, pixels, labels, seeds[:, 2])
        return {"pixel_values": pixels, "labels": labels}

    def _normalize(self, images: Tensor) -> Tensor:
        return normalize(images, *statistics(self.config))

    def _mix(self, generator, pixels: Tensor, labels: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        shares = F.one_hot(labels, self.num_classes).float()
        for i in range(0, len(pixels) - 1, 2):
            generator.manual_seed(int(seeds[i]))
            if torch.rand(()) < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                pixels[i : i + 2], shares[i : i + 2] = mixer(pixels[i : i + 2], shares[i : i + 2])
        return pixels, shares


def augment(randaugment: v2.RandAugment, image: Tensor) -> Tensor:
    """One image (channels, height, width), uint8; channels that are no colours as a stack of grey images."""
    return randaugment(image) if len(image) in (1, 3) else randaugment(image[:, None])[:, 0]


def rand_augment(config: MIMConfig, options: AugmentArguments) -> v2.RandAugment:
    """torchvision's, whose strengths are here those of timm (9 of 10 is 27 degrees); what turns into view is the mean
    colour."""
    fill: list[float] | float = [255 * mean for mean in statistics(config)[0]]
    if config.num_channels not in (1, 3):
        fill = 255 * sum(statistics(config)[0]) / config.num_channels
    return v2.RandAugment(options.randaugment_ops, options.randaugment, MAGNITUDES, InterpolationMode.BILINEAR, fill)
