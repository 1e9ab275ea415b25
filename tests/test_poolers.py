"""Every pooler: shapes, order and batch do not matter; the simple ones against loops in float64."""

import pytest
import torch
from helpers import CONVNEXT, DINOV2, NATIVE_VIT, RESNET, SWIN, TIMM_VIT, perturb, tiny_config
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from hf_mim import MIMConfig, MIMForImageClassification, MIMModel
from hf_mim.modeling.parts import make_encoder, make_pooler
from hf_mim.modeling.poolers import POOLERS


EVERY = pytest.mark.parametrize("name", POOLERS)
GRID = (3, 5)
# Divisible by the usual numbers of heads and queries.
WIDE = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 1}


def pooler_of(name: str, **options):
    """A pooler with noise on its parameters, for a ViT with a class token and two registers, and its tokens' width."""
    torch.manual_seed(0)
    config = tiny_config(encoder_config={**WIDE, "num_register_tokens": 2}, pooler=name, pooler_config=options)
    encoder = make_encoder(config)
    assert encoder.num_prefix_tokens == 3
    return perturb(make_pooler(config, encoder)).eval(), encoder.hidden_size


def attention_of(images: int, heads: int = 3, length: int = 18) -> tuple[Tensor, ...]:
    """Of two blocks; a pooler is to look at the last one."""
    return tuple((3 * torch.randn(images, heads, length, length)).softmax(-1) for _ in range(2))


@EVERY
def test_shapes(name):
    pooler, dim = pooler_of(name)
    vector, weights = pooler(torch.randn(4, 3 + 15, dim), 3, GRID, attention_of(4))
    assert vector.shape == (4, pooler.out_dim)
    assert vector.isfinite().all()
    if weights is not None:
        assert weights.shape in ((4, 15), (4, weights.shape[1], 15))
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@EVERY
def test_the_order_of_patches_does_not_matter(name):
    pooler, dim = pooler_of(name)
    tokens, order, attentions = torch.randn(2, 3 + 15, dim), torch.randperm(15), attention_of(2)
    vector, weights = pooler(tokens, 3, GRID, attentions)
    places = torch.cat([torch.arange(3), 3 + order])
    other, other_weights = pooler(tokens[:, places], 3, GRID, tuple(a[..., places] for a in attentions))
    if name == "central":  # the one that picks places
        assert torch.equal(weights, other_weights) and not torch.allclose(vector, other, atol=0.1)
        return
    assert torch.allclose(vector, other, atol=1e-5)
    if weights is not None:
        assert torch.allclose(weights[..., order], other_weights, atol=1e-5)


@EVERY
def test_an_image_is_pooled_by_itself_in_evaluation(name):
    pooler, dim = pooler_of(name)
    tokens = torch.randn(5, 3 + 15, dim) * torch.tensor([1, 10, 0.1, 3, 1])[:, None, None]
    attentions = attention_of(5)
    vectors, _ = pooler(tokens, 3, GRID, attentions)
    for i in range(5):
        alone, _ = pooler(tokens[i : i + 1], 3, GRID, tuple(a[i : i + 1] for a in attentions))
        assert torch.allclose(alone[0], vectors[i], rtol=1e-4, atol=1e-5)


@EVERY
def test_it_depends_on_its_input_and_passes_gradients_back(name):
    pooler, dim = pooler_of(name)
    tokens = torch.rand(2, 3 + 15, dim, requires_grad=True)
    vector, _ = pooler(tokens, 3, GRID, attention_of(2))
    (gradient,) = torch.autograd.grad(vector.square().sum(), tokens)
    assert gradient.isfinite().all() and gradient.abs().sum((1, 2)).min() > 0


@EVERY
def test_bfloat16(name):
    pooler, dim = pooler_of(name)
    tokens, attentions = torch.rand(2, 3 + 15, dim), attention_of(2)
    wanted, _ = pooler(tokens, 3, GRID, attentions)
    got, _ = pooler.bfloat16()(tokens.bfloat16(), 3, GRID, tuple(a.bfloat16() for a in attentions))
    assert got.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; poolers with parameters lose some more to their rounding
    assert torch.allclose(got.float(), wanted, rtol=0.05, atol=0.05)


# --- numbers -----------------------------------------------------------------------------------------------------


