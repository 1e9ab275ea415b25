"""The ViT encoder: what hiding means, positions at other resolutions, attention implementations."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel
from hf_mim.modeling.encoder_base import fill_hidden_pixels
from hf_mim.modeling.encoder_vit import POSITIONS, SIZES
from hf_mim.modeling.layers import (
    MLP,
    LearnedPositions,
    RelativePositionBias,
    rotary_2d,
    rotate,
    sincos_2d,
)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}


def vit(image_size=24, num_channels=3, use_mask_token=False, attn="sdpa", **options) -> MIMModel:
    torch.manual_seed(0)
    config = MIMConfig(image_size=image_size, num_channels=num_channels, encoder_config={**SMALL, **options})
    config._attn_implementation = attn
    model = MIMModel(config, use_mask_token=use_mask_token)
    with torch.no_grad():  # tables and tokens that start at zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def masks_of(batch: int, tokens: int, hidden: int) -> torch.Tensor:
    order = torch.rand(batch, tokens).argsort(dim=1)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, order[:, :hidden], True)


# --- hiding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_dropping_equals_encoding_the_visible_patches_alone(position):
    """Independent way: with rel. bias or rotary, positions are those of the whole picture, so what is dropped must not
    matter, and what stays must be as if attention to hidden tokens were switched off in a full pass."""
    model = vit(position_embedding=position, num_register_tokens=2)
    pixel_values, mask = torch.randn(2, 3, 24, 16), masks_of(2, 24, 15)
    with torch.no_grad():
        out = model(pixel_values, mask)
        noise = torch.randn_like(pixel_values)
        hidden = mask.view(2, 1, 6, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        changed = model(torch.where(hidden, noise, pixel_values), mask)
        full = full_pass_without_hidden(model, pixel_values, mask)
    assert out.last_hidden_state.shape == (2, 3 + 9, 32)
    assert torch.equal(out.last_hidden_state, changed.last_hidden_state)
    for b in range(2):
        assert out.visible_index[b].tolist() == (~mask[b]).nonzero().flatten().tolist()
        wanted = torch.cat([full[b, :3], full[b, 3:][~mask[b]]])
        torch.testing.assert_close(out.last_hidden_state[b], wanted, rtol=1e-5, atol=1e-5)


def full_pass_without_hidden(model, pixel_values, mask):
    """All tokens through the blocks, the hidden ones switched off as keys by an infinite bias."""
    encoder = model.encoder
    grid = encoder.mask_grid(*pixel_values.shape[2:])
    tokens, _, _ = encoder._embed(pixel_values, None, grid)
    shared, rotary = encoder._attention_positions(grid, None, tokens.device)
    off = torch.zeros(mask.shape).masked_fill(mask, -math.inf)
    off = F.pad(off, (encoder.num_prefix_tokens, 0))[:, None, None].expand(-1, 4, tokens.shape[1], -1)
    for i, layer in enumerate(encoder.layers):
        bias = 0 if shared is None else shared
        if len(encoder.relative):
            bias = bias + encoder.relative[i](grid, encoder.num_prefix_tokens)
        tokens, _ = layer(tokens, off + bias, rotary)
    return encoder.final_norm(tokens)


@pytest.mark.parametrize("stage", [0, 2])
def test_token_style_hides_what_is_under_the_mask(stage):
    model = vit(mask_style="token", use_mask_token=True, mask_stage=stage)
    pixel_values, mask = torch.randn(2, 3, 24, 24), masks_of(2, 36, 20)
    mask[1, :5] = False  # counts need not be equal
    hidden = mask.view(2, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        out = model(pixel_values, mask).last_hidden_state
        changed = model(torch.where(hidden, torch.randn_like(pixel_values), pixel_values), mask).last_hidden_state
    assert torch.equal(out, changed) == (stage == 0)  # later stages have already mixed the patches
    assert out.shape == (2, 37, 32)


def test_add_style_adds_the_token_before_its_stage():
    model = vit(mask_style="add", use_mask_token=True, mask_stage=1)
    pixel_values, mask = torch.randn(2, 3, 24, 24), masks_of(2, 36, 20)
    encoder = model.encoder
    with torch.no_grad():
        tokens, _, _ = encoder._embed(pixel_values, None, (6, 6))
        tokens, _ = encoder.layers[0](tokens)
        tokens[:, 1:] += mask[..., None] * encoder.mask_token
        for layer in encoder.layers[1:]:
            tokens, _ = layer(tokens)
        torch.testing.assert_close(model(pixel_values, mask).last_hidden_state, encoder.final_norm(tokens))


@pytest.mark.parametrize("fill", ["none", "zero", "mean"])
def test_pixel_fill_against_a_loop(fill):
    pixel_values, mask = torch.randn(2, 3, 8, 12), masks_of(2, 6, 4)
    filled = fill_hidden_pixels(pixel_values, mask, (2, 3), fill)
    for b in range(2):
        for c in range(3):
            colour = {"none": None, "zero": 0.0, "mean": pixel_values[b, c].double().mean().item()}[fill]
            for y in range(8):
                for x in range(12):
                    is_hidden = mask[b, (y // 4) * 3 + x // 4] and fill != "none"
                    wanted = colour if is_hidden else pixel_values[b, c, y, x].item()
                    assert filled[b, c, y, x].item() == pytest.approx(wanted, abs=1e-6)


def test_several_masks_of_an_image_are_as_many_images():
    torch.manual_seed(0)
    model = MIMForPreTraining(MIMConfig(image_size=24, encoder_config=SMALL, decoder_config={"num_hidden_layers": 1}))
    pixel_values, masks = torch.randn(2, 3, 24, 24), torch.stack([masks_of(3, 36, 27) for _ in range(2)])
    together = model(pixel_values, masks)
    apart = model(pixel_values.repeat_interleave(3, 0), masks.flatten(0, 1))
    torch.testing.assert_close(together.loss, apart.loss)
    torch.testing.assert_close(together.logits, apart.logits)


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "base"), [((6, 6), (6, 6)), ((4, 9), (6, 5)), ((14, 10), (7, 7)), ((3, 2), (6, 4))])
def test_sincos_against_float64(grid, base):
    """MAE's layout: sine and cosine of the column, then of the row; other grids cover the same picture."""
    table = sincos_2d(grid, base, 16)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) * base[0] / grid[0] - 0.5, (j + 0.5) * base[1] / grid[1] - 0.5
            waves = [
                wave(axis / 10000 ** (k / 4)) for axis in (x, y) for wave in (math.sin, math.cos) for k in range(4)
            ]
            wanted = torch.tensor(waves, dtype=torch.float64)
            torch.testing.assert_close(table[i * grid[1] + j].double(), wanted, rtol=0, atol=2e-6)


