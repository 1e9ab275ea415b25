"""What a target must know of the training images before the first step."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.device import on_device
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.data.streaming import StreamedImages


BATCH = 32  # images that a teacher sees at a time


def fit_target(
    model: MIMForPreTraining, dataset: MIMDataset | StreamedImages, device: torch.device, console: RunConsole
) -> None:
    """Estimates the statistics of teachers' features on images of the run, whole, where the target wants them and a
    checkpoint has not brought them. Every process does it, with the same images and result.

    Raises:
        ValueError: a teacher's features cannot be standardised.
    """
    count = model.target.images_to_fit()
    if not count:
        return
    on_device(model, device)
    with console.progress() as bar:
        batches = (batch.to(device) for batch in whole_images(dataset, model.config, count))
        model.target.fit(bar.track(batches, total=-(-count // BATCH), description="statistics of the teachers"))
    names = ", ".join(dict.fromkeys(teacher.source for teacher in teachers_of(model.target)))
    console.log(f"statistics of the features of {names}: estimated on up to {count:,} training images")


def whole_images(dataset: MIMDataset | StreamedImages, config: MIMConfig, count: int) -> Iterator[Tensor]:
    """Batches of `pixel_values` of up to `count` training images, always the same; of a stream, the first ones."""
    collate, whole = MIMCollator(config), dataset.without_augmentation()
    if isinstance(whole, MIMDataset):
        indices = draw_subset(len(whole), count).tolist()
        for start in range(0, len(indices), BATCH):
            yield collate(whole.__getitems__(indices[start : start + BATCH]))["pixel_values"]
        return
    parts = itertools.islice(whole, count)
    while batch := list(itertools.islice(parts, BATCH)):
        yield collate(batch)["pixel_values"]
