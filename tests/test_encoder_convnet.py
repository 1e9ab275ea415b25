"""ConvNets as masked encoders. (Equality with the native models: test_parity.py.)"""

import pytest
import torch

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel


RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TIMM = {"model_type": "timm", "model_name": "resnet18", "output_stride": 8}
# options, stride of the map entering stage 3, stride of the last map, its width
NETWORKS = {"resnet": (RESNET, 16, 32, 32), "convnext": (CONVNEXT, 16, 32, 32), "timm": (TIMM, 8, 8, 512)}


def convnet(name: str, image_size=(64, 96), **options) -> MIMModel:
    torch.manual_seed(0)
    config = MIMConfig(image_size=image_size, encoder="convnet", encoder_config={**NETWORKS[name][0], **options})
    return MIMModel(config, use_mask_token=True).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_grids_maps_and_widths(name):
    _, masked_stride, stride, width = NETWORKS[name]
    model = convnet(name)
    assert model.encoder.mask_grid(64, 96) == (64 // masked_stride, 96 // masked_stride)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.feature_maps[-1].shape == (2, width, 64 // stride, 96 // stride)
    assert [feature_map.shape[1] for feature_map in out.feature_maps] == model.encoder.num_features
    strides = [64 // feature_map.shape[2] for feature_map in out.feature_maps]
    assert strides == list(model.encoder.strides)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("stage", [1, 3])
def test_the_token_acts_on_hidden_cells_of_the_map_entering_its_stage(name, stage):
    """z' = (1 - m) z + m (scale z + token), by hand, for both mask styles."""
    for style in ("add", "token"):
        model = convnet(name, mask_style=style, mask_stage=stage, pixel_fill="none", mask_scale_init_value=0.25)
        encoder, pixel_values = model.encoder, torch.randn(2, 3, 64, 96)
        rows, cols = encoder.mask_grid(64, 96)
        mask = torch.rand(2, rows * cols) < 0.5
        with torch.no_grad():
            encoder.mask_token.normal_()
            stages = split(encoder)
            features = pixel_values
            for module in stages[: stage + 1]:
                features = module(features)
            hidden = mask.view(2, 1, rows, cols).float()
            kept = 0.25 * features if style == "add" else 0
            features = (1 - hidden) * features + hidden * (kept + encoder.mask_token.view(1, -1, 1, 1))
            for module in stages[stage + 1 :]:
                features = module(features)
            wanted = features.flatten(2).transpose(1, 2)
            torch.testing.assert_close(model(pixel_values, mask).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def split(encoder):
    from hf_mim.modeling.encoder_convnet import split_network

    stem, stages = split_network(encoder.network)
    return [stem, *stages]


def test_a_filled_pixel_has_no_influence():
    model = convnet("resnet", mask_style="token", pixel_fill="zero")
    pixel_values, mask = torch.randn(1, 3, 64, 96), torch.rand(1, 24) < 0.5
    hidden = mask.view(1, 1, 4, 6).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, torch.randn_like(pixel_values), pixel_values)
    with torch.no_grad():
        assert torch.equal(model(pixel_values, mask).last_hidden_state, model(changed, mask).last_hidden_state)


def test_the_mask_scale_starts_where_it_is_told_and_can_be_left_out():
    assert (convnet("resnet").encoder.mask_scale == 1e-6).all()
    assert convnet("resnet", mask_scale_init_value=None).encoder.mask_scale is None
    assert convnet("resnet", mask_style="token").encoder.mask_scale is None


@pytest.mark.parametrize("name", NETWORKS)
def test_coarse_maps_are_upsampled_to_the_mask_grid(name):
    config = MIMConfig(
        image_size=64,
        encoder="convnet",
        encoder_config=NETWORKS[name][0],
        decoder="linear",
        masking_config={"ratio": 0.5},
    )
    model = MIMForPreTraining(config)
    rows, cols = model.mask_grid(64, 64)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.logits.shape == (2, rows * cols, 3 * (64 // rows) ** 2)
    assert model.reconstruct(torch.randn(2, 3, 64, 64)).prediction.shape == (2, 3, 64, 64)


def test_timm_keeps_its_own_initialisation():
    import timm

    torch.manual_seed(0)
    model = convnet("timm")
    stds = [module.weight.std().item() for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    peer = timm.create_model("resnet18", features_only=True, output_stride=8)
    wanted = [module.weight.std().item() for module in peer.modules() if isinstance(module, torch.nn.Conv2d)]
    assert stds == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "resnett"}, "did you mean 'resnet'"),
        ({**RESNET, "mask_style": "drop"}, "mask_style 'drop'"),
        ({**RESNET, "mask_stage": 4}, "mask_stage 4 must be from 0 to 3"),
        ({**RESNET, "pixel_fill": "random"}, "pixel_fill 'random'"),
        ({"model_type": "timm", "model_name": "resnet19"}, "timm model 'resnet19'"),
        ({"model_type": "timm", "model_name": "vit_tiny_patch16_224"}, "cannot be cut into stages"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MIMConfig(image_size=64, encoder="convnet", encoder_config=options)


def test_an_image_that_does_not_fit_the_stride():
    with pytest.raises(ValueError, match="50x64 is not divisible.*64x64 would be"):
        MIMConfig(image_size=(50, 64), encoder="convnet", encoder_config=RESNET)
    with pytest.raises(ValueError, match="no attentions"):
        convnet("resnet")(torch.randn(1, 3, 64, 64), output_attentions=True)
