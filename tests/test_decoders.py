"""Every decoder on every encoder it fits: shapes, order, scope; the numbers against independent computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DECODER_OPTIONS, NATIVE_VIT, RESNET, SWIN, perturb, random_masks, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.decoders import DECODERS
from hf_mim.modeling.encoder_base import EncoderOutput
from hf_mim.modeling.layers import PixelShuffleLinear
from hf_mim.modeling.options import options_of
from hf_mim.modeling.parts import make_encoder


OUT_DIM = 5
ENCODINGS = {
    "drop": {"image_size": [16, 24], "encoder_config": {"num_register_tokens": 1}},
    "drop_without_prefix": {"image_size": [16, 24], "encoder_config": {"use_cls_token": False}},
    "token": {"image_size": [24, 16], "encoder_config": {"mask_style": "token"}},
    "add": {"image_size": 16, "encoder_config": {"mask_style": "add", "mask_stage": 1}},
    "resnet": {"image_size": [64, 96], "encoder": "convnet", "encoder_config": RESNET},
    "resnet_stage_1": {"image_size": 32, "encoder": "convnet", "encoder_config": {**RESNET, "mask_stage": 1}},
    "resnet_sparse": {
        "image_size": [64, 96],
        "encoder": "convnet",
        "encoder_config": {**RESNET, "mask_style": "sparse"},
    },
    "native_vit": {"image_size": 16, "encoder": "native", "encoder_config": NATIVE_VIT},
    "native_swin": {"image_size": 16, "encoder": "native", "encoder_config": SWIN},
}


def build(decoder: str, encoding: str, dim: int | None = None, **options):
    """-> config, encoder, decoder with noise on every parameter."""
    torch.manual_seed(0)
    choices = options_of(DECODERS[decoder])
    options = {**{name: value for name, value in DECODER_OPTIONS.items() if name in choices}, **options}
    config = tiny_config(**ENCODINGS[encoding], decoder=decoder, decoder_config=options)
    encoder = perturb(make_encoder(config, True), 0.05).eval()
    return config, encoder, perturb(DECODERS[decoder](config, encoder, dim or out_dim(decoder), **options)).eval()


def out_dim(decoder: str) -> int:
    """What the target asks for: where the decoder makes pixels, those of a 32-pixel cell."""
    return 32 * 32 * 3 if decoder == "spark" else OUT_DIM


def fits(decoder: str, encoding: str) -> bool:
    try:
        build(decoder, encoding)
    except ValueError:
        return False
    return True


EVERY = pytest.mark.parametrize("decoder, encoding", [(d, e) for d in DECODERS for e in ENCODINGS if fits(d, e)])


def encode(config, encoder, batch: int = 3):
    """-> encoded random images, mask, mask grid."""
    size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
    rows, cols = encoder.mask_grid(*size)
    mask = random_masks(batch, rows * cols, rows * cols // 2 + 1)
    return encoder(torch.randn(batch, 3, *size), mask), mask, (rows, cols)


# --- every decoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_fits_some_encoder(decoder):
    assert any(fits(decoder, encoding) for encoding in ENCODINGS)


@EVERY
def test_shapes_and_scope(decoder, encoding):
    config, encoder, module = build(decoder, encoding)
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        everything = module(encoded, mask, grid, "all")
        hidden = module(encoded, mask, grid, "hidden")
    tokens, count = grid[0] * grid[1], int(mask[0].sum())
    assert everything.shape == (3, tokens, out_dim(decoder))
    assert hidden.shape in ((3, tokens, out_dim(decoder)), (3, count, out_dim(decoder)))
    if hidden.shape[1] == count:
        assert torch.allclose(hidden, everything[mask].view(3, count, out_dim(decoder)), atol=1e-5)
    else:
        assert torch.equal(hidden, everything)
    assert everything.std(dim=1).min() > 1e-4  # tokens differ


@EVERY
def test_every_parameter_is_used(decoder, encoding):
    config, encoder, module = build(decoder, encoding)
    encoded, mask, grid = encode(config, encoder)
    module(encoded, mask, grid, "hidden").square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@EVERY
def test_images_are_decoded_by_themselves(decoder, encoding):
    config, encoder, module = build(decoder, encoding)
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        together = module(encoded, mask, grid, "all")
        parts = {name: value for name, value in vars(encoded).items() if value is not None}
        for i in range(3):
            one = {
                name: tuple(v[i : i + 1] for v in value) if isinstance(value, tuple) else value[i : i + 1]
                for name, value in parts.items()
            }
            assert torch.allclose(module(EncoderOutput(**one), mask[i : i + 1], grid, "all")[0], together[i], atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoding, size", [("drop", (24, 32)), ("token", (8, 12)), ("resnet", (96, 64))])
def test_other_resolutions(decoder, encoding, size):
    if not fits(decoder, encoding):
        pytest.skip("does not fit this encoder")
    _, encoder, module = build(decoder, encoding)
    rows, cols = encoder.mask_grid(*size)
    mask = random_masks(2, rows * cols, rows * cols // 2)
    with torch.no_grad():
        encoded = encoder(torch.randn(2, 3, *size), mask)
        assert module(encoded, mask, (rows, cols), "all").shape == (2, rows * cols, OUT_DIM)


# --- PixelShuffleLinear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (4, 4), (2, 3), (1, 2)])
def test_to_grid_is_a_1x1_convolution_and_a_pixel_shuffle(factor):
    torch.manual_seed(0)
    (down, right), coarse, out_dim = factor, (3, 2), 5
    module = PixelShuffleLinear(7, out_dim, factor)
    tokens = torch.randn(2, 6, 7)
    got = module(tokens, (coarse[0] * down, coarse[1] * right))
    assert got.shape == (2, 6 * down * right, out_dim)
    image = tokens.transpose(1, 2).view(2, 7, *coarse)
    weight = module.linear.weight.view(down, right, out_dim, 7)
    bias = module.linear.bias.view(down, right, out_dim)
    if down == right:
        # Pixel shuffle wants its output channels as (channel, down, right); ours are (down, right, channel).
        conv_weight = weight.permute(2, 0, 1, 3).reshape(-1, 7, 1, 1)
        shuffled = F.pixel_shuffle(F.conv2d(image, conv_weight, bias.permute(2, 0, 1).flatten()), down)
        assert torch.allclose(got, shuffled.flatten(2).transpose(1, 2), atol=1e-5)
    for row in range(coarse[0] * down):
        for col in range(coarse[1] * right):
            cell = image[:, :, row // down, col // right]
            wanted = cell @ weight[row % down, col % right].T + bias[row % down, col % right]
            assert torch.allclose(got[:, row * coarse[1] * right + col], wanted, atol=1e-5)


# --- the transformer decoders in float64 -------------------------------------------------------------------------


def linear(module, x):
    return x @ module.weight.double().T + module.bias.double()


def norm(module, x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if module is None else x * module.weight.double() + module.bias.double()


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(query, key, value, heads):
    """(length, dim) each, one image, one head after the other."""
    size = query.shape[1] // heads
    parts = []
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        logits = query[:, cut] @ key[:, cut].T / math.sqrt(size)
        parts.append(logits.softmax(-1) @ value[:, cut])
    return torch.cat(parts, dim=1)


def positions(grid, dim):
    """Sine and cosine of the column, then of the row, entry by entry."""
    table = torch.zeros(grid[0] * grid[1], dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(grid[0]):
        for col in range(grid[1]):
            for i in range(quarter):
                frequency = 10000 ** (-i / quarter)
                values = [math.sin(col * frequency), math.cos(col * frequency)]
                values += [math.sin(row * frequency), math.cos(row * frequency)]
                for part, value in enumerate(values):
                    table[row * grid[1] + col, part * quarter + i] = value
    return table


def mlp(layer, x):
    return x + linear(layer.mlp.fc2, gelu(linear(layer.mlp.fc1, norm(layer.norm2, x))))


def unshuffled(module, encoded, mask, grid, image, embed):
    """One image's tokens in raster order: embedded where visible, the mask token where hidden; and the prefix."""
    prefix = module.num_prefix_tokens
    tokens = embed(encoded.tokens[image].double())
    places = tokens[prefix:]
    full = torch.empty(grid[0] * grid[1], places.shape[1], dtype=torch.float64)
    seen = 0
    for place in range(len(full)):
        if mask[image, place]:
            full[place] = module.mask_token.double()
        else:
            full[place] = places[seen]
            seen += 1
    assert seen == len(places)
    return tokens[:prefix], full


