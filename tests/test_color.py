"""Random brightness, contrast and saturation against their formulas, and where they are applied."""

import numpy as np
import pytest
import torch
from test_data import config, rows

from hf_mim.training.common.errors import DataError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.color import jitter_colors
from hf_mim.training.data.images import MIMDataset


def jitter_by_hand(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """(channels, height, width) in float64: blends with black, with the mean grey, with each pixel's grey."""
    order, factors = rng.random(3).argsort(), rng.uniform(1 - strength, 1 + strength, 3)
    for i in order:
        grey = np.tensordot([0.2989, 0.587, 0.114], image, axes=1)[None] if len(image) == 3 else image
        other = (np.zeros_like(image), np.full_like(image, np.floor(grey).mean()), grey)[i]
        image = (factors[i] * image + (1 - factors[i]) * other).clip(0, 255)
    return image


@pytest.mark.parametrize("channels", [1, 3])
def test_against_its_formulas(channels):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, channels, 6, 5), dtype=np.uint8))
    generators = [[np.random.default_rng(seed) for seed in range(20)] for _ in range(2)]
    expected = [jitter_by_hand(image.double().numpy(), rng, 0.4) for image, rng in zip(images, generators[0])]
    found = jitter_colors(images.clone(), generators[1], 0.4).double().numpy()
    assert np.abs(found - np.stack(expected)).max() <= 4  # levels are rounded down three times, and scaled
    assert np.abs(found - images.numpy()).mean() > 10


def test_training_images_are_changed_alike_in_every_pass_and_others_never():
    options = DataArguments(color_jitter=0.4, horizontal_flip=False)
    data = MIMDataset(rows(4), config(), options)
    plain = MIMDataset(rows(4), config(), DataArguments(horizontal_flip=False))
    first, again = (data.__getitems__([0, 1])[0].images for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, plain.__getitems__([0, 1])[0].images)
    alone = torch.cat([data[0].images, data[1].images])
    assert torch.equal(first, alone)
    for whole in (data.without_augmentation(), MIMDataset(rows(4), config(), options, train=False)):
        assert torch.equal(whole[0].images, plain[0].images)
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__([0, 1])[0].images, first)


def test_what_is_refused():
    with pytest.raises(RecipeError, match=r"color_jitter must be in \[0, 1\], not 1.5"):
        DataArguments(color_jitter=1.5)
    with pytest.raises(RecipeError, match="does not go with data.crop_on_device"):
        DataArguments(color_jitter=0.4, crop_on_device=True, crop_scale=[0.5, 1.0])
    with pytest.raises(DataError, match="needs images of 1 or 3 channels, not 2"):
        MIMDataset(rows(2), config(channels=2), DataArguments(color_jitter=0.4))
