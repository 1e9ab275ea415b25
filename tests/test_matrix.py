"""Every encoder, mask style, decoder and target that go together train, reload bit for bit and resume; the others are
refused before training starts, with the reason."""

import math

import pytest
import torch
from helpers import CONVNEXT, DECODER_OPTIONS, NATIVE_VIT, RESNET, SWIN, TIMM_VIT, VIT, target_options

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.modeling.decoders import DECODERS
from hf_mim.modeling.encoders import ENCODERS as ALL_ENCODERS
from hf_mim.modeling.options import options_of
from hf_mim.modeling.targets import TARGETS


# (encoder, mask style): options, and the side of the cells that are hidden of a 64-pixel image
ENCODERS = {
    ("vit", "drop"): ({**VIT, "patch_size": 8}, 8),
    ("vit", "token"): ({**VIT, "patch_size": 8, "mask_style": "token"}, 8),
    ("vit", "add"): ({**VIT, "patch_size": 8, "mask_style": "add", "pixel_fill": "mean"}, 8),
    ("convnet", "add"): ({**RESNET, "mask_style": "add"}, 16),
    ("convnet", "token"): ({**CONVNEXT, "mask_style": "token"}, 16),
    ("convnet", "sparse"): ({**RESNET, "mask_style": "sparse"}, 32),
    ("timm", "fill"): (TIMM_VIT, 8),
    ("hiera", "drop"): ({"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}, 32),
    ("native", "vit"): ({**NATIVE_VIT, "patch_size": 8}, 8),
    ("native", "swin"): ({**SWIN, "patch_size": 8}, 8),
}


def why_not(encoder: str, style: str, decoder: str, target: str) -> str | None:
    """The words of the refusal, for what does not go together."""
    if target == "moving_average" and encoder != "vit":
        return "choose that encoder"
    if decoder in ("linear", "mlp") and style == "drop":
        return "needs every token"
    if decoder == "unet" and encoder != "convnet":
        return "needs the feature maps"
    if decoder == "spark" and style != "sparse":
        return "with mask_style 'sparse'"
    if decoder == "spark" and target not in ("pixel", "frequency"):
        return "predicts pixels"
    return None


def build(encoder, style, decoder, target, folder) -> MIMForPreTraining:
    torch.manual_seed(0)
    encoder_config, cell = ENCODERS[encoder, style]
    known = options_of(DECODERS[decoder])
    config = MIMConfig(
        image_size=64,
        encoder=encoder,
        encoder_config=encoder_config,
        masking_config={"ratio": 0.5},
        decoder=decoder,
        decoder_config={name: value for name, value in DECODER_OPTIONS.items() if name in known},
        target=target,
        target_config=target_options(target, folder, cell),
    )
    return MIMForPreTraining(config)


def step(model, optimizer, number: int) -> float:
    torch.manual_seed(number)
    pixel_values = torch.randn(2, 3, 64, 64)
    loss = model(pixel_values, generator=torch.Generator().manual_seed(number)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.target.update(number)
    return loss.item()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("encoder", "style"), ENCODERS)
def test_matrix(encoder, style, target, tmp_path):
    for decoder in DECODERS:
        reason = why_not(encoder, style, decoder, target)
        if reason:
            with pytest.raises(ValueError, match=reason):
                build(encoder, style, decoder, target, tmp_path)
            continue
        model = build(encoder, style, decoder, target, tmp_path)
        optimizer = adam(model.train())
        losses = [step(model, optimizer, number) for number in (1, 2)]
        assert all(map(math.isfinite, losses)), decoder
        model.save_pretrained(tmp_path / "saved")
        again = MIMForPreTraining.from_pretrained(tmp_path / "saved").train()
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), (decoder, name)
        resumed = adam(again)
        resumed.load_state_dict(optimizer.state_dict())
        moving = {name: value.clone() for name, value in model.target.moving_state().items()}
        if moving:
            again.target.load_moving_state(moving)
        assert step(again, resumed, 3) == step(model, optimizer, 3), decoder


def test_the_matrix_covers_every_encoder():
    assert {encoder for encoder, _ in ENCODERS} == set(ALL_ENCODERS)
