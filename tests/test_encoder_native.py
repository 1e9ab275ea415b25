"""Vision models of transformers as encoders."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForImageClassification, ViTImageProcessor

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 4}
DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 4}
# model type: (its options, prefix tokens, can be pretrained)
MODELS = {
    "vit": (VIT, 1, True),
    "deit": (VIT, 2, True),
    "beit": ({**VIT, "use_relative_position_bias": True}, 1, True),
    "dinov2": (DINOV2, 1, True),
    "dinov2_with_registers": ({**DINOV2, "num_register_tokens": 3}, 4, True),
    "data2vec-vision": (VIT, 1, True),
    "swin": ({"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 3, "patch_size": 4}, 0, True),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 0, False),
    "convnext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 0, False),
}


def native(model_type: str, image_size: int = 32):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**MODELS[model_type][0])
    if hasattr(config, "image_size"):
        config.image_size = image_size
    model = MODEL_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_it_gives_what_the_native_model_gives(model_type, tmp_path):
    """Through `from_encoder`, saved and loaded again; the tokens before the last norm are there too."""
    peer = native(model_type)
    peer.save_pretrained(tmp_path / "native")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "native")
    ours = MIMModel.from_encoder(str(tmp_path / "native"), pooler="mean")
    assert ours.config.image_mean == [0.1, 0.2, 0.3] and ours.encoder.num_prefix_tokens == MODELS[model_type][1]
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = peer(pixel_values).last_hidden_state
        wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted
        for model in (ours, again):
            out = model(pixel_values, output_hidden_states=True)
            assert torch.equal(out.last_hidden_state, wanted)
            assert out.pooler_output.shape == (2, wanted.shape[2])


@pytest.mark.parametrize("known", [True, False])
def test_a_processor_that_does_not_normalise(known, tmp_path):
    native("vit").save_pretrained(tmp_path)
    ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    if not known:  # then its file is read, whatever class it names
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_processor_type": "Lost"}))
    config = MIMModel.from_encoder(str(tmp_path)).config
    assert config.statistics() == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("encoder", ["native", "hiera"])
def test_weights_that_do_not_fit_are_named(encoder):
    if encoder == "hiera":
        options = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    else:
        options = {"model_type": "vit", **VIT}
    network = MIMModel(MIMConfig(image_size=64, encoder=encoder, encoder_config=options)).encoder
    state = network.network.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"weights and config do not fit: {name}"):
        network.load_native_state({**state, name: torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}"):
        network.load_native_state({key: value for key, value in state.items() if key != name})


def test_another_resolution_without_a_flag():
    model = MIMModel(MIMConfig(image_size=32, encoder="native", encoder_config={"model_type": "vit", **VIT})).eval()
    assert model(torch.randn(1, 3, 48, 24)).last_hidden_state.shape == (1, 1 + 12 * 6, 32)


@pytest.mark.parametrize("model_type", [name for name in MODELS if MODELS[name][2]])
def test_it_pretrains_where_its_forward_takes_a_mask(model_type):
    options = {"model_type": model_type, **MODELS[model_type][0]}
    torch.manual_seed(0)
    model = MIMForPreTraining(MIMConfig(image_size=24, encoder="native", encoder_config=options, decoder="linear"))
    pixel_values = torch.randn(2, 3, 24, 24)
    out = model(pixel_values)
    out.loss.backward()
    # what is under the mask does not reach the prediction
    hidden = out.bool_masked_pos.view(2, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(hidden, torch.randn_like(pixel_values), pixel_values)
    model.eval()
    with torch.no_grad():
        pairs = (model(pixels, out.bool_masked_pos).logits for pixels in (pixel_values, changed))
        assert torch.equal(*pairs)
    assert out.logits.shape == (2, 36, 48)


def test_what_cannot_be_hidden_or_built_is_refused():
    with pytest.raises(ValueError, match="takes no bool_masked_pos"):
        options = {"model_type": "resnet", **MODELS["resnet"][0]}
        MIMForPreTraining(MIMConfig(image_size=32, encoder="native", encoder_config=options, decoder="linear"))
    with pytest.raises(ValueError, match="did you mean 'swin'"):
        MIMConfig(encoder="native", encoder_config={"model_type": "swinn"})
    with pytest.raises(ValueError, match="hiden_size.*did you mean 'hidden_size'"):
        MIMConfig(encoder="native", encoder_config={"model_type": "vit", "hiden_size": 32})


def test_a_classifier_around_a_native_encoder_is_one_model(tmp_path):
    native("dinov2").save_pretrained(tmp_path / "native")
    model = MIMForImageClassification.from_encoder(str(tmp_path / "native"), pooler="gem", num_labels=4)
    model.save_pretrained(tmp_path / "ours")
    pixel_values = torch.randn(2, 3, 32, 32)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)


def test_vitmae_is_encoded_whole_and_in_order(tmp_path):
    """By itself it masks in evaluation too, and shuffles its patches."""
    from transformers import ViTMAEConfig, ViTMAEModel, ViTModel

    torch.manual_seed(0)
    peer = ViTMAEModel(ViTMAEConfig(**VIT, image_size=32)).eval()
    peer.save_pretrained(tmp_path / "vitmae")
    ours = MIMModel.from_encoder(str(tmp_path / "vitmae"))
    pixel_values = torch.randn(2, 3, 32, 32)
    plain = ViTModel(CONFIG_MAPPING["vit"](**VIT, image_size=32), add_pooling_layer=False).eval()
    plain.load_state_dict(peer.state_dict())
    with torch.no_grad():
        out = ours(pixel_values).last_hidden_state
        torch.testing.assert_close(out, plain(pixel_values).last_hidden_state, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours(pixel_values).last_hidden_state, out)
