"""Checkpoints of others as ours: equal outputs wherever their code can be installed, every key accounted for."""

import argparse
import json
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
import transformers
from helpers import perturb
from peers import fill_positions
from safetensors.torch import save_file

from hf_mim import MIMConfig, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.cli import main
from hf_mim.conversion import convert
from hf_mim.conversion.convert import model_class, own_names
from hf_mim.modeling.layers import sincos_2d
from hf_mim.training.conversion.convnets import dense_kernels
from hf_mim.training.conversion.official import Hints, convert_state


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 24, "patch_size": 4}
BEIT = {**VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}
CONV = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
TRANSFORMERS = {
    "ViT": VIT,
    "ViTMAE": {**VIT, "mask_ratio": 0.0},
    "Beit": BEIT,
    "Beit-shared": {**BEIT, "use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "Beit-mean": {**BEIT, "use_mean_pooling": False, "use_mask_token": True},
    "Data2VecVision": {**BEIT, "use_mean_pooling": False},
    "Dinov2": {**VIT, "mlp_ratio": 2},
    "Dinov2-swiglu": {**VIT, "use_swiglu_ffn": True},
    "Dinov2WithRegisters": {**VIT, "num_register_tokens": 3},
    "Pixio": {**VIT, "mlp_ratio": 2, "n_cls_tokens": 5},
    "ConvNext": CONV,
    "ConvNextV2": CONV,
    "ResNet": {**CONV, "embedding_size": 8},
    "ResNet-basic": {**CONV, "embedding_size": 8, "layer_type": "basic"},
    "Swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 2,
        "patch_size": 4,
        "image_size": 32,
    },
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter and statistic."""
    torch.manual_seed(0)
    perturb(model)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def converted(source, out, **options) -> tuple[MIMModel, dict]:
    convert(str(source), out, **options)
    return MIMModel.from_pretrained(out).eval(), json.loads((Path(out) / "conversion.json").read_text())


def save(state: dict, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_transformers_models(name, tmp_path):
    kind = name.split("-")[0]
    peer = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**TRANSFORMERS[name]))
    if kind == "ViTMAE":
        torch.nn.init.normal_(peer.embeddings.position_embeddings)
    fill(peer).save_pretrained(tmp_path / "theirs")
    ours, summary = converted(tmp_path / "theirs", tmp_path / "ours")
    conv, size = kind.startswith(("Conv", "Res")), 64 if kind.startswith(("Conv", "Res")) else 24
    size = 32 if kind == "Swin" else size
    pixel_values = torch.randn(2, 3, size, size)
    extra = {"noise": torch.arange(36.0).expand(2, -1)} if kind == "ViTMAE" else {}
    wanted, out = peer(pixel_values, **extra), ours(pixel_values)
    last = wanted.last_hidden_state
    torch.testing.assert_close(out.last_hidden_state, last.flatten(2).transpose(1, 2) if conv else last, **TOLERANCE)
    if conv:
        torch.testing.assert_close(out.pooler_output, wanted.pooler_output.flatten(1), **TOLERANCE)
    assert ours.config.encoder == ("convnet" if conv else "native" if kind == "Swin" else "vit")
    left = set(summary["left"])
    assert set(summary["used"]) | left == set(peer.state_dict()) and all("pooler" in n or "mask" in n for n in left)


@torch.no_grad()
def test_transformers_mae_with_decoder(tmp_path):
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    config = transformers.ViTMAEConfig(**VIT, **decoder, decoder_intermediate_size=24, norm_pix_loss=True)
    peer = fill(transformers.ViTMAEForPreTraining(config))
    fill_positions(peer)
    peer.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = MIMForPreTraining.from_pretrained(tmp_path / "ours")
    assert ours.config.encoder_config["position_embedding"] == "sincos"
    pixel_values = torch.randn(2, 3, 24, 24)
    theirs = peer(pixel_values)
    out = ours(pixel_values, bool_masked_pos=theirs.mask.bool())
    torch.testing.assert_close(out.loss, theirs.loss, **TOLERANCE)


TIMM_VITS = {
    "plain": {},
    "oblong": {"img_size": (24, 40)},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "registers_embedded": {"reg_tokens": 2},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "mean": {"global_pool": "avg", "fc_norm": True},
    "qk_norm": {"qk_norm": True},
    "no_bias": {"qkv_bias": False},
    "pre_norm": {"pre_norm": True},
    "swiglu": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
}


@pytest.mark.parametrize("name", TIMM_VITS)
@torch.no_grad()
def test_timm_vits(name, tmp_path):
    options = {"img_size": 24, "patch_size": 4, "num_classes": 5, **TIMM_VITS[name]}
    peer = fill(timm.models.VisionTransformer(embed_dim=32, depth=2, num_heads=4, **options))
    save(peer.state_dict(), tmp_path / "vit.pth")
    size = options["img_size"] if name == "oblong" else (24, 24)
    ours, summary = converted(tmp_path / "vit.pth", tmp_path / "ours", heads=4, image_size=list(size))
    pixel_values = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, peer.forward_features(pixel_values), **TOLERANCE)
    assert set(summary["used"]) | set(summary["left"]) == set(peer.state_dict())
    assert all(key.startswith(("head.", "fc_norm.")) for key in summary["left"])


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_timm_beit(shared, tmp_path):
    """The names of the official files of BEiT, BEiT-v2, DTM and SimMIM, whose implementation timm took over."""
    positions = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared, "use_abs_pos_emb": False}
    peer = timm.models.beit.Beit(24, 4, embed_dim=32, depth=2, num_heads=4, init_values=0.1, num_classes=0, **positions)
    fill(peer)
    save({"model": peer.state_dict()}, tmp_path / "beit.pth")
    ours, _ = converted(tmp_path / "beit.pth", tmp_path / "ours")
    pixel_values = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, peer.forward_features(pixel_values), **TOLERANCE)
    prefixed = {f"encoder.{name}": value for name, value in peer.state_dict().items()}
    prefixed |= {"encoder.mask_token": torch.randn(1, 1, 32), "decoder.0.bias": torch.randn(48)}
    prefixed["decoder.0.weight"] = torch.randn(48, 32, 1, 1)
    save({"model": prefixed}, tmp_path / "simmim.pth")
    ours, summary = converted(tmp_path / "simmim.pth", tmp_path / "simmim")
    assert summary["kind"] == "SimMIM" and set(summary["left"]) <= {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, peer.forward_features(pixel_values), **TOLERANCE)
    full = MIMForPreTraining.from_pretrained(tmp_path / "simmim").eval()
    out = full(pixel_values, bool_masked_pos=torch.zeros(2, 36, dtype=torch.bool), return_loss=False)
    tokens = ours(pixel_values).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    shuffled = torch.nn.functional.conv2d(tokens, prefixed["decoder.0.weight"], prefixed["decoder.0.bias"])
    wanted = torch.nn.functional.pixel_shuffle(shuffled, 4)
    cells = out.logits.view(2, 6, 6, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 24, 24)
    torch.testing.assert_close(cells, wanted, **TOLERANCE)


def openmixup_name(name: str) -> str:
    for theirs, ours in {
        "blocks.": "layers.",
        ".norm": ".ln",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "patch_embed.proj": "patch_embed.projection",
    }.items():
        name = name.replace(theirs, ours)
    return "backbone." + (f"ln1{name[4:]}" if name.startswith("norm.") else name)


@torch.no_grad()
def test_a2mim_vit(tmp_path):
    """OpenMixup's ViT computes what timm's BEiT does, under other names."""
    positions = {"use_rel_pos_bias": True, "use_abs_pos_emb": True, "global_pool": "token"}
    peer = timm.models.beit.Beit(24, 4, embed_dim=32, depth=2, num_heads=4, init_values=0.1, num_classes=0, **positions)
    state = {openmixup_name(name): value for name, value in fill(peer).state_dict().items()}
    save({"meta": {"epoch": 1}, "state_dict": state}, tmp_path / "a2mim.pth")
    ours, summary = converted(tmp_path / "a2mim.pth", tmp_path / "ours")
    assert not summary["left"] and ours.config.encoder_config["position_embedding"] == ["learned", "relative"]
    pixel_values = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(pixel_values).last_hidden_state, peer.forward_features(pixel_values), **TOLERANCE)


# What the command that trained it says of an AbMILP head.
ABMILP = {
    "paper": {"abmilp_depth": 1, "abmilp_act": "relu", "abmilp_sa": "none", "abmilp_content": "patch"},
    "command_line": {"abmilp_depth": 2, "abmilp_act": "tanh", "abmilp_sa": "both", "abmilp_content": "all"},
    "map": {"abmilp_depth": 3, "abmilp_act": "relu", "abmilp_sa": "map", "abmilp_content": "all", "abmilp_cond": "pe"},
    "positions": {"abmilp_depth": 2, "abmilp_act": "relu", "abmilp_sa": "none", "abmilp_content": "patch"},
}
ABMILP["positions"]["abmilp_cond"] = "pe"


def abmilp_head(said: dict, dim: int = 32, classes: int = 5) -> dict[str, torch.Tensor]:
    """Random weights under the names of the release, for 6x6 patches."""
    everything = said["abmilp_content"] == "all"
    table = torch.nn.functional.pad(sincos_2d((6, 6), (6, 6), dim), (0, 0, int(everything), 0))
    head, last = {"head.0.pos_embed": table[None]}, 2 * (said["abmilp_depth"] - 1)
    for i in range(0, last + 1, 2):
        name = f"head.0.attention_predictor.{i}"
        head |= {f"{name}.weight": torch.randn(1 if i == last else dim, dim), f"{name}.bias": torch.randn(dim)}
    head[f"{name}.bias"] = torch.randn(1)
    if said["abmilp_sa"] != "none":
        head |= {"head.0.self_attn.qkv.weight": torch.randn(3 * dim, dim) / 3}
        head |= {"head.0.self_attn.proj.weight": torch.randn(dim, dim), "head.0.self_attn.proj.bias": torch.randn(dim)}
    head |= {"head.1.running_mean": torch.randn(dim), "head.1.running_var": torch.rand(dim) + 0.2}
    head |= {"head.1.num_batches_tracked": torch.tensor(7)}
    return head | {"head.2.weight": torch.randn(classes, dim), "head.2.bias": torch.randn(classes)}


def abmilp_logits(tokens: torch.Tensor, head: dict[str, torch.Tensor], said: dict) -> torch.Tensor:
    """From the formulas of methods: tokens (batch, 1 + patches, dim) before the last norm."""
    head = {name: value.to(tokens.dtype) for name, value in head.items()}
    x = seen = tokens if said["abmilp_content"] == "all" else tokens[:, 1:]
    if said["abmilp_sa"] != "none":
        q, k, v = (x @ head["head.0.self_attn.qkv.weight"].T).chunk(3, dim=-1)
        attended = (q @ k.mT / x.shape[2] ** 0.5).softmax(-1) @ v
        seen = attended @ head["head.0.self_attn.proj.weight"].T + head["head.0.self_attn.proj.bias"]
        x = seen if said["abmilp_sa"] == "both" else x
    if said.get("abmilp_cond") == "pe":
        seen = seen + head["head.0.pos_embed"]
    for i in range(said["abmilp_depth"]):
        name = f"head.0.attention_predictor.{2 * i}"
        seen = seen @ head[f"{name}.weight"].T + head[f"{name}.bias"]
        if i + 1 < said["abmilp_depth"]:
            seen = seen.tanh() if said["abmilp_act"] == "tanh" else seen.relu()
    pooled = (seen.softmax(1) * x).sum(1)
    normed = (pooled - head["head.1.running_mean"]) / (head["head.1.running_var"] + 1e-6).sqrt()
    return normed @ head["head.2.weight"].T + head["head.2.bias"]


@pytest.mark.parametrize("name", ABMILP)
@torch.no_grad()
def test_classifiers_of_beyond_cls(name, tmp_path):
    """Encoder, pooling head, affine-free batch norm and linear layer become one model with the same logits."""
    said = ABMILP[name]
    peer = fill(timm.models.VisionTransformer(24, 4, embed_dim=32, depth=2, num_heads=4, num_classes=0))
    head = abmilp_head(said)
    state = {**peer.state_dict(), **head, "oracle.blocks.0.norm1.weight": torch.ones(3)}
    save({"model": state, "args": argparse.Namespace(**said)}, tmp_path / "head.pth")
    convert(str(tmp_path / "head.pth"), tmp_path / "ours", heads=4)
    summary = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert {*summary["used"], *summary["left"]} == set(state)
    unused = {"head.0.pos_embed", "head.1.num_batches_tracked", "oracle.blocks.0.norm1.weight"}
    assert set(summary["left"]) == unused and summary["kind"] == "Beyond [cls]"
    ours = MIMForImageClassification.from_pretrained(tmp_path / "ours").eval().double()
    # In float64: float32 alone rounds logits of random weights by more than the tolerance.
    pixel_values = torch.randn(3, 3, 24, 24).double()
    peer.norm = torch.nn.Identity()
    wanted = abmilp_logits(peer.double().forward_features(pixel_values), head, said)
    assert (ours(pixel_values).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_a_pooling_head_that_cannot_be_told_is_named(tmp_path):
    said = ABMILP["command_line"]
    peer = timm.models.VisionTransformer(24, 4, embed_dim=32, depth=1, num_heads=4, num_classes=0)
    head = abmilp_head(said)
    save({"model": {**peer.state_dict(), **head}}, tmp_path / "head.pth")
    lines = convert(str(tmp_path / "head.pth"), tmp_path / "ours", heads=4)
    assert any("does not say --abmilp_act (tanh or relu)" in line and "only the encoder" in line for line in lines)
    summary = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert set(summary["left"]) == set(head) and lines[-1] == "  saved as MIMModel"
    save({"model": head}, tmp_path / "alone.pth")
    with pytest.raises(ValueError, match="pooling head of Beyond .cls. without its encoder"):
        convert(str(tmp_path / "alone.pth"), tmp_path / "out")


CONVNETS = {
    "resnet18": None,
    "resnet50": None,
    "convnext_atto": None,
    "convnextv2_atto": None,
    "seresnet18": "seresnet18",
    "regnetx_002": "regnetx_002",
}


@pytest.mark.parametrize("name", CONVNETS)
@torch.no_grad()
def test_timm_convnets(name, tmp_path):
    peer = fill(timm.create_model(name, num_classes=3))
    save_file(peer.state_dict(), tmp_path / "net.safetensors")
    ours, summary = converted(tmp_path / "net.safetensors", tmp_path / "ours", timm_name=CONVNETS[name])
    pixel_values = torch.randn(1, 3, 64, 64)
    wanted = peer.forward_features(pixel_values)
    out = ours(pixel_values)
    last = wanted.flatten(2).transpose(1, 2)
    # Activations of unnormalised random networks are large: the tolerance is relative to the largest.
    scale = last.abs().max()
    torch.testing.assert_close(out.last_hidden_state / scale, last / scale, **TOLERANCE)
    assert set(summary["used"]) | set(summary["left"]) == set(peer.state_dict())


def test_timm_folder(tmp_path):
    """What timm saves itself: the config says heads, size and normalisation."""
    peer = fill(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=2))
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    saved = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "depth": 2}}
    saved["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    ours, _ = converted(tmp_path, tmp_path / "ours")
    assert ours.config.encoder_config["num_attention_heads"] == 3 and ours.config.image_mean == [0.5] * 3
    # In float64: with random weights of this width, float32 alone rounds the two by more than the tolerance.
    pixel_values = torch.randn(1, 3, 32, 32).double()
    with torch.no_grad():
        wanted = peer.double().forward_features(pixel_values)
        torch.testing.assert_close(ours.double()(pixel_values).last_hidden_state, wanted, **TOLERANCE)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def test_pickle_with_another_type_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save({"model": {"weight": torch.zeros(1)}, "args": Trap()}, tmp_path / "trap.pth")
    assert main(["convert", "trap.pth", "out"]) == 2
    message = capsys.readouterr().err
    assert "posix.mkdir" in message and "refused" in message and message.count("\n") == 1
    assert not Path("trapped").exists() and not Path("out").exists()


@pytest.mark.parametrize("hint", [{"heads": 2}, {"decoder_heads": 2}, {"image_size": 64}, {"timm_name": "resnet18"}])
def test_what_the_config_of_a_folder_decides_is_not_taken_from_the_user(hint, tmp_path):
    config = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.ViTModel(transformers.ViTConfig(**config, intermediate_size=16)).save_pretrained(tmp_path / "vit")
    peer = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1)
    (tmp_path / "timm").mkdir()
    save_file(peer.state_dict(), tmp_path / "timm/model.safetensors")
    saved = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "num_classes": 0, "depth": 1}}
    (tmp_path / "timm/config.json").write_text(json.dumps(saved))
    option = "--" + next(iter(hint)).replace("_", "-")
    for name in ("vit", "timm"):
        with pytest.raises(ValueError, match=f"{option} is for files of weights, and here the config.json decides"):
            convert(str(tmp_path / name), tmp_path / "out", **hint)


def test_namespace_is_read(tmp_path):
    peer = fill(timm.models.VisionTransformer(24, 4, embed_dim=32, depth=1, num_heads=4, num_classes=0))
    arguments = argparse.Namespace(norm_pix_loss=True)
    path = save({"model": peer.state_dict(), "args": arguments, "epoch": 3}, tmp_path / "mae.pth")
    lines = convert(str(path), tmp_path / "out", heads=4)
    assert any("not read: args, epoch" in line for line in lines)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": {"weight": torch.zeros(2)}}, "of no kind known here"),
        ({"epoch": 3}, "holds no weights"),
        ({"blocks.0.norm1.weight": torch.zeros(4)}, "lacks patch_embed.proj.weight"),
        ({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(1)}, "config.json is needed"),
    ],
)
def test_unknown_files_give_one_line(content, message, tmp_path, capsys):
    save(content, tmp_path / "some.pth")
    assert main(["convert", str(tmp_path / "some.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_checkpoint_at_all(tmp_path, capsys):
    (tmp_path / "some.pth").write_text("nothing")
    (tmp_path / "some.txt").write_text("nothing")
    for name in ("some.pth", "some.txt", "absent.pth", "absent"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_weights_of_an_unknown_variant_are_refused(tmp_path):
    peer = timm.models.VisionTransformer(24, 4, embed_dim=32, depth=1, num_heads=4, num_classes=0, scale_attn_norm=True)
    path = save(peer.state_dict(), tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="variant that is not known here: blocks.0.attn.norm"):
        convert(str(path), tmp_path / "out", heads=4)


def test_sparse_kernels_of_fcmae_count_places_by_column():
    """As ConvNeXt V2's own `remap_checkpoint_keys` turns them."""
    kernels = {"stages.0.0.dwconv.kernel": torch.randn(49, 5), "downsample_layers.1.1.kernel": torch.randn(4, 3, 5)}
    depthwise, plain = dense_kernels(kernels).values()
    assert depthwise.shape == (5, 1, 7, 7) and plain.shape == (5, 3, 2, 2)
    for row, column in ((0, 0), (1, 4), (6, 2)):
        assert torch.equal(depthwise[:, 0, row, column], kernels["stages.0.0.dwconv.kernel"][7 * column + row])
    assert torch.equal(plain[:, :, 1, 0], kernels["downsample_layers.1.1.kernel"][1].T)


OFFICIAL = sorted((Path(__file__).parent / "fixtures" / "official_keys").glob("*.json"))


def official_weights(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes; large ones without memory, so that models of the real sizes cost nothing."""
    tensors = {}
    for name, shape in keys.items():
        fixed = name.endswith(("token", "pos_embed", "tokens", "positions")) or len(shape) < 2
        dtype = torch.long if name.endswith(("index", "tracked")) else torch.float32
        tensors[name] = torch.zeros(shape, dtype=dtype, device="cpu" if fixed else "meta")
    return tensors


@pytest.mark.parametrize("path", OFFICIAL, ids=[path.stem for path in OFFICIAL])
def test_official_names_and_shapes(path):
    """Every key has its place or is named, every weight of our model is filled, and all shapes fit."""
    fixture = json.loads(path.read_text())
    tensors = official_weights(fixture["keys"])
    if fixture["encoder"].get("position_embedding") == "sincos":
        for name in [name for name in tensors if name.endswith(("pos_embed", "positional_encoder.positions"))]:
            tensors[name][0, -196:] = sincos_2d((14, 14), (14, 14), tensors[name].shape[2])
    found = convert_state(tensors, Hints())
    assert found.kind == fixture["kind"] and found.pretraining == fixture["pretraining"]
    assert found.classifier == fixture.get("classifier", False)
    assert {*found.weights.used, *found.weights.left} == set(fixture["keys"])
    unused = [name for name in fixture["keys"] if any(fnmatch(name, pattern) for pattern in fixture["unused"])]
    indices = [name for name in fixture["keys"] if name.endswith("relative_position_index")]
    assert set(found.weights.left) == {*unused, *indices}
    with torch.device("meta"):
        model = model_class(found)(MIMConfig(**found.fields))
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in own_names(found).items()} == wanted
    options = {"encoder": found.fields["encoder"], **found.fields["encoder_config"]}
    assert {name: options[name] for name in fixture["encoder"]} == fixture["encoder"]
