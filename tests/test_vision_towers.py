"""The image halves of CLIP, SigLIP and AIMv2 as encoders with the norm of their family, and CLIP's as DTM's teacher."""

import pytest
import torch
from helpers import tiny_config
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling.parts import make_encoder


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 4}
TEXT = {**VISION, "vocab_size": 99, "max_position_embeddings": 8}
TEXT = {name: value for name, value in TEXT.items() if name not in ("image_size", "patch_size")}


def whole(kind: str, folder) -> torch.nn.Module:
    """A small model of images and text, saved in `folder`."""
    torch.manual_seed(0)
    extra = {"projection_dim": 12} if kind == "clip" else {}
    config = CONFIG_MAPPING[kind](vision_config={**VISION, **extra}, text_config={**TEXT, **extra}, **extra)
    model = MODEL_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def tokens_of(model, kind: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """After the norm: of CLIP, whose model leaves that to the class token, by hand."""
    tower = model.vision_model
    tokens = tower(pixel_values).last_hidden_state
    return tower.post_layernorm(tokens) if kind == "clip" else tokens


@pytest.mark.parametrize("kind", ["clip", "siglip", "aimv2"])
@torch.no_grad()
def test_towers_have_the_norm_of_their_family(kind, tmp_path):
    peer = whole(kind, tmp_path / "peer")
    pixel_values = torch.randn(2, 3, 16, 16)
    normed = tokens_of(peer, kind, pixel_values)
    pooled = {}
    for applied in (True, False):
        ours = MIMModel.from_encoder(str(tmp_path / "peer"), pooler_config={"apply_final_norm": applied})
        ours.save_pretrained(tmp_path / "ours")
        out = MIMModel.from_pretrained(tmp_path / "ours")(pixel_values)
        torch.testing.assert_close(out.last_hidden_state, normed, rtol=0, atol=1e-6)
        pooled[applied] = out.pooler_output
    patches = normed[:, ours.encoder.num_prefix_tokens :]
    torch.testing.assert_close(pooled[True], patches.mean(dim=1), rtol=0, atol=1e-6)
    assert (pooled[True] - pooled[False]).abs().max() > 0.01


def test_a_model_without_a_norm_that_could_be_left_out_says_so():
    options = {**VISION, "model_type": "beit"}
    options.pop("image_size")
    with pytest.raises(ValueError, match="'beit' has no last norm"):
        MIMConfig(image_size=16, encoder="native", encoder_config=options, pooler_config={"apply_final_norm": False})


def test_a_tower_of_format_version_1_keeps_its_norm_inside():
    options = {**VISION, "model_type": "siglip_vision_model"}
    options.pop("image_size")
    fields = {"image_size": 16, "encoder": "native", "encoder_config": options}
    new, old = (make_encoder(MIMConfig.from_dict({**fields, "format_version": version})) for version in (2, 1))
    assert new.taken_norm == "post_layernorm" and "final_norm.weight" in new.state_dict()
    assert old.taken_norm is None and "network.post_layernorm.weight" in old.state_dict()


@torch.no_grad()
def test_clip_as_dtm_teacher(tmp_path):
    """The target is ln_post of every patch token, projected into the space of the text."""
    peer = whole("clip", tmp_path / "peer")
    features = {"name": "teacher_feature", "teacher": str(tmp_path / "peer"), "project": True, "norm": "none"}
    config = tiny_config(target="token_morphing", target_config={"features": features})
    model = MIMForPreTraining(config)
    pixel_values = torch.randn(2, 3, 16, 16)
    targets = model.target.targets(pixel_values, (4, 4))["patches"]
    expected = peer.visual_projection(tokens_of(peer, "clip", pixel_values)[:, 1:])
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)
    assert model.decoder.head.out_features == 12
    assert config.target_config["features"]["feature_dims"] == [12]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [("siglip", {}, "has no projection"), ("clip", {"layers": [1]}, "its last layer alone")],
)
def test_projections_that_there_are_not(kind, options, message, tmp_path):
    whole(kind, tmp_path / "peer")
    features = {"teacher": str(tmp_path / "peer"), "project": True, **options}
    with pytest.raises(ValueError, match=message):
        MIMForPreTraining(tiny_config(target="teacher_feature", target_config=features))
