"""Networks of timm whose layers behind the last stage are no part of an encoder (EfficientNet, MobileNet), and whole
ones: back in timm, through its own loading, with the features of the encoder."""

import json

import pytest
import timm
import torch
from helpers import perturb

from hf_mim import MIMConfig, MIMModel
from hf_mim.conversion import export


TOLERANCE = {"rtol": 0, "atol": 1e-5}
# name: how it is made, and what timm has behind the last stage
NETWORKS = {
    "test_efficientnet": ({"drop_path_rate": 0.1}, ["bn2", "conv_head"]),
    "test_efficientnet with finer maps": ({"output_stride": 16}, ["bn2", "conv_head"]),
    "test_efficientnet_gn": ({}, ["bn2", "conv_head"]),
    "mobilenetv3_small_050": ({}, ["conv_head"]),
    "mobilenetv4_conv_small_035": ({}, ["conv_head", "norm_head"]),
    "mobilenetv1_100": ({}, []),
    "ghostnet_050": ({}, ["blocks.8", "blocks.9", "conv_head"]),
    "densenet121": ({}, []),
}
FAST = ("test_efficientnet", "test_efficientnet with finer maps", "mobilenetv3_small_050")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]


def saved(folder, encoder: str, channels: int = 3, **options) -> MIMModel:
    torch.manual_seed(0)
    fields = {"image_size": [64, 96], "num_channels": channels, "encoder": encoder, "encoder_config": options}
    model = perturb(MIMModel(MIMConfig(**fields, masking="none"), add_pooling_layer=False), 0.02).eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def tokens(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("case", EACH)
@torch.no_grad()
def test_convnets_with_layers_behind_the_last_stage(case, tmp_path):
    name, (options, new) = case.partition(" ")[0], NETWORKS[case]
    ours = saved(tmp_path / "ours", "convnet", 2, model_type="timm", model_name=name, **options)
    lines = export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")
    assert lines[2:] == (
        [f"{', '.join(new)}: not part of the encoder, with new random weights, for fine-tuning to train"] if new else []
    )
    images = torch.randn(2, 2, 64, 96)
    expected = ours(images).last_hidden_state
    assert expected.std() > 1e-3
    place = f"local-dir:{tmp_path / 'theirs'}"
    theirs = timm.create_model(place, pretrained=True).eval()
    maps = theirs.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(tokens(maps[-1]), expected, **TOLERANCE)
    cut = timm.create_model(place, pretrained=True, features_only=True).eval()
    torch.testing.assert_close(tokens(cut(images)[-1]), expected, **TOLERANCE)
    if "forward_features" in lines[1]:
        torch.testing.assert_close(tokens(theirs.forward_features(images)), expected, **TOLERANCE)
    assert theirs.num_classes == 0 and theirs.pretrained_cfg["mean"] == ours.config.image_mean
    classifier = timm.create_model(place, pretrained=True, num_classes=5).eval()
    assert classifier(images).shape == (2, 5)


@pytest.mark.parametrize("name", ["test_vit", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)])
@torch.no_grad()
def test_whole_networks(name, tmp_path):
    """Encoder `timm`, the student of a distillation."""
    small = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]} if "swin" in name else {}
    ours = saved(tmp_path / "ours", "timm", model_name=name, **small)
    export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 96)
    found = tokens(theirs.forward_intermediates(images, norm=True, intermediates_only=True)[-1])
    torch.testing.assert_close(found, ours(images).last_hidden_state, **TOLERANCE)


def test_weights_of_another_network_are_refused(tmp_path):
    saved(tmp_path / "ours", "convnet", model_type="timm", model_name="test_efficientnet")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["encoder_config"]["model_name"] = "test_resnet"
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")
