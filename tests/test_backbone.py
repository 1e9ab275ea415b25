"""MIMBackbone: the feature maps of every kind of encoder, their choice, and a detector's or segmenter's use of them."""

import pytest
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, perturb, tiny_config
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_mim import MIMBackbone, MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.encoder_native import infer_grid


def timm(name: str, **options) -> dict:
    return {"model_type": "timm", "model_name": name, **options}


# Fields, picture, and the (channels, rows, cols) of every stage, worked out by hand.
STAGES = {
    "vit": ({"encoder_config": {"num_register_tokens": 2}}, (16, 24), [(16, 4, 6)] * 3),
    "vit_without_prefix": (
        {"encoder_config": {"use_cls_token": False, "patch_size": [8, 4]}},
        (16, 24),
        [(16, 2, 6)] * 3,
    ),
    "resnet": (
        {"image_size": 64, "encoder": "convnet", "encoder_config": RESNET},
        (64, 96),
        [(8, 16, 24), (8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)],
    ),
    "convnext": (
        {"image_size": 64, "encoder": "convnet", "encoder_config": CONVNEXT},
        (96, 64),
        [(8, 24, 16), (8, 24, 16), (12, 12, 8), (16, 6, 4), (20, 3, 2)],
    ),
    "timm_resnet18": (
        {"image_size": 64, "encoder": "convnet", "encoder_config": timm("resnet18")},
        (64, 64),
        [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)],
    ),
    "timm_output_stride": (
        {"image_size": 64, "encoder": "convnet", "encoder_config": timm("resnet18", output_stride=16)},
        (64, 64),
        [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 4, 4)],
    ),
    "timm_convnext": (
        {"image_size": 64, "encoder": "convnet", "encoder_config": timm("convnext_atto")},
        (64, 64),
        [(40, 16, 16), (40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)],
    ),
    "native_vit": ({"encoder": "native", "encoder_config": NATIVE_VIT}, (16, 24), [(16, 4, 6)] * 3),
    "native_dinov2": ({"encoder": "native", "encoder_config": DINOV2}, (24, 16), [(16, 6, 4)] * 3),
    "native_swin": (
        {"encoder": "native", "encoder_config": SWIN},
        (16, 24),
        [(8, 4, 6), (16, 2, 3), (16, 2, 3)],  # a stage hands over its merged map
    ),
    "native_resnet": (
        {
            "image_size": 64,
            "encoder": "native",
            "encoder_config": {**RESNET, "embedding_size": 6},
        },
        (64, 64),
        [(6, 16, 16), (8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)],
    ),
}
EVERY = pytest.mark.parametrize("name", STAGES)


def backbone(name: str, **changes) -> MIMBackbone:
    torch.manual_seed(0)
    return AutoBackbone.from_config(tiny_config(**STAGES[name][0], **changes)).eval()


@EVERY
def test_every_stage_has_its_channels_and_size(name):
    _, size, stages = STAGES[name]
    names = tiny_config(**STAGES[name][0]).stage_names
    assert names == ["stem"] + [f"stage{i}" for i in range(1, len(stages))]
    model = backbone(name, out_features=names)
    assert type(model) is MIMBackbone
    assert model.channels == [channels for channels, _, _ in stages]
    maps = model(torch.randn(2, 3, *size)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, *stage) for stage in stages]


@EVERY
def test_stages_can_be_chosen(name):
    _, size, stages = STAGES[name]
    pixel_values = torch.randn(1, 3, *size)
    every = backbone(name, out_indices=list(range(len(stages))))(pixel_values).feature_maps
    last = backbone(name)
    assert last.out_features == [f"stage{len(stages) - 1}"]
    assert torch.equal(last(pixel_values).feature_maps[0], every[-1])
    two = backbone(name, out_features=["stem", "stage1"])
    assert two.config.out_indices == [0, 1] and two.channels == [stages[0][0], stages[1][0]]
    assert all(torch.equal(a, b) for a, b in zip(two(pixel_values).feature_maps, every[:2], strict=True))
    by_index = backbone(name, out_indices=[1, -1])
    assert by_index.channels == [stages[1][0], stages[-1][0]]
    chosen = by_index(pixel_values, return_dict=False)[0]
    assert torch.equal(chosen[0], every[1]) and torch.equal(chosen[1], every[-1])


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match=r"\['stem', 'stage1', 'stage2'\].*stage9"):
        tiny_config(out_features=["stage9"])