def test_learned_positions_are_resized_in_two_dimensions():
    """Against an independent resampler: Pillow's bicubic (antialiased when it shrinks) on float images."""
    import numpy as np
    from PIL import Image

    positions = LearnedPositions((6, 4), 5)
    with torch.no_grad():
        positions.table.normal_()
    assert torch.equal(positions((6, 4))[0], positions.table)
    for grid in ((12, 8), (9, 4), (3, 7)):
        resized = positions(grid)[0].detach().view(*grid, 5)
        for channel in range(5):
            image = Image.fromarray(positions.table.detach().view(6, 4, 5)[..., channel].numpy().astype(np.float32))
            wanted = np.asarray(image.resize((grid[1], grid[0]), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(resized[..., channel].numpy(), wanted, rtol=0, atol=1e-5)


def test_relative_bias_against_a_loop():
    bias_of = RelativePositionBias((3, 4), num_heads=2)
    with torch.no_grad():
        bias_of.table.normal_()
        bias_of.prefix.normal_()
    bias = bias_of((3, 4), num_prefix=2)
    table = bias_of.table.view(5, 7, 2)
    places = [(i, j) for i in range(3) for j in range(4)]
    for a, (y, x) in enumerate(places):
        assert torch.equal(bias[0, :, 0, 2 + a], bias_of.prefix[0])
        assert torch.equal(bias[0, :, 2 + a, 1], bias_of.prefix[1])
        for b, (v, u) in enumerate(places):
            assert torch.equal(bias[0, :, 2 + a, 2 + b], table[y - v + 2, x - u + 3])
    assert torch.equal(bias[0, :, 0, 1], bias_of.prefix[2])
    visible = torch.tensor([[0, 5, 7], [2, 3, 11]])
    some = bias_of((3, 4), 2, visible)
    keep = torch.tensor([0, 1, 2, 7, 9])
    assert torch.equal(some[0], bias[0][:, keep][:, :, keep])
    assert bias_of((6, 5), 2).shape == (1, 2, 32, 32)


def test_rotary_depends_on_offsets_only_and_leaves_the_prefix():
    cos, sin = rotary_2d((5, 6), (5, 6), 16)
    query, key = torch.randn(16), torch.randn(16)

    def logit(a, b):
        rotated = (
            rotate(vector.view(1, 1, 1, 16), (cos[i][None], sin[i][None])) for vector, i in ((query, a), (key, b))
        )
        return torch.dot(*(vector.flatten() for vector in rotated))

    place = lambda row, col: row * 6 + col  # noqa: E731
    moved = [logit(place(r, c), place(r + 2, c + 1)) for r, c in ((0, 0), (1, 3), (2, 4))]
    torch.testing.assert_close(torch.stack(moved), moved[0].expand(3), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(logit(place(0, 0), place(2, 1)), logit(place(0, 0), place(1, 2)))
    tokens = torch.randn(2, 1, 33, 16)
    assert torch.equal(rotate(tokens, (cos, sin))[:, :, :3], tokens[:, :, :3])
    # a rotation: norms stay, and place (row, col) turns the first pair of channels by the row
    torch.testing.assert_close(rotate(tokens, (cos, sin)).norm(dim=-1), tokens.norm(dim=-1))
    assert cos[place(3, 0), 0].item() == pytest.approx(math.cos(3.0), abs=1e-6)
    assert cos[place(0, 3), 4].item() == pytest.approx(math.cos(3.0), abs=1e-6)


def test_swiglu_against_float64():
    mlp = MLP(6, 10, "swiglu")
    tokens = torch.randn(3, 6)
    gate, value = (tokens.double() @ mlp.fc1.weight.double().T + mlp.fc1.bias.double()).split(10, dim=1)
    hidden = gate / (1 + (-gate).exp()) * value
    wanted = hidden @ mlp.fc2.weight.double().T + mlp.fc2.bias.double()
    torch.testing.assert_close(mlp(tokens).double(), wanted, rtol=1e-5, atol=1e-6)


# --- any shape, any implementation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [*POSITIONS, ["relative", "shared_relative", "learned"]])
@pytest.mark.parametrize(("size", "patch", "channels"), [((24, 40), 4, 1), ((24, 40), (4, 8), 13)])
def test_any_shape_and_other_resolutions(position, size, patch, channels):
    model = vit(size, channels, position_embedding=position, patch_size=patch, mlp="swiglu", qk_norm=True)
    down, right = (patch, patch) if isinstance(patch, int) else patch
    for height, width in (size, (8, 16), (48, 24)):
        out = model(torch.randn(1, channels, height, width))
        assert out.last_hidden_state.shape == (1, 1 + (height // down) * (width // right), 32)
        assert out.last_hidden_state.isfinite().all()
        assert out.pooler_output.shape == (1, 32)


@pytest.mark.parametrize("position", ["sincos", "relative", "rotary"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_implementations_agree(position, masked):
    pixel_values = torch.randn(2, 3, 24, 24)
    mask = masks_of(2, 36, 20) if masked else None
    outs = []
    for attn in ("eager", "sdpa", "flex_attention"):
        model = vit(position_embedding=position, attn=attn)
        with torch.no_grad():
            outs.append(model(pixel_values, mask).last_hidden_state)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)


def test_attention_can_be_switched_and_returned():
    model = vit()
    pixel_values = torch.randn(2, 3, 24, 24)
    assert model.config._attn_implementation == "sdpa"
    out = model(pixel_values, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and len(out.hidden_states) == 4
    assert out.attentions[0].shape == (2, 4, 37, 37)
    torch.testing.assert_close(torch.stack(out.attentions).sum(-1), torch.ones(3, 2, 4, 37))
    torch.testing.assert_close(model.encoder.final_norm(out.hidden_states[-1]), out.last_hidden_state)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(pixel_values).last_hidden_state, out.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_flash_attention_refuses_a_bias():
    model = vit(position_embedding="relative")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="relative position bias"):
        model(torch.randn(1, 3, 24, 24))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_numbers_of_parameters(size):
    """In millions, without a classifier: DeiT, ViT and MAE papers."""
    with torch.device("meta"):
        model = MIMModel(MIMConfig(encoder_config={"size": size}), add_pooling_layer=False)
    published = {"tiny": 5.5, "small": 21.7, "base": 85.8, "large": 303.3, "huge": 630.8}
    positions = {"tiny": 0.04, "small": 0.08, "base": 0.15, "large": 0.2, "huge": 0.33}  # fixed here, counted there
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(published[size] - positions[size], abs=0.15)


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    model = vit(drop_path_rate=0.5)
    assert [layer.drop_path.rate for layer in model.encoder.layers] == [0.0, 0.25, 0.5]
    drop = model.encoder.layers[2].drop_path.train()
    dropped = drop(torch.ones(4000, 2, 3))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    assert (dropped.flatten(1).std(dim=1) == 0).all()  # whole images


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mlp_computes_its_gelu_again_and_has_the_gradients_of_the_plain_form(dtype):
    torch.manual_seed(0)
    mlp = MLP(6, 12).to(dtype if dtype != torch.bfloat16 else torch.float32).train()
    tokens = torch.randn(2, 5, 6, dtype=mlp.fc1.weight.dtype, requires_grad=True)
    wanted = torch.randn(2, 5, 6, dtype=tokens.dtype)
    grads = []
    for plain in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = mlp.fc2(F.gelu(mlp.fc1(tokens))) if plain else mlp(tokens)
        grads.append(torch.autograd.grad((out * wanted).sum(), [tokens, *mlp.parameters()]))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(mlp, tokens)


def test_the_mlp_keeps_one_wide_tensor_for_its_backward_pass():
    mlp, tokens, kept = MLP(6, 12).train(), torch.randn(2, 5, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        mlp(tokens)
    assert kept.count(2 * 5 * 12) == 1 and kept.count(2 * 5 * 6) == 1
