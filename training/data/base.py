"""What the trainer, the commands and the evaluation may ask of a data set of images."""

from typing import Protocol, runtime_checkable

import torch

from hf_mim.training.data.bad_images import BadImageReport


class ImageDataset(torch.utils.data.Dataset):
    """Images, by their number (`images.MIMDataset`) or as a stream (`streaming.StreamedImages`)."""

    def without_augmentation(self) -> "ImageDataset":
        """The same images, whole."""
        raise NotImplementedError

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        raise NotImplementedError

    def damaged_shards(self) -> list[str]:
        """A message about each shard of which not all can be read."""
        return []


@runtime_checkable
class FollowsEpochs(Protocol):
    """A data set or a sampler whose randomness follows from the number of the epoch."""

    def set_epoch(self, epoch: int) -> None: ...