def test_maps_are_the_patch_tokens_after_the_final_norm():
    model = perturb(backbone("vit", out_features=["stem", "stage1", "stage2"]))
    pixel_values = torch.randn(2, 3, 16, 24)
    maps = model(pixel_values).feature_maps
    out = model.mim(pixel_values, output_hidden_states=True)
    norm = model.mim.encoder.final_norm
    for stage, state in zip(maps, out.hidden_states):
        centred = state[:, 3:] - state[:, 3:].mean(-1, keepdim=True)
        tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
        for row in range(4):
            for col in range(6):
                assert torch.allclose(stage[:, :, row, col], tokens[:, row * 6 + col], atol=1e-5)
    assert torch.allclose(maps[-1].flatten(2).transpose(1, 2), out.last_hidden_state[:, 3:], atol=1e-6)


@pytest.mark.parametrize("name", ["native_vit", "native_dinov2"])
def test_last_native_map_is_its_last_hidden_state(name):
    model = backbone(name)
    _, size, (*_, (_, rows, cols)) = STAGES[name]
    pixel_values = torch.randn(1, 3, *size)
    wanted = model.mim(pixel_values).last_hidden_state[:, 1:]
    got = model(pixel_values).feature_maps[0]
    assert got.shape[2:] == (rows, cols)
    assert torch.allclose(got.flatten(2).transpose(1, 2), wanted, atol=1e-6)