@pytest.mark.parametrize("encoding", ["drop", "drop_without_prefix"])
@pytest.mark.parametrize("layers", [1, 3])
def test_transformer_under_drop_against_float64(encoding, layers):
    config, encoder, module = build("transformer", encoding, num_hidden_layers=layers)
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        got = {scope: module(encoded, mask, grid, scope) for scope in ("all", "hidden")}
        for image in range(3):
            prefix, full = unshuffled(module, encoded, mask, grid, image, lambda x: linear(module.embed.linear, x))
            x = torch.cat([prefix, full + positions(grid, 16)])
            for layer in module.layers:
                query, key, value = linear(layer.attention.qkv, norm(layer.norm1, x)).chunk(3, dim=1)
                x = x + linear(layer.attention.proj, attention(query, key, value, 2))
                x = mlp(layer, x)
            wanted = linear(module.head, norm(module.norm, x[len(prefix) :]))
            assert torch.allclose(got["all"][image].double(), wanted, atol=1e-5)
            assert torch.allclose(got["hidden"][image].double(), wanted[mask[image]], atol=1e-5)


def test_cross_attention_under_drop_against_float64():
    config, encoder, module = build("cross_attention", "drop")
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        got = {scope: module(encoded, mask, grid, scope) for scope in ("all", "hidden")}
        table = positions(grid, 16)
        for image in range(3):
            tokens = linear(module.embed.linear, encoded.tokens[image].double())
            context = torch.cat([tokens[:2], tokens[2:] + table[~mask[image]]])
            x = module.mask_token.double() + table
            for layer in module.layers:
                query = linear(layer.attention.query, norm(layer.norm1, x))
                key, value = linear(layer.attention.key_value, context).chunk(2, dim=1)
                x = x + linear(layer.attention.proj, attention(query, key, value, 2))
                x = mlp(layer, x)
            wanted = linear(module.head, norm(module.norm, x))
            assert torch.allclose(got["all"][image].double(), wanted, atol=1e-5)
            assert torch.allclose(got["hidden"][image].double(), wanted[mask[image]], atol=1e-5)


