"""Hiera: features as transformers' model gives them, whole and masked; hidden mask units leak nothing."""

import pytest
import torch
from helpers import perturb
from transformers import HieraConfig, HieraModel

from hf_mim import MIMBackbone, MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.conversion import export


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TINY = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 4]}
SIZE = (64, 96)  # 2x3 mask units of 32 pixels


def theirs(pools: int, **options) -> HieraModel:
    torch.manual_seed(0)
    config = HieraConfig(**TINY, image_size=list(SIZE), num_query_pool=pools, mask_ratio=0.5)
    return perturb(HieraModel(config, add_pooling_layer=False, **options), 0.1).eval()


def fields(pools: int, **changes) -> dict:
    side = 2 ** (3 - pools)
    options = {"encoder_config": {**TINY, "num_query_pool": pools}, "masking_config": {"ratio": 0.5, "unit": side}}
    options |= {"decoder_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    return {"image_size": list(SIZE), "encoder": "hiera", **options, **changes}


def ours(peer: HieraModel, pools: int) -> MIMForPreTraining:
    model = MIMForPreTraining(MIMConfig(**fields(pools))).eval()
    model.mim.encoder.load_native_state(peer.state_dict())
    return model


@pytest.mark.parametrize("pools", [3, 2, 1])
@torch.no_grad()
def test_features_of_whole_images(pools):
    peer = theirs(pools)
    images = torch.randn(2, 3, *SIZE)
    expected = peer(images, output_hidden_states=True).reshaped_hidden_states
    model = ours(peer, pools)
    found = model.mim(images, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected[-1].flatten(1, 2), **TOLERANCE)
    assert found.last_hidden_state.shape[1] == model.mim.encoder.token_grid(*SIZE)[0] * model.mask_grid(*SIZE)[1]
    for state, other in zip(found.hidden_states[1:], expected[1:], strict=True):
        torch.testing.assert_close(state, other.permute(0, 3, 1, 2), **TOLERANCE)


@pytest.mark.parametrize("pools", [3, 2])
@torch.no_grad()
def test_features_of_visible_units(pools):
    """theirs keeps the units of the smallest noise, and returns their tokens unit by unit."""
    peer = theirs(pools, is_mae=True)
    images, noise = torch.randn(2, 3, *SIZE), torch.rand(2, 6)
    expected = peer(images, noise=noise, output_hidden_states=True)
    kept = expected.bool_masked_pos.view(2, 2, 3)
    side = 2 ** (3 - pools)
    mask = ~kept.repeat_interleave(side, 1).repeat_interleave(side, 2)
    found = ours(peer, pools).mim(images, mask.flatten(1)).last_hidden_state
    units = expected.reshaped_hidden_states[-1]
    for i in range(2):
        whole = torch.zeros(2 * side, 3 * side, units.shape[-1])
        for unit, (row, column) in zip(units[i], kept[i].nonzero().tolist(), strict=True):
            whole[row * side : (row + 1) * side, column * side : (column + 1) * side] = unit
        torch.testing.assert_close(found[i], whole[~mask[i]], **TOLERANCE)


@pytest.mark.parametrize("value", [9.0, float("nan")])
@torch.no_grad()
def test_hidden_units_leak_nothing(value):
    model = perturb(MIMForPreTraining(MIMConfig(**fields(2)))).eval()
    images, units = torch.randn(2, 3, *SIZE), torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]])
    units = units.bool().view(2, 2, 3)
    mask = units.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    hidden = units[:, None].repeat_interleave(32, 2).repeat_interleave(32, 3)
    changed = torch.where(hidden, value, images)
    first, second = (model(pixels, mask, return_loss=False).logits for pixels in (images, changed))
    assert torch.equal(first, second) and first.shape == (2, 12, 16 * 16 * 3)


@torch.no_grad()
def test_other_sizes_backbone_and_the_way_back(tmp_path):
    model = perturb(MIMModel(MIMConfig(**fields(3), pooler="mean"))).eval()
    assert model(torch.randn(1, 3, 96, 64)).last_hidden_state.shape == (1, 6, 64)
    backbone = MIMBackbone(MIMConfig(**fields(3), out_features=["stage1", "stage4"])).eval()
    shapes = [tuple(stage.shape) for stage in backbone(torch.randn(1, 3, *SIZE)).feature_maps]
    assert shapes == [(1, 8, 16, 24), (1, 64, 2, 3)]
    model.save_pretrained(tmp_path / "ours")
    export(str(tmp_path / "ours"), tmp_path / "theirs", to="transformers")
    back = HieraModel.from_pretrained(tmp_path / "theirs", add_pooling_layer=False).eval()
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(back(images).last_hidden_state, model(images).last_hidden_state, **TOLERANCE)
    model.config.encoder_config["final_norm"] = True
    MIMModel(model.config).save_pretrained(tmp_path / "normed")
    with pytest.raises(ValueError, match="no norm of its last tokens"):
        export(str(tmp_path / "normed"), tmp_path / "nowhere", to="transformers")


def test_it_trains():
    model = MIMForPreTraining(MIMConfig(**fields(2))).train()
    model(torch.randn(2, 3, *SIZE)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking_config": {"ratio": 0.5}}, "whole mask units, of 2x2"),
        ({"decoder": "unet", "decoder_config": {}}, "needs the feature maps"),
        ({"decoder": "linear", "decoder_config": {}}, "needs every token"),
        ({"encoder_config": {**TINY, "masked_unit_size": [16, 16]}}, "must be \\[8, 8\\]"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MIMForPreTraining(MIMConfig(**fields(2, **changes)))
    model = MIMForPreTraining(MIMConfig(**fields(2)))
    part = torch.zeros(2, 24, dtype=torch.bool)
    part[:, :12:2] = True
    with pytest.raises(ValueError, match="no part of one"):
        model(torch.randn(2, 3, *SIZE), part)


def test_a_part_of_a_unit_is_refused_where_the_mask_cannot_be_looked_at(monkeypatch):
    model = MIMForPreTraining(MIMConfig(**fields(2)))
    part = torch.zeros(2, 24, dtype=torch.bool)
    part[:, :12] = True
    part[0, 11:13] = part[0, 11:13].flip(0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="no part of one"):
        model(torch.randn(2, 3, *SIZE), part)


def test_unequal_masks_are_refused_without_naming_an_option_of_others():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, :2, :2] = mask[1, :2, :4] = True
    with pytest.raises(
        ValueError, match="the same number of hidden ones in every image, .* got .4, 8. hidden of 24"
    ) as caught:
        MIMForPreTraining(MIMConfig(**fields(2)))(torch.randn(2, 3, *SIZE), mask.flatten(1))
    assert "mask_style" not in str(caught.value)


@torch.no_grad()
def test_the_native_encoder_knows_its_grid(tmp_path):
    peer = theirs(2)
    peer.save_pretrained(tmp_path)
    model = MIMModel.from_encoder(str(tmp_path), image_size=list(SIZE))
    assert model.encoder.token_grid(*SIZE) == (4, 6)
    images = torch.randn(1, 3, *SIZE)
    expected = peer(images, output_hidden_states=True).reshaped_hidden_states[-1].flatten(1, 2)
    torch.testing.assert_close(model(images).last_hidden_state, expected, **TOLERANCE)
    with pytest.raises(ValueError, match="or 'hiera'"):
        MIMForPreTraining(model.config)
