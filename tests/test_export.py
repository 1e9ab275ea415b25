"""Our encoders as models of others: equal outputs, loaded without hf_mim, or a reason why there is no counterpart."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, perturb, tiny_config
from safetensors.torch import load_file
from transformers import AutoModel

from hf_mim import MIMModel
from hf_mim.cli import main
from hf_mim.conversion import convert, export
from hf_mim.conversion.onnx import to_onnx


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LEARNED = {"position_embedding": "learned"}
VITS = {
    "sincos": {},
    "learned": {"encoder_config": LEARNED},
    "both": {"encoder_config": {"position_embedding": ["sincos", "learned"]}},
    "none": {"encoder_config": {"position_embedding": "none"}},
    "layer_scale": {"encoder_config": {"layer_scale_init_value": 0.1}},
    "oblong": {"image_size": [16, 24], "num_channels": 2, "encoder_config": {"patch_size": [4, 8], **LEARNED}},
    "several_class_tokens": {"encoder_config": {"num_cls_tokens": 3}},
    "wide_epsilon": {"encoder_config": {"layer_norm_eps": 1e-4}},
}
TIMM_ONLY = {
    "registers": {"encoder_config": {"num_register_tokens": 3}},
    "no_class_token": {"encoder_config": {"use_cls_token": False}},
    "qk_norm": {"encoder_config": {"qk_norm": True}},
    "no_final_norm": {"encoder_config": {"final_norm": False}},
}
CONVNETS = {
    "resnet": {"encoder": "convnet", "encoder_config": RESNET},
    "sparse": {"encoder": "convnet", "encoder_config": {**RESNET, "mask_style": "sparse"}},
    "convnext": {"encoder": "convnet", "encoder_config": CONVNEXT},
    "convnextv2": {"encoder": "convnet", "encoder_config": {**CONVNEXT, "model_type": "convnextv2"}},
}
NATIVE = {
    "vit": {"encoder": "native", "encoder_config": NATIVE_VIT},
    "dinov2": {"encoder": "native", "encoder_config": DINOV2},
    "swin": {"encoder": "native", "encoder_config": SWIN},
}
NOWHERE = {
    "relative": ({"position_embedding": "relative"}, "relative position bias"),
    "shared_relative": ({"position_embedding": "shared_relative"}, "relative position bias"),
    "rotary": ({"position_embedding": "rotary", "hidden_size": 16, "num_attention_heads": 2}, "rotary positions"),
    "swiglu": ({"mlp": "swiglu"}, "SwiGLU"),
}


def checkpoint(folder, changes: dict) -> MIMModel:
    torch.manual_seed(0)
    changes = {"image_size": 64 if changes.get("encoder") in ("convnet", "native") else 16, **changes}
    model = perturb(MIMModel(tiny_config(**changes))).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def images_for(model: MIMModel) -> torch.Tensor:
    size = model.config.image_size
    return torch.randn(2, model.config.num_channels, *([size] * 2 if isinstance(size, int) else size))


@pytest.mark.parametrize("name", [*VITS, *CONVNETS, *NATIVE])
@torch.no_grad()
def test_transformers(name, tmp_path):
    ours = checkpoint(tmp_path / "ours", {**VITS, **CONVNETS, **NATIVE}[name])
    export(str(tmp_path / "ours"), tmp_path / "theirs", "transformers")
    theirs = AutoModel.from_pretrained(tmp_path / "theirs").eval()
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] != "mim"
    pixel_values = images_for(ours)
    out, wanted = ours(pixel_values), theirs(pixel_values)
    last = wanted.last_hidden_state
    last = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last
    torch.testing.assert_close(out.last_hidden_state, last, **TOLERANCE)
    if name in CONVNETS:
        torch.testing.assert_close(out.pooler_output, wanted.pooler_output.flatten(1), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in (*VITS, *TIMM_ONLY) if name != "wide_epsilon"])
@torch.no_grad()
def test_timm_vit(name, tmp_path):
    ours = checkpoint(tmp_path / "ours", {**VITS, **TIMM_ONLY}[name])
    export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    theirs = timm.models.VisionTransformer(**saved["model_args"]).eval()
    theirs.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    pixel_values = images_for(ours)
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, theirs.forward_features(pixel_values), **TOLERANCE)
    again = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    torch.testing.assert_close(again.forward_features(pixel_values), theirs.forward_features(pixel_values))
    if name != "none":  # a table of zeros comes back as a learned one
        convert(str(tmp_path / "theirs"), tmp_path / "back")
        back = MIMModel.from_pretrained(tmp_path / "back").eval()
        torch.testing.assert_close(
            back(pixel_values).last_hidden_state, ours(pixel_values).last_hidden_state, **TOLERANCE
        )


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "convnext", "convnextv2", "timm"])
@torch.no_grad()
def test_timm_convnet(name, tmp_path):
    changes = {
        **CONVNETS,
        # timm's ResNets have a stem of 64 channels.
        "resnet": {"encoder": "convnet", "encoder_config": {**RESNET, "embedding_size": 64}},
        "bottleneck": {
            "encoder": "convnet",
            "encoder_config": {"model_type": "resnet", "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]},
        },
        "timm": {"encoder": "convnet", "encoder_config": {"model_type": "timm", "model_name": "resnet10t"}},
    }[name]
    ours = checkpoint(tmp_path / "ours", changes)
    export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    pixel_values = images_for(ours)
    wanted = theirs.forward_features(pixel_values).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, wanted, **TOLERANCE)


@pytest.mark.parametrize("to", ["transformers", "timm"])
@pytest.mark.parametrize("name", NOWHERE)
def test_what_has_no_counterpart_is_refused_with_the_reason(name, to, tmp_path, capsys):
    options, reason = NOWHERE[name]
    checkpoint(tmp_path / "ours", {"encoder_config": options})
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", to]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("name", TIMM_ONLY)
def test_transformers_refuses_what_only_timm_has(name, tmp_path):
    checkpoint(tmp_path / "ours", TIMM_ONLY[name])
    with pytest.raises(ValueError, match="cannot be exported as transformers' ViTModel, which has no"):
        export(str(tmp_path / "ours"), tmp_path / "theirs", "transformers")


def test_timm_refuses_an_epsilon_that_it_cannot_write(tmp_path):
    checkpoint(tmp_path / "ours", VITS["wide_epsilon"])
    with pytest.raises(ValueError, match="outputs would differ"):
        export(str(tmp_path / "ours"), tmp_path / "theirs", "timm")


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'onx': did you mean 'onnx'"):
        export(str(tmp_path), tmp_path / "theirs", "onx")


WITHOUT = """
import sys
sys.modules["hf_mim"] = None
import torch
from transformers import ViTModel
model = ViTModel.from_pretrained(sys.argv[1], add_pooling_layer=False).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).last_hidden_state, sys.argv[3])
"""


@pytest.mark.slow
@torch.no_grad()
def test_loads_where_hf_mim_is_absent(tmp_path):
    ours = checkpoint(tmp_path / "ours", VITS["layer_scale"])
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "transformers"]) == 0
    pixel_values = images_for(ours)
    torch.save(pixel_values, tmp_path / "in.pt")
    paths = [str(tmp_path / name) for name in ("theirs", "in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT, *paths], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), ours(pixel_values).last_hidden_state, **TOLERANCE)


ONNX = {
    "abmilp": ({"pooler": "abmilp"}, True),
    "learned": (VITS["learned"], False),
    "relative": ({"encoder_config": {"position_embedding": "relative"}}, False),
    "rotary": ({"encoder_config": {"position_embedding": "rotary"}}, True),
    "convnext": (CONVNETS["convnext"], True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
def test_onnx(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime
    from transformers.exporters.base import ExportedModel

    changes, any_size = ONNX[name]
    ours = checkpoint(tmp_path / "ours", changes)
    assert any("any size" in line for line in export(str(tmp_path / "ours"), tmp_path / "out", "onnx")) == any_size
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    first = images_for(ours)
    for pixel_values in [first[:1], first, *([torch.cat([first, first], dim=3)] if any_size else [])]:
        tokens, vector = session.run(["last_hidden_state", "pooler_output"], {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            out = ours(pixel_values)
        torch.testing.assert_close(torch.from_numpy(tokens), out.last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(vector), out.pooler_output, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out" / "config.json").exists()
    again = ExportedModel.from_pretrained(tmp_path / "out")(pixel_values=pixel_values)
    torch.testing.assert_close(again.pooler_output, out.pooler_output, rtol=1e-4, atol=1e-4)


def test_onnx_says_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.training.common.choices.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ONNX needs onnx, onnxscript, onnxruntime: pip install"):
        to_onnx(None, tmp_path)