def test_a_query_of_cross_attention_does_not_see_the_others():
    config, encoder, module = build("cross_attention", "drop")
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        every = module(encoded, mask, grid, "hidden")
        keep = torch.tensor([0, 2, 5])
        fewer = EncoderOutput(encoded.tokens, encoded.visible_index, encoded.hidden_index[:, keep])
        assert torch.allclose(module(fewer, mask, grid, "hidden"), every[:, keep], atol=1e-6)


def test_a_query_of_the_transformer_does_see_the_others():
    config, encoder, module = build("transformer", "drop")
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        every = module(encoded, mask, grid, "hidden")
        fewer = EncoderOutput(encoded.tokens, encoded.visible_index, encoded.hidden_index[:, :3])
        assert not torch.allclose(module(fewer, mask, grid, "hidden"), every[:, :3], atol=1e-4)


# --- the others --------------------------------------------------------------------------------------------------


def test_linear_is_one_matrix():
    config, encoder, module = build("linear", "token")
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        wanted = linear(module.head.linear, encoded.tokens[:, 1:].double())
        assert torch.allclose(module(encoded, mask, grid, "all").double(), wanted, atol=1e-5)


@pytest.mark.parametrize("encoding", ["drop", "drop_without_prefix"])
def test_conv_under_drop_puts_mask_tokens_in_their_places(encoding):
    config, encoder, module = build("conv", encoding, kernel_size=5, hidden="token", embed=True, layer_norm_eps=1e-6)
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        got = module(encoded, mask, grid, "all")
        for image in range(3):
            _, x = unshuffled(module, encoded, mask, grid, image, lambda x: linear(module.embed.linear, x))
            for layer in module.layers:
                picture = x.T.reshape(1, 16, *grid)
                branch = F.conv2d(picture, layer.weight.double(), layer.bias.double(), padding=2, groups=4)
                x = x + gelu(norm(None, branch[0].flatten(1).T))
            assert torch.allclose(got[image].double(), linear(module.head, x), atol=1e-5)