def by_loops(name: str, tokens: torch.Tensor, prefix: int, p: float = 3.0, eps: float = 1e-6) -> torch.Tensor:
    pooled = torch.zeros(tokens.shape[0], tokens.shape[2], dtype=torch.float64)
    for image in range(tokens.shape[0]):
        for channel in range(tokens.shape[2]):
            values = [float(v) for v in tokens[image, prefix:, channel].double()]
            if name == "mean":
                result = sum(values) / len(values)
            elif name == "max":
                result = max(values)
            else:
                result = (sum(max(v, eps) ** p for v in values) / len(values)) ** (1 / p)
            pooled[image, channel] = result
    return pooled


@pytest.mark.parametrize("name", ["mean", "max", "gem"])
def test_against_loops_in_float64(name):
    pooler, _ = pooler_of(name)
    p = float(pooler.p.detach()) if name == "gem" else 0.0
    tokens = torch.randn(2, 3 + 15, 12)
    vector, weights = pooler(tokens, 3, GRID)
    assert weights is None
    assert torch.allclose(vector.double(), by_loops(name, tokens, 3, p), atol=1e-6)


def test_cls_is_the_first_token():
    pooler, dim = pooler_of("cls")
    tokens = torch.randn(2, 18, dim)
    assert torch.equal(pooler(tokens, 3, GRID)[0], tokens[:, 0])


def test_gem_with_p_one_is_the_mean_of_positive_values():
    torch.manual_seed(0)
    config = tiny_config(pooler="gem", pooler_config={"p": 1.0})
    pooler, tokens = make_pooler(config, make_encoder(config)), torch.rand(2, 16, 16) + 0.01
    assert torch.allclose(pooler(tokens, 1, GRID)[0], tokens[:, 1:].mean(1), atol=1e-6)


def test_gem_with_large_p_goes_to_the_maximum():
    pooler, dim = pooler_of("gem", p=60.0)
    tokens = torch.rand(2, 18, dim)
    assert torch.allclose(pooler(tokens, 3, GRID)[0], tokens[:, 3:].amax(1), rtol=0.06)  # 15^(1/60) = 1.046


def test_gem_starts_at_its_option_and_keeps_what_it_learned(tmp_path):
    model = MIMModel(tiny_config(pooler="gem", pooler_config={"p": 4.0}))
    assert model.pooler.p.tolist() == [4.0]
    with torch.no_grad():
        model.pooler.p.fill_(2.5)
    model.save_pretrained(tmp_path)
    again = MIMModel.from_pretrained(tmp_path)
    assert again.pooler.p.tolist() == [2.5]
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(pixel_values).pooler_output, again(pixel_values).pooler_output)


# --- in a model --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("apply_final_norm", [True, False])
def test_the_last_norm_comes_first_or_not_at_all(name, apply_final_norm):
    torch.manual_seed(0)
    config = tiny_config(
        encoder_config=WIDE, pooler=name, pooler_config={"apply_final_norm": apply_final_norm}, image_size=[8, 12]
    )
    model = perturb(MIMModel(config)).eval()
    pixel_values = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        out = model(pixel_values, output_hidden_states=True, output_attentions=True)
        tokens = out.hidden_states[-1].double()
        if apply_final_norm:
            centred = tokens - tokens.mean(-1, keepdim=True)
            tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            tokens = tokens * model.encoder.final_norm.weight.double() + model.encoder.final_norm.bias.double()
        wanted, _ = model.pooler(tokens.float(), 1, (2, 3), out.attentions)
        plain = model(pixel_values)
    size = wanted.abs().max()  # up to about 100 with these parameters
    assert (out.pooler_output - wanted).abs().max() <= 1e-5 * size
    assert (out.pooler_output - plain.pooler_output).abs().max() <= 1e-5 * size
    assert plain.attentions is None
    if apply_final_norm:
        raw, _ = model.pooler(out.hidden_states[-1], 1, (2, 3), out.attentions)
        assert not torch.allclose(out.pooler_output, raw, atol=1e-2)