def test_a_native_model_with_other_stages_is_refused():
    options = {"model_type": "segformer", "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4}
    model = MIMBackbone(tiny_config(image_size=64, encoder="native", encoder_config=options)).eval()
    with pytest.raises(
        ValueError, match=r"'segformer' cannot be a backbone .* \[8, 8, 8, 8, 8\] channels and have \[8"
    ):
        model(torch.randn(1, 3, 64, 64))


def test_hidden_states_and_attentions_on_request():
    model, pixel_values = backbone("vit"), torch.randn(1, 3, 16, 16)
    out = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and out.attentions[0].shape == (1, 2, 19, 19)
    assert model(pixel_values).hidden_states is None


# --- pictures of any size ----------------------------------------------------------------------------------------


def test_the_grid_of_any_picture():
    """Cut off at the border (ViT), or padded and merged again and again (Swin)."""
    for height in range(16, 120, 3):
        for width in range(16, 120, 7):
            rows, cols = height // 4, width // 4
            assert infer_grid(rows * cols, height, width) == (rows, cols)
            rows, cols = -(-height // 4), -(-width // 4)
            while min(rows, cols) > 1:
                assert infer_grid(rows * cols, height, width) == (rows, cols)
                rows, cols = -(-rows // 2), -(-cols // 2)


@pytest.mark.parametrize("size", [(20, 17), (41, 19), (32, 22), (17, 40)])
def test_native_backbones_take_any_picture(size):
    pixel_values = torch.randn(1, 3, *size)
    vit, swin = (backbone(name)(pixel_values).feature_maps[0] for name in ("native_vit", "native_swin"))
    assert vit.shape[1:] == (16, size[0] // 4, size[1] // 4)
    assert swin.shape[1:] == (16, -(-size[0] // 8), -(-size[1] // 8))


def test_convnets_take_any_picture():
    maps = backbone("resnet", out_features=["stem", "stage4"])(torch.randn(1, 3, 70, 101)).feature_maps
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 18, 26), (20, 3, 4)]


# --- maps of several strides from an encoder of one ---------------------------------------------------------------

PYRAMID = {
    "encoder_config": {"num_hidden_layers": 4},
    "image_size": 32,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "feature_pyramid": [4, 2, 1, 0.5],
}


def doubled(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A transposed 2x2 convolution of stride 2, position by position."""
    batch, _, rows, cols = maps.shape
    out = torch.empty(batch, weight.shape[1], 2 * rows, 2 * cols, dtype=maps.dtype)
    for row in range(2 * rows):
        for col in range(2 * cols):
            out[:, :, row, col] = maps[:, :, row // 2, col // 2] @ weight[:, :, row % 2, col % 2] + bias
    return out


def test_the_pyramid_scales_every_map_by_its_factor():
    torch.manual_seed(0)
    model = perturb(MIMBackbone(tiny_config(**PYRAMID))).double().eval()
    plain = MIMBackbone(tiny_config(**{**PYRAMID, "feature_pyramid": None})).double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pyramid")})
    pixel_values = torch.randn(1, 3, 12, 20).double()  # 3 x 5 patches
    maps = plain(pixel_values).feature_maps
    p = dict(model.pyramid.named_parameters())
    inner = doubled(maps[0], p["0.0.weight"], p["0.0.bias"])
    centred = inner - inner.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    normed = normed * p["0.1.weight"][:, None, None] + p["0.1.bias"][:, None, None]
    gelu = normed * (1 + torch.erf(normed / 2**0.5)) / 2
    wanted = [doubled(gelu, p["0.3.weight"], p["0.3.bias"]), doubled(maps[1], p["1.0.weight"], p["1.0.bias"]), maps[2]]
    coarse = torch.stack([maps[3][:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], -1)
    wanted.append(coarse.unflatten(-1, (2, 3)))
    for found, expected in zip(model(pixel_values).feature_maps, wanted, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-10)


def test_a_pyramid_over_a_pretrained_encoder_is_initialised(tmp_path):
    torch.manual_seed(0)
    plain = {key: PYRAMID[key] for key in ("encoder_config", "image_size")}
    saved = perturb(MIMForPreTraining(tiny_config(**plain)))
    saved.save_pretrained(tmp_path)
    wanted = {key: PYRAMID[key] for key in ("out_features", "feature_pyramid")}
    model, info = MIMBackbone.from_pretrained(tmp_path, **wanted, output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("pyramid.") for key in info["missing_keys"])
    state, own = model.state_dict(), saved.mim.encoder.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.mim.encoder.state_dict().items())
    assert (state["pyramid.0.1.weight"] == 1).all() and (state["pyramid.0.1.bias"] == 0).all()
    for name in ("0.0", "0.3", "1.0"):
        assert abs(state[f"pyramid.{name}.weight"].std() - 0.02) < 0.003 and (state[f"pyramid.{name}.bias"] == 0).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"feature_pyramid": [2, 1]}, "has 2 factors for 4 stages: stage1, stage2, stage3, stage4"),
        ({"feature_pyramid": [3, 2, 1, 1]}, "powers of two like 4 or 0.5, not 3"),
        ({"feature_pyramid": [4, 2, 1, 0]}, "not 0"),
        ({"encoder": "convnet", "encoder_config": RESNET}, "stages of this one have several"),
    ],
)
def test_a_pyramid_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MIMBackbone(tiny_config(**{**PYRAMID, **fields}))


@pytest.mark.parametrize("name", ["vit", "vit_without_prefix"])
def test_the_pyramid_takes_bf16_and_a_batch_of_one(name):
    fields = {**STAGES[name][0], **{k: v for k, v in PYRAMID.items() if k != "encoder_config"}}
    fields["encoder_config"] = {**fields["encoder_config"], "num_hidden_layers": 4}
    model = MIMBackbone(tiny_config(**fields, num_channels=1)).bfloat16().train()
    maps = model(torch.randn(1, 1, 16, 24)).feature_maps
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in maps)
    assert maps[0].shape[2:] == (4 * maps[2].shape[2], 4 * maps[2].shape[3])


# --- checkpoints and users ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MIMForPreTraining, MIMModel, MIMForImageClassification])
@pytest.mark.parametrize("name", ["vit", "resnet", "native_swin"])
def test_it_loads_from_any_checkpoint(name, model_class, tmp_path):
    fields, size, stages = STAGES[name]
    torch.manual_seed(0)
    decoder = {"decoder": "linear", "decoder_config": {}} if name != "vit" else {}
    model = perturb(model_class(tiny_config(**fields, **decoder)), 0.05).eval()
    model.save_pretrained(tmp_path)
    loaded, info = MIMBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2"], output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert loaded.channels == [stages[0][0], stages[2][0]]
    encoder = model.encoder if model_class is MIMModel else model.mim.encoder
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in loaded.mim.encoder.state_dict().items())
    assert not any("mask_" in key for key in loaded.state_dict())
    loaded(torch.randn(1, 3, *size))
    loaded.save_pretrained(tmp_path / "again")
    again = MIMBackbone.from_pretrained(tmp_path / "again")
    pixel_values = torch.randn(1, 3, *size)
    assert again.out_features == ["stem", "stage2"]
    for a, b in zip(again(pixel_values).feature_maps, loaded(pixel_values).feature_maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["vit", "timm_resnet18", "native_swin"])
def test_inside_upernet(name, tmp_path):
    torch.manual_seed(0)
    fields, size, stages = STAGES[name]
    config = UperNetConfig(
        backbone_config=tiny_config(**fields, out_features=["stem", "stage1", "stage2"]),
        hidden_size=8,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config)
    assert type(model.backbone) is MIMBackbone
    assert model.decode_head.in_channels == [channels for channels, _, _ in stages[:3]]
    pixel_values, labels = torch.randn(2, 3, *size), torch.randint(3, (2, *size))
    out = model(pixel_values, labels=labels)
    assert out.logits.shape == (2, 3, *size)
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert again.config.backbone_config.out_features == ["stem", "stage1", "stage2"]
    with torch.no_grad():
        pairs = zip(again.backbone(pixel_values).feature_maps, model.backbone(pixel_values).feature_maps, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        # UperNet's own convolutions round differently where the loaded weights lie elsewhere in memory: also with
        # transformers' own backbones.
        assert torch.allclose(again(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-8)


SMALL = {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 4, "num_labels": 3}


def mask2former(backbone_config):
    """-> the model, its labels for two images, and the names of its outputs."""
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "train_num_points": 16}
    feedforward = {"encoder_feedforward_dim": 16, "dim_feedforward": 16}
    config = Mask2FormerConfig(backbone_config=backbone_config, **SMALL, **widths, **feedforward)
    shapes = [torch.zeros(2, 64, 96) for _ in range(2)]
    for shape in shapes:
        shape[0, :30], shape[1, 30:] = 1, 1
    labels = {"mask_labels": shapes, "class_labels": [torch.tensor([0, 2])] * 2}
    return Mask2FormerForUniversalSegmentation(config), labels, ("masks_queries_logits", "class_queries_logits")


def detr(backbone_config):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small = {key: value for key, value in SMALL.items() if key != "num_attention_heads"}
    config = DetrConfig(backbone_config=backbone_config, use_timm_backbone=False, d_model=16, **small, **heads)
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.3, 0.3, 0.2, 0.2]])
    labels = {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": boxes}] * 2}
    return DetrForObjectDetection(config), labels, ("logits", "pred_boxes")


@pytest.mark.parametrize("make", [mask2former, detr])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_inside_mask2former_and_detr(name, make, tmp_path):
    torch.manual_seed(0)
    fields = {**PYRAMID, "image_size": 64, "encoder_config": {"num_hidden_layers": 4, "patch_size": 16}}
    if name == "resnet":
        fields = {**STAGES["resnet"][0], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if make is detr:  # it reads the last map only
        fields = {**fields, "out_features": ["stage4"]}
        fields.pop("feature_pyramid", None)
    model, labels, outputs = make(tiny_config(**fields))
    (backbone,) = (module for module in model.modules() if isinstance(module, MIMBackbone))
    pixel_values = torch.randn(2, 3, 64, 96)
    loss = model(pixel_values, **labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
    torch.optim.SGD(model.parameters(), 1e-3).step()
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        found, before = again(pixel_values), model(pixel_values)
    for key in outputs:  # their convolutions round by where the weights lie in memory
        assert torch.allclose(found[key], before[key], rtol=1e-4, atol=1e-6)
