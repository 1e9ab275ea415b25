"""Loading encoders of this project and of transformers for reading out (training/checkpoint.py)."""

import pytest
import torch
from transformers import BertConfig, BertModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training.checkpoint import checkpoint_errors, load_encoder, resolve, untrained_twin
from hf_mim.training.common.checkpoint_path import check_path
from hf_mim.training.common.errors import CheckpointError


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_mae() -> ViTMAEForPreTraining:
    decoder = {f"decoder_{name}": value for name, value in SMALL.items()}
    torch.manual_seed(7)
    return ViTMAEForPreTraining(ViTMAEConfig(**SMALL, **decoder, image_size=32, patch_size=8))


def test_the_encoder_of_a_pretraining_checkpoint_is_loaded_frozen(tmp_path):
    config = MIMConfig(image_size=32, encoder_config={**SMALL, "patch_size": 8}, masking_config={"ratio": 0.5})
    saved = MIMForPreTraining(config).eval()
    saved.save_pretrained(tmp_path)
    model, pixels = load_encoder(str(tmp_path)), torch.randn(2, 3, 32, 32)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert torch.equal(model(pixels).last_hidden_state, saved.mim(pixels).last_hidden_state)


def test_vit_mae_is_loaded_without_its_masking(tmp_path):
    mae, pixels = tiny_mae(), torch.randn(2, 3, 32, 32)
    mae.save_pretrained(tmp_path)
    tokens = load_encoder(str(tmp_path))(pixels).last_hidden_state
    mae.config.mask_ratio = 0.0
    reference = ViTMAEModel(mae.config).eval()
    reference.load_state_dict(mae.vit.state_dict())
    noise = torch.arange(16).expand(2, -1)  # keeps the patches in their order
    torch.testing.assert_close(tokens, reference(pixels, noise=noise).last_hidden_state, rtol=0, atol=1e-5)


def test_what_is_no_image_encoder_is_refused(tmp_path):
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' model, which takes no images"):
        load_encoder(str(tmp_path))
    for source in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(ValueError, match=f"no checkpoint at {source}: there is no such folder"):
            load_encoder(source)


def test_a_missing_package_is_no_damage():
    reason = "^cannot load me/model: it needs a package that cannot be imported: no module of that name$"
    with pytest.raises(CheckpointError, match=reason), checkpoint_errors("me/model"):
        raise ImportError("no module of that name\nmore")


def test_a_folder_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_mae().save_pretrained(tmp_path / "model")
    assert resolve("~/model") == str(tmp_path / "model")
    assert load_encoder("~/model").config.image_size == 32
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing: there is no such folder"):
        resolve("~/nothing")


def test_the_untrained_twin_differs_and_leaves_the_random_state(tmp_path):
    tiny_mae().save_pretrained(tmp_path)
    model = load_encoder(str(tmp_path))
    before = torch.get_rng_state()
    twin, again, other = untrained_twin(model), untrained_twin(model), untrained_twin(model, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weights = [
        next(p for n, p in m.named_parameters() if "attention" in n and p.ndim == 2)
        for m in (model, twin, again, other)
    ]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[0]) and not torch.equal(weights[1], weights[3])


def test_what_must_be_a_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrain-quick").mkdir(parents=True)
    check_path("runs/pretrain-quick")
    check_path("someone/model")  # perhaps of the Hub, as is the next
    check_path("model")
    check_path("hf://someone/model")
    for source, reason in {
        "./nowhere": "there is no such folder$",
        "a/b/c": "there is no such folder, nor a folder a/b$",
        "outputs/x": "there is no such folder, nor a folder outputs$",
        "runs/pretrian-quick": r"no such folder; did you mean runs/pretrain-quick\?; a model .* is hf://runs/pretrian-quick",
    }.items():
        with pytest.raises(CheckpointError, match=f"no checkpoint at {source}: .*{reason}"):
            check_path(source)
    with pytest.raises(CheckpointError, match="no checkpoint at model: there is no such folder"):
        check_path("model", local=True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    check_path("runs/model")  # in the cache
