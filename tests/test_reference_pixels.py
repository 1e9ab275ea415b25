"""SimMIM, A2MIM, MAE and Beyond [cls] beside the numbers of the authors' own programs, see test_reference.py."""

import argparse
import pathlib
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from test_reference import EXACT, REFERENCE, case, official_file, read

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.conversion import convert
from hf_mim.modeling.encoder_base import patchify, unpatchify
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_frequency import focal_frequency_loss
from hf_mim.modeling.targets import TARGETS


@pytest.fixture
def yacs(monkeypatch):
    """`CfgNode` as yacs has it, a dict with attributes beside its entries; gone before a file is read."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = module.CfgNode(MODEL=module.CfgNode(TYPE="vit"))
    node.__dict__["__immutable__"] = True
    yield node
    monkeypatch.delitem(sys.modules, "yacs.config", raising=False)


def saved(name, folder, **rest):
    """The case's weights as the official program saves them, with what it saves beside them."""
    path = official_file(name, folder)
    torch.save(torch.load(path, weights_only=True) | rest, path)
    return path


def pretraining_model(path, folder, **hints):
    folder.mkdir(exist_ok=True)
    out = Path(tempfile.mkdtemp(dir=folder))
    lines = convert(str(path), out, **hints)
    return MIMForPreTraining.from_pretrained(out).eval(), lines


def as_map(tokens, grid):
    return tokens[:, -grid[0] * grid[1] :].mT.unflatten(2, grid)


@pytest.mark.parametrize(("name", "step"), [("simmim_vit", 1), ("simmim_swin", 4)])
@torch.no_grad()
def test_simmim(name, step, tmp_path, yacs, monkeypatch):
    inputs, expected = case(name)
    rest = {"optimizer": {}, "lr_scheduler": {}, "max_accuracy": 0.0, "epoch": 3, "config": yacs}
    path = saved(name, tmp_path, **rest)
    monkeypatch.delitem(sys.modules, "yacs.config")
    model, lines = pretraining_model(path, tmp_path)
    assert any("passed over" in line and "yacs.config.CfgNode" in line for line in lines)
    pixels, mask = inputs["pixels"], inputs["mask"].bool().flatten(1)
    size = pixels.shape[-1]
    assert model.config.image_size == size and model.config.masking_config["unit"] == (2 if step == 1 else 8)
    out = model(pixels, mask)
    tokens = model.mim(pixels, mask).last_hidden_state
    grid = expected["latent_map"].shape[2:]
    torch.testing.assert_close(as_map(tokens, grid), expected["latent_map"], **EXACT)
    image = unpatchify(out.logits, model.mim.encoder.mask_grid(size, size), size, size)
    torch.testing.assert_close(image[..., ::step, ::step], expected["reconstruction"], **EXACT)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=1e-5, atol=0)
    if name == "simmim_vit":
        unmasked = model.mim(pixels).last_hidden_state
        torch.testing.assert_close(as_map(unmasked, grid), expected["latent_map_unmasked"], **EXACT)