def test_conv_without_layers_is_the_mask_token_where_it_was_hidden():
    config, encoder, module = build("conv", "drop", num_hidden_layers=0, hidden="token")
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder)
        constant = module.head(module.mask_token)
        same = (module(encoded, mask, grid, "all") - constant).abs().amax(-1) < 1e-6
    assert torch.equal(same, mask)


def test_conv_puts_noise_into_hidden_places_in_training_only():
    config, encoder, module = build("conv", "drop", num_hidden_layers=0, noise_std=0.5)
    with torch.no_grad():
        encoded, mask, grid = encode(config, encoder, batch=64)
        still, moving = module(encoded, mask, grid, "all"), module.train()(encoded, mask, grid, "all")
        assert torch.equal(still[mask], module.head.bias.expand_as(still[mask]))
        assert torch.equal(still[~mask], moving[~mask])
        noise = module.train()._hidden_tokens(torch.zeros(64, 20, 16))
    assert not torch.equal(moving[mask], still[mask])
    assert noise.std().item() == pytest.approx(0.5, rel=0.05) and abs(noise.mean().item()) < 0.02


def test_a_hidden_token_predicts_its_own_place():
    """End to end: with positions in the decoder, predictions of hidden tokens come out in raster order."""
    torch.manual_seed(0)
    model = MIMForPreTraining(tiny_config(image_size=[16, 24])).eval()
    pixel_values, mask = torch.randn(2, 3, 16, 24), random_masks(2, 24, 14)
    with torch.no_grad():
        logits = model(pixel_values, mask).logits
        encoded = model.mim.encoder(pixel_values, mask)
        encoded.tokens = model.mim.encoder.final_norm(encoded.tokens)
        everything = model.decoder(encoded, mask, (4, 6), "all")
    assert torch.allclose(logits, everything[mask].view(2, 14, -1), atol=1e-5)


# --- bad options -------------------------------------------------------------------------------------------------


def test_linear_and_drop_do_not_go_together():
    with pytest.raises(ValueError, match="'linear' needs every token.*'drop'.*mask_style 'token' or 'add'.*'transform"):
        MIMForPreTraining(tiny_config(decoder="linear", decoder_config={}))


@pytest.mark.parametrize(
    "decoder, options, message",
    [
        ("transformer", {"hidden_size": 18, "num_attention_heads": 2}, "divisible by 4, got 18"),
        ("transformer", {"hidden_size": 16, "num_attention_heads": 3}, "16 is not divisible by num_attention_heads 3"),
        ("cross_attention", {"hidden_size": 16, "num_attention_heads": 3}, "16 is not divisible by num_attention_"),
        ("transformer", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ("conv", {"hidden_size": 16, "groups": 3}, "groups 3 must divide the widths"),
        ("conv", {"hidden_size": 16, "groups": 4, "kernel_size": 4}, "kernel_size 4 be odd"),
        ("transformer", {"num_layers": 3}, "unknown option of decoder 'transformer' 'num_layers': did you mean"),
    ],
)
def test_bad_options(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        MIMForPreTraining(tiny_config(decoder=decoder, decoder_config=options))
