"""The image pipelines of transformers make every image RGB: what models of other channels do with that."""

import numpy as np
import pytest
import torch
from helpers import tiny_config
from PIL import Image
from transformers import pipeline

from hf_mim import MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.encoder_base import to_grey
from hf_mim.training.data.processors import processor_for


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def saved(model, folder) -> str:
    model.eval().save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    return str(folder)


def test_colours_become_grey_as_pil_does_it(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    wanted = torch.from_numpy(np.array(image.convert("L"))).float()
    assert (to_grey(pixels, 1)[0, 0] - wanted).abs().max() <= 0.502  # PIL rounds to whole numbers
    same = torch.randn(2, 1, 5, 7)
    assert torch.equal(to_grey(same.expand(-1, 3, -1, -1), 1), same)
    assert to_grey(same, 1) is same and to_grey(pixels, 3) is pixels


@torch.no_grad()
@pytest.mark.parametrize("classifies", [False, True])
def test_a_grey_model_in_a_pipeline(classifies, image, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(num_channels=1, num_labels=3, image_mean=[0.3], image_std=[0.4])
    model = (MIMForImageClassification if classifies else MIMModel)(config)
    task = "image-classification" if classifies else "image-feature-extraction"
    run = pipeline(task, model=saved(model, tmp_path))
    grey = image.convert("L")
    out = model(processor_for(config)(grey, return_tensors="pt")["pixel_values"])
    if classifies:
        found = torch.tensor([entry["score"] for entry in sorted(run(grey), key=lambda entry: entry["label"])])
        torch.testing.assert_close(found, out.logits[0].softmax(0))
    else:
        assert torch.equal(torch.tensor(run(grey)), out.last_hidden_state)
        # Levels in the middle, which resizing does not clip: PIL rounds to a level of 255, before it and after.
        colours = Image.fromarray(np.asarray(image) // 4 + 96)
        shown, pixels = (
            processor_for(config)(x, return_tensors="pt")["pixel_values"] for x in (colours, colours.convert("L"))
        )
        assert torch.equal(torch.tensor(run(colours)), model(shown).last_hidden_state)
        torch.testing.assert_close(to_grey(shown, 1), pixels, atol=2 / 255 / 0.4, rtol=0)


def test_a_model_of_four_channels_says_what_it_wants(tmp_path):
    with pytest.raises(ValueError, match=r"must be \(batch, 4, height, width\) as num_channels says, got \(1, 3, "):
        MIMModel(tiny_config(num_channels=4))(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"must be \(batch, 1, height, width\) as num_channels says, got \(1, 3, "):
        MIMForPreTraining(tiny_config(num_channels=1))(torch.randn(1, 3, 16, 16))
