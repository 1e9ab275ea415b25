"""What people are shown of a target: exact where the prediction is, and by one scale beside the target."""

import numpy as np
import pytest
import torch
from helpers import random_masks, target_options, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.encoder_base import patchify
from hf_mim.modeling.target_base import code_colours, feature_colours
from hf_mim.modeling.targets import TARGETS


class Oracle(torch.nn.Module):
    """A decoder that knows the answer."""

    def forward(self, encoded, bool_masked_pos, grid, scope):
        return self.answer


def model_of(target: str, folder) -> MIMForPreTraining:
    torch.manual_seed(0)
    config = tiny_config(
        image_size=32,
        encoder_config={"patch_size": 8},
        target=target,
        target_config=target_options(target, folder),
    )
    return MIMForPreTraining(config).eval()


@pytest.mark.parametrize("target", TARGETS)
def test_a_true_prediction_gives_the_target_s_picture(target, tmp_path):
    model = model_of(target, tmp_path)
    pixel_values, mask = torch.randn(2, 3, 32, 32).clamp(-1, 1), random_masks(2, 16, 8)
    model.target.bind(model.mim.encoder)
    values = model.target.targets(pixel_values, (4, 4))["patches"]
    model.decoder = Oracle()
    model.decoder.answer = values
    if not values.is_floating_point():  # codes: logits whose largest is the right one
        model.decoder.answer = torch.nn.functional.one_hot(values[..., 0], model.target.num_codes).float()
    shown = model.reconstruct(pixel_values, mask, with_target=True)
    wanted = (shown.extra or {}).get("target", shown.original)
    if target == "pixel":  # brightness and contrast of hidden patches are guessed from the others
        visible = ~mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(wanted)
        torch.testing.assert_close(shown.prediction[visible], wanted[visible], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(shown.prediction, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(shown.combined, wanted, atol=1e-5, rtol=0)
    for picture in (shown.extra or {}).values():
        assert picture.shape[0] == 2 and picture.shape[1] in (1, 3) and picture.shape[2:] == shown.masked.shape[2:]
        assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0
    if target == "frequency":
        torch.testing.assert_close(*shown.extra.values(), atol=1e-5, rtol=0)


def test_spectra_against_numpy(tmp_path):
    """The prediction's is that of its picture with the visible patches, on the scale of the image's."""
    model = model_of("frequency", tmp_path)
    pixel_values, mask = torch.randn(1, 3, 32, 32).clamp(-1, 1), random_masks(1, 16, 8)
    predicted, wanted = torch.randn(1, 16, 192) / 3, patchify(pixel_values, (4, 4))
    extra = model.target.comparison(predicted, wanted, pixel_values, (4, 4), mask)
    shown = model.target.to_image(predicted, pixel_values, (4, 4))
    hidden = mask.view(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    image = model.target.to_image(wanted, pixel_values, (4, 4))
    spectra = []
    for picture in (image, torch.where(hidden, shown, image)):
        transformed = np.fft.fft2(picture[0].double().numpy(), axes=(1, 2)) / 32
        spectra.append(np.log1p(np.abs(np.fft.fftshift(transformed, axes=(1, 2)))).mean(0))
    for (caption, found), spectrum in zip(extra.items(), spectra):
        assert "spectrum" in caption
        np.testing.assert_allclose(found[0, 0].numpy(), (spectrum / spectra[0].max()).clip(0, 1), atol=1e-5)
    assert found[0, 0, 16, 16] > 0.5  # the mean colour, in the middle


def test_predicted_features_are_drawn_in_the_target_s_colours():
    wanted, size = torch.randn(2, 12, 6), (6, 8)
    target = feature_colours(wanted, (3, 4), size)
    assert torch.allclose(feature_colours(wanted[:1], (3, 4), size, like=wanted), target[:1], atol=1e-6)
    mean = wanted.flatten(0, 1).mean(0).expand(1, 12, 6)
    plain = feature_colours(mean, (3, 4), size, like=wanted)
    assert torch.allclose(plain, plain[:, :, :1, :1].expand_as(plain), atol=1e-5) and 0 < plain.min() < plain.max() < 1


def test_each_number_has_its_colour():
    index = torch.tensor([[0, 1, 1, 2]])
    picture = code_colours(index, 3, (2, 2), (4, 4))[0, :, ::2, ::2].flatten(1).T
    assert torch.equal(picture[1], picture[2]) and len(picture.unique(dim=0)) == 3


@pytest.mark.parametrize("target", [name for name, kind in TARGETS.items() if kind.needs_image_only])
def test_targets_of_the_image_alone_need_nothing_else(target, tmp_path):
    """Their pictures can be drawn wherever the checkpoint goes."""
    model_of(target, tmp_path).save_pretrained(tmp_path / "saved")
    model = MIMForPreTraining.from_pretrained(tmp_path / "saved").eval()
    assert model.reconstruct(torch.randn(1, 3, 32, 32), with_target=True).prediction.std() > 0