@EVERY
def test_a_classifier_takes_every_pooler(name):
    torch.manual_seed(0)
    config = tiny_config(encoder_config=WIDE, pooler=name, num_labels=4)
    model = MIMForImageClassification(config)
    out = model(torch.randn(3, 3, 16, 16), labels=torch.tensor([0, 1, 3]))
    assert out.logits.shape == (3, 4)
    out.loss.backward()
    assert all(p.grad is not None for p in model.classifier.parameters())


@EVERY
@pytest.mark.parametrize(
    "encoder, options, size",
    [("vit", {"use_cls_token": False}, 16), ("convnet", RESNET, 64), ("native", {"model_type": "resnet"}, 64)],
)
def test_encoders_without_a_class_token(name, encoder, options, size):
    if encoder == "native":
        options = {**RESNET, **options}
    if encoder == "vit":
        options = {**WIDE, **options}
    fields = {"encoder": encoder, "encoder_config": options, "pooler": name, "image_size": size}
    if name in ("cls", "cls_attention"):
        with pytest.raises(ValueError, match=f"pooler '{name}' needs an encoder with a class token.*'mean'"):
            tiny_config(**fields)
        return
    try:
        model = MIMModel(tiny_config(**fields)).eval()
    except ValueError:
        assert encoder != "vit"  # 20 channels need not fit a pooler's heads
        return
    assert model(torch.randn(2, 3, size, size)).pooler_output.shape == (2, model.pooler.out_dim)


def test_cls_of_a_native_encoder():
    torch.manual_seed(0)
    model = MIMModel(MIMConfig(image_size=16, encoder="native", encoder_config=NATIVE_VIT, pooler="cls")).eval()
    out = model(torch.randn(2, 3, 16, 16))
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])


def test_nothing_is_pooled_of_dropped_tokens():
    """The mean of the visible tokens is not what `pooler_output` means elsewhere: it is absent."""
    model = MIMModel(tiny_config()).eval()
    mask = torch.arange(16).expand(2, 16) < 9
    assert model(torch.randn(2, 3, 16, 16), mask).pooler_output is None


# --- around other models, saved, frozen ------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_saved_and_loaded_bit_for_bit(name, size, tmp_path):
    torch.manual_seed(0)
    model = MIMForImageClassification(tiny_config(encoder_config=WIDE, pooler=name, num_labels=3))
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 16, 16) + 2)  # moves running statistics
    perturb(model, 0.05).eval().save_pretrained(tmp_path)
    again, bare = (c.from_pretrained(tmp_path).eval() for c in (MIMForImageClassification, MIMModel))
    for loaded in (again, bare):
        for parameter in loaded.parameters():  # a matrix product rounds by where in memory its operands begin, and
            parameter.data = parameter.data.clone()  # loaded ones begin anywhere in the mapped file
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    pixel_values = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)
        assert torch.equal(bare(pixel_values).pooler_output, model.mim(pixel_values).pooler_output)


@EVERY
def test_around_a_pretrained_model_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    options = {k: v for k, v in DINOV2.items() if k != "model_type"} | {"hidden_size": 64, "image_size": 16}
    dino = perturb(Dinov2Model(Dinov2Config(**options)), 0.02).eval()
    dino.save_pretrained(tmp_path / "dino")
    model = MIMForImageClassification.from_encoder(str(tmp_path / "dino"), pooler=name, num_labels=3)
    pixel_values = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.allclose(
            model.mim(pixel_values).last_hidden_state, dino(pixel_values).last_hidden_state, atol=1e-5
        )
        wanted = model(pixel_values).logits
        model.save_pretrained(tmp_path / "whole")
        again = MIMForImageClassification.from_pretrained(tmp_path / "whole").eval()
        assert torch.allclose(again(pixel_values).logits, wanted, atol=1e-6)


