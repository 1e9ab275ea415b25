"""Pixio: several class tokens, as transformers' `PixioModel` computes them, and units of patches hidden together."""

import numpy as np
import pytest
import torch
import transformers
from helpers import perturb, tiny_config

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.conversion import convert, export
from hf_mim.modeling.layers import sincos_2d
from hf_mim.modeling.masking import MASK_GENERATORS
from hf_mim.training import recipe as recipes
from hf_mim.training.evaluation.frozen import extract_features


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


@pytest.fixture
def pair(tmp_path) -> tuple[transformers.PixioModel, MIMModel]:
    torch.manual_seed(0)
    theirs = perturb(transformers.PixioModel(transformers.PixioConfig(**SIZES, n_cls_tokens=8))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = MIMModel.from_pretrained(tmp_path / "ours")
    assert ours.encoder.num_cls_tokens == 8 and ours.encoder.drops_tokens
    return theirs, ours.eval()


@torch.no_grad()
def test_features_pooling_and_hidden_states(pair, tmp_path):
    theirs, ours = pair
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = theirs(pixel_values, output_hidden_states=True)
    found = ours(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, other, **TOLERANCE)
    class_tokens = extract_features(ours, [pixel_values])["cls"]
    torch.testing.assert_close(class_tokens, expected.pooler_output, **TOLERANCE)
    ours.config.pooler = "cls"
    ours.save_pretrained(tmp_path / "cls")
    pooled = MIMModel.from_pretrained(tmp_path / "cls")(pixel_values).pooler_output
    torch.testing.assert_close(pooled, expected.pooler_output, **TOLERANCE)


@torch.no_grad()
def test_visible_tokens_are_encoded_alone(pair):
    """Theirs, put together by hand: the embeddings of all patches, those of the visible ones through the blocks."""
    theirs, ours = pair
    pixel_values = torch.randn(2, 3, 32, 32)
    mask = MASK_GENERATORS["random"](2, (8, 8), rngs(2), ratio=0.75, unit=4)
    tokens = theirs.embeddings(pixel_values)
    visible = [[*range(8), *(8 + (~row).nonzero().flatten()).tolist()] for row in mask]
    tokens = torch.stack([image[places] for image, places in zip(tokens, visible)])
    for layer in theirs.layers:
        tokens = layer(tokens, None)
    found = ours(pixel_values, mask).last_hidden_state
    assert found.shape == (2, 8 + 16, 32)
    torch.testing.assert_close(found, theirs.layernorm(tokens), **TOLERANCE)


@torch.no_grad()
def test_the_attention_of_several_class_tokens_is_their_mean(pair):
    theirs, ours = pair
    pixel_values = torch.randn(2, 3, 32, 32)
    config = {**ours.config.to_dict(), "pooler": "cls_attention"}
    config = type(ours.config).from_dict({k: v for k, v in config.items() if k not in ("out_features", "out_indices")})
    pooled = MIMModel(config).eval()
    pooled.load_state_dict(ours.state_dict())
    theirs.set_attn_implementation("eager")
    out = theirs(pixel_values, output_attentions=True)
    weights = out.attentions[-1].mean(1)[:, :8, 8:].mean(1)
    weights = weights / weights.sum(1, keepdim=True)
    found = pooled(pixel_values)
    torch.testing.assert_close(found.pooler_weights, weights, **TOLERANCE)
    expected = (weights[:, None] @ out.last_hidden_state[:, 8:])[:, 0]
    torch.testing.assert_close(found.pooler_output, expected, **TOLERANCE)


def timm_names(theirs: transformers.PixioModel) -> dict[str, torch.Tensor]:
    """Its weights under the names of MAE's and timm's programs."""
    state = theirs.state_dict()
    names = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
    weights = {new: state[old] for old, new in names.items()}
    parts = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    for end in ("weight", "bias"):
        weights[f"patch_embed.proj.{end}"] = state[f"embeddings.patch_embeddings.projection.{end}"]
        weights[f"norm.{end}"] = state[f"layernorm.{end}"]
        for i in range(SIZES["num_hidden_layers"]):
            qkv = [state[f"layers.{i}.attention.{part}_proj.{end}"] for part in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
            for old, new in {**parts, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
                weights[f"blocks.{i}.{new}.{end}"] = state[f"layers.{i}.{old}.{end}"]
    return weights


def decoder_names(dim: int, class_tokens: int) -> dict[str, torch.Tensor]:
    """A decoder of one block as MAE's program names it, for patches of 4x4."""
    places = torch.cat([torch.zeros(class_tokens, dim), sincos_2d((8, 8), (8, 8), dim)])
    weights = {"decoder_pos_embed": places[None], "mask_token": torch.randn(1, 1, dim)}
    shapes = {"embed": (dim, 32), "pred": (48, dim), "blocks.0.attn.qkv": (3 * dim, dim)}
    shapes |= {"blocks.0.attn.proj": (dim, dim), "blocks.0.mlp.fc1": (4 * dim, dim), "blocks.0.mlp.fc2": (dim, 4 * dim)}
    shapes |= {"norm": (dim,), "blocks.0.norm1": (dim,), "blocks.0.norm2": (dim,)}
    for name, shape in shapes.items():
        weights |= {f"decoder_{name}.weight": torch.randn(shape), f"decoder_{name}.bias": torch.randn(shape[0])}
    return weights


@torch.no_grad()
def test_a_file_with_the_names_of_mae(pair, tmp_path):
    """How its authors name weights is not known here; these names are the likely ones."""
    theirs, _ = pair
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.save({"model": timm_names(theirs)}, tmp_path / "pixio.pth")
    convert(str(tmp_path / "pixio.pth"), tmp_path / "encoder", heads=4)
    found = MIMModel.from_pretrained(tmp_path / "encoder").eval()(pixel_values).last_hidden_state
    torch.testing.assert_close(found, theirs(pixel_values).last_hidden_state, **TOLERANCE)
    decoder = decoder_names(8, 8)
    torch.save({"model": timm_names(theirs) | decoder}, tmp_path / "whole.pth")
    convert(str(tmp_path / "whole.pth"), tmp_path / "whole", heads=4, decoder_heads=2)
    whole = MIMForPreTraining.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole.mim(pixel_values).last_hidden_state, found, rtol=0, atol=0)
    assert torch.equal(whole.decoder.head.weight, decoder["decoder_pred.weight"])
    assert whole(pixel_values).loss.isfinite()
    torch.save({"model": timm_names(theirs) | decoder_names(8, 1)}, tmp_path / "other.pth")
    lines = convert(str(tmp_path / "other.pth"), tmp_path / "other", heads=4)
    assert any("tokens without a patch" in line and "only the encoder is converted" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {f"trunk.{name}": value for name, value in weights.items()}, "of no kind known here"),
        (lambda weights: {name.replace("cls_token", "cls_tokens"): value for name, value in weights.items()}, "72 pos"),
        (lambda weights: weights | {"blocks.0.attn.gate.weight": torch.ones(2)}, r"blocks\.0\.attn\.gate"),
    ],
)
def test_a_file_with_other_names_is_refused(pair, change, message, tmp_path):
    torch.save({"model": change(timm_names(pair[0]))}, tmp_path / "pixio.pth")
    with pytest.raises(ValueError, match=message) as caught:
        convert(str(tmp_path / "pixio.pth"), tmp_path / "out", heads=4)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_way_back(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "back", to="transformers")
    back = transformers.AutoModel.from_pretrained(tmp_path / "back").eval()
    assert isinstance(back, transformers.PixioModel) and back.config.n_cls_tokens == 8
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        back(pixel_values).last_hidden_state, theirs(pixel_values).last_hidden_state, **TOLERANCE
    )
    torch.testing.assert_close(back(pixel_values).pooler_output, theirs(pixel_values).pooler_output, **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [16, 24]}, "square images"),
        ({"encoder_config": {"intermediate_size": 24}}, "no MLP of width 24"),
        ({"encoder_config": {"num_register_tokens": 1}}, "no register tokens"),
    ],
)
def test_what_pixio_cannot_be(changes, message, tmp_path):
    encoder = {"num_cls_tokens": 3, **changes.pop("encoder_config", {})}
    MIMModel(tiny_config(encoder_config=encoder, **changes)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "ours"), tmp_path / "theirs", to="transformers")


def test_a_native_pixio_knows_its_class_tokens(pair, tmp_path):
    theirs, ours = pair
    native = MIMModel.from_encoder(tmp_path / "theirs", pooler="cls")
    assert (native.encoder.num_cls_tokens, native.encoder.num_prefix_tokens) == (8, 8)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(native(pixel_values).pooler_output, theirs(pixel_values).pooler_output, **TOLERANCE)


def test_units_of_the_recipe():
    """4 of 16 units of 4x4 patches stay, whole."""
    model = recipes.resolve("pixio")["model"]
    masks = MASK_GENERATORS[model["masking"]](3, (16, 16), rngs(3), **model["masking_config"])
    units = masks.view(3, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(units.all(-1), units.any(-1)) and units.all(-1).flatten(1).sum(1).tolist() == [12] * 3