@pytest.mark.parametrize("name", ["a2mim_vit", "a2mim_resnet", "a2mim_convnext"])
def test_a2mim(name, tmp_path):
    """Fill, last map, reconstruction, both losses and the gradient of the whole loss."""
    inputs, expected = case(name)
    expected = {key.removesuffix("_every_fourth"): value for key, value in expected.items()}
    meta = {"epoch": 3, "mmcv_version": "1.7.2", "config": "model = dict()"}
    model, _ = pretraining_model(
        saved(name, tmp_path, meta=meta, optimizer={}), tmp_path, image_size=inputs["pixels"].shape[-1]
    )
    pixels, mask = inputs["pixels"], inputs["mask"].bool().flatten(1)
    size, grid = pixels.shape[-1], expected["latent_map"].shape[2:]

    def compare_images(patches, wanted, scale=1.0):
        image = unpatchify(patches, model.mim.encoder.mask_grid(size, size), size, size)
        step = size // wanted.shape[-1]
        torch.testing.assert_close(image[..., ::step, ::step] / scale, wanted / scale, **EXACT)

    out = model(pixels, mask)
    torch.testing.assert_close(as_map(model.mim(pixels, mask).last_hidden_state, grid), expected["latent_map"], **EXACT)
    compare_images(out.logits, expected["reconstruction"])
    torch.testing.assert_close(out.loss, expected["loss_total"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(out.loss, out.logits)
    wanted = expected["gradient_of_reconstruction"]
    compare_images(gradient, wanted, scale=wanted.abs().max())
    for key in ("latent_map_unmasked_raw_pixels", "latent_map_unmasked"):
        if key in expected:
            unmasked = model.mim(pixels).last_hidden_state
            torch.testing.assert_close(as_map(unmasked, grid), expected[key], **EXACT)
    model.target.weight = 0.0
    torch.testing.assert_close(model(pixels, mask).loss, expected["loss_spatial"], rtol=1e-5, atol=0)


FOCAL = [key for key in case("frequency_losses")[1] if key.startswith("focal_frequency")]


@pytest.mark.parametrize("name", FOCAL)
def test_focal_frequency_loss(name):
    inputs, expected = case("frequency_losses")
    average, alpha, log = (int(part[-1]) for part in name.split("_")[-3:])
    prediction = inputs["prediction"].requires_grad_()
    options = {"alpha": alpha, "log_weight": bool(log), "average_spectra": bool(average)}
    loss = focal_frequency_loss(prediction, inputs["target"], **options)
    torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=0)
    gradient = expected.get(name.replace("focal_frequency", "gradient"))
    if gradient is not None:
        (found,) = torch.autograd.grad(loss, prediction)
        torch.testing.assert_close(found[: len(gradient)], gradient, rtol=1e-5, atol=1e-8)


# The losses of the released configurations, and the ViT's with what else can stand for the visible pixels.
A2MIM = {
    "vit": {"loss": "l1", "weight": 0.1},
    "vit_spatial": {"loss": "l1", "weight": 0.0},
    "resnet50": {"loss": "focal_l1", "weight": 0.5, "visible_share": 0.001},
    "resnet50_spatial": {"loss": "focal_l1", "weight": 0.0},
    "convnext": {"loss": "focal_l1", "weight": 0.0},
    **{f"vit_replace_{name}": {"replace": name} for name in ("mixed", "prediction", "target")},
}


@pytest.mark.parametrize("name", A2MIM)
def test_a2mim_s_losses(name):
    inputs, expected = case("frequency_losses")
    config = MIMConfig(image_size=32, encoder_config={"size": "tiny", "patch_size": 8}, target="frequency")
    target = TARGETS["frequency"](config, make_encoder(config), **A2MIM[name])
    prediction, pixels = ({"patches": patchify(inputs[key], (4, 4))} for key in ("prediction", "target"))
    loss = target.loss(prediction, pixels, inputs["mask_stride8"].bool().flatten(1), (4, 4))
    torch.testing.assert_close(loss, expected[f"a2mim_loss_{name}"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_mae_with_decoder_heads(tmp_path):
    inputs, expected = case("mae")
    arguments = argparse.Namespace(norm_pix_loss=True, output_dir=pathlib.PurePosixPath("out"))
    path = saved("mae", tmp_path, args=arguments, optimizer={}, epoch=3, scaler={})
    model, lines = pretraining_model(path, tmp_path, heads=2, decoder_heads=4)
    assert not any("heads" in line and "assumed" in line for line in lines)
    pixels, mask = inputs["pixels"], expected["mask"]
    torch.testing.assert_close(model.mim(pixels).last_hidden_state, expected["features_unmasked"], **EXACT)
    out = model(pixels, mask)
    torch.testing.assert_close(out.loss, expected["loss"], rtol=1e-5, atol=0)
    model.target.scope = "all"
    prediction = model(pixels, mask, return_loss=False).logits
    torch.testing.assert_close(prediction, expected["prediction"], **EXACT)
    _, lines = pretraining_model(path, tmp_path / "again", heads=2)
    assert any("attention heads of the decoder are assumed" in line for line in lines)


@torch.no_grad()
def test_beyond_cls_head_beside_its_encoder(tmp_path):
    pixels = case("beyond_cls_statistics")[0]["pixels"]
    said = {"abmilp_act": "relu", "abmilp_sa": "none", "abmilp_depth": 1, "abmilp_cond": None}
    said |= {"abmilp_content": "patch", "data_path": pathlib.PosixPath("/data"), "return_block": None}
    rest = {"args": argparse.Namespace(**said), "optimizer": {}, "epoch": 1, "scaler": {}, "test_stats": {"acc1": 1.0}}
    encoder, path = official_file("beyond_cls_statistics", tmp_path), saved("beyond_cls_head", tmp_path, **rest)
    with pytest.raises(ValueError, match="--encoder FILE"):
        convert(str(path), tmp_path / "none")
    convert(str(path), tmp_path / "ours", heads=3, encoder=encoder)
    model = MIMForImageClassification.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(model(pixels).logits, case("beyond_cls_head")[1]["logits"], rtol=1e-5, atol=2e-5)
    assert read(REFERENCE / "beyond_cls_head.weights.safetensors")


READINGS = {
    "cls": ("cls", {}),
    "pos": ("mean", {}),
    **{f"cp{size}": ("central", {"size": size}) for size in (1, 2, 3, 4)},
    **{f"ca{size}": ("central_attention", {"size": size}) for size in (1, 2)},
    "attn-mn": ("cls_attention", {"head": "mean"}),
    "attn-lcte": ("cls_attention", {"head": "lowest_entropy"}),
}


@pytest.mark.parametrize("name", READINGS)
@torch.no_grad()
def test_selections_of_beyond_cls(name, tmp_path):
    inputs, expected = case("beyond_cls_statistics")
    convert(str(official_file("beyond_cls_statistics", tmp_path)), tmp_path / "ours", heads=3)
    pooler, options = READINGS[name]
    options = {"pooler": pooler, "pooler_config": {**options, "apply_final_norm": False}}
    model = MIMModel.from_pretrained(tmp_path / "ours", **options).eval()
    found = model(inputs["pixels"]).pooler_output
    # The release divides these weighted sums by the number of patches, too, which the batch norm behind them undoes.
    scale = 16 if name.startswith("ca") else 1
    torch.testing.assert_close(found, scale * expected[f"reading.{name}"], **EXACT)