@EVERY
def test_a_frozen_encoder_stays_as_it_is(name):
    torch.manual_seed(0)
    fields = {"encoder": "convnet", "encoder_config": RESNET, "image_size": 64}
    if name in ("cls", "cls_attention", "central_attention", "efficient"):
        fields = {"encoder_config": {**WIDE, "drop_path_rate": 0.9, "num_hidden_layers": 2}}
    model = MIMForImageClassification(tiny_config(**fields, pooler=name, num_labels=3))
    model.freeze_encoder()
    model.train()
    size = model.config.image_size
    pixel_values, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 0])
    before = {key: value.clone() for key, value in model.mim.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model.mim.encoder(pixel_values).tokens
    model(pixel_values, labels=labels).loss.backward()
    optimizer.step()
    for key, value in model.mim.encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(first, model.mim.encoder(pixel_values).tokens)  # no drop path, no batch statistics
    assert model.mim.pooler.training and model.classifier.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.mim.pooler.parameters())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("abmilp", {"depth": 0}, "depth must be at least 1, got 0"),
        ("abmilp", {"activation": "gelu"}, "unknown activation 'gelu'.*tanh, relu"),
        ("abmilp", {"self_attention": "value"}, "unknown self_attention 'value'.*none, map, both"),
        ("abmilp", {"position": "learned"}, "unknown position 'learned'.*none, sincos"),
        ("abmilp", {"content": "tokens"}, "unknown content 'tokens'.*patch, all"),
        ("abmilp", {"gated": True}, "depth of 2 or more, got depth 1"),
        ("abmilp", {"heads": 2}, "unknown option of pooler 'abmilp' 'heads'.*depth"),
        ("attention", {"form": "jepa"}, "unknown form 'jepa'.*vjepa.*aim, cae, vjepa"),
        ("attention", {"num_heads": 5}, "num_heads 5 does not divide the width 16; choices: 1, 2, 4, 8, 16"),
        ("attention", {"num_queries": 0}, "num_queries must be at least 1"),
        ("simpool", {"gamma": -1.0}, "gamma must be above 0.*got -1.0"),
        ("efficient", {"num_queries": 3}, "num_queries 3 .*does not divide the width 16; .*1, 2, 4, 8, 16"),
        ("efficient", {"num_queries": 1, "d_out": 3}, "none with this d_out"),
        ("central", {"size": 5}, "size 5 is more than the 4x4 patches; choose 1 to 4"),
        ("central", {"size": 0}, "size must be at least 1"),
        ("cls_attention", {"head": "max"}, "unknown head 'max'.*mean, lowest_entropy"),
        ("cls_attention", {"head": 3}, "option 'head' of pooler 'cls_attention' must be"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(pooler=name, pooler_config=options)


def test_what_an_encoder_cannot_give():
    with pytest.raises(ValueError, match="sincos' needs tokens of a width divisible by 4, got 18"):
        tiny_config(
            encoder_config={"hidden_size": 18, "position_embedding": "learned"},
            pooler="abmilp",
            pooler_config={"position": "sincos"},
        )
    with pytest.raises(ValueError, match="d_out must be 1 with an encoder that norms the pooled vector"):
        options = {"num_queries": 2, "d_out": 2}
        tiny_config(
            encoder="convnet", encoder_config=CONVNEXT, image_size=64, pooler="efficient", pooler_config=options
        )
    with pytest.raises(ValueError, match="pooler 'cls_attention' needs an encoder with a class token.*'mean'"):
        tiny_config(encoder="native", encoder_config=SWIN, pooler="cls_attention")
    with pytest.raises(ValueError, match="encoder 'timm' gives tokens behind the model's last norm only"):
        tiny_config(encoder="timm", encoder_config=TIMM_VIT, image_size=32, pooler_config={"apply_final_norm": False})
    data2vec = {**NATIVE_VIT, "model_type": "data2vec-vision"}
    fields = {"encoder": "native", "encoder_config": data2vec, "pooler": "cls_attention"}
    with pytest.raises(ValueError, match="'data2vec-vision' returns no attentions.*attn_implementation='eager'"):
        MIMModel(tiny_config(**fields))(torch.randn(1, 3, 16, 16))
    weights = MIMModel(tiny_config(**fields, attn_implementation="eager"))(torch.randn(1, 3, 16, 16)).pooler_weights
    assert weights.shape == (1, 16) and torch.allclose(weights.sum(), torch.ones(()))
    pooler, dim = pooler_of("cls_attention")
    with pytest.raises(ValueError, match="needs the attentions of the encoder's last block, and got none"):
        pooler(torch.randn(1, 18, dim), 3, GRID)
    model = MIMModel(tiny_config(pooler="central", pooler_config={"size": 4})).eval()
    with pytest.raises(ValueError, match="size 4 is more than the 2x4 patches; choose 1 to 2"):
        model(torch.randn(1, 3, 8, 16))
