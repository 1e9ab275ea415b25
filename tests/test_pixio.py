"""Pixio: several class tokens, as transformers' `PixioModel` computes them, and units of patches hidden together."""

import numpy as np
import pytest
import torch
import transformers
from helpers import perturb, tiny_config

from hf_mim import MIMModel
from hf_mim.conversion import convert, export
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
