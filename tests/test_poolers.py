"""Every pooler: shapes, order and batch do not matter; the simple ones against loops in float64."""

import pytest
import torch
from helpers import NATIVE_VIT, RESNET, perturb, tiny_config

from hf_mim import MIMConfig, MIMForImageClassification, MIMModel
from hf_mim.modeling.modeling_mim import make_encoder, make_pooler
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


@EVERY
def test_shapes(name):
    pooler, dim = pooler_of(name)
    vector, weights = pooler(torch.randn(4, 3 + 15, dim), 3, GRID)
    assert vector.shape == (4, pooler.out_dim)
    assert vector.isfinite().all()
    if weights is not None:
        assert weights.shape in ((4, 15), (4, weights.shape[1], 15))
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@EVERY
def test_the_order_of_patches_does_not_matter(name):
    pooler, dim = pooler_of(name)
    tokens, order = torch.randn(2, 3 + 15, dim), torch.randperm(15)
    vector, weights = pooler(tokens, 3, GRID)
    shuffled = torch.cat([tokens[:, :3], tokens[:, 3:][:, order]], dim=1)
    other, other_weights = pooler(shuffled, 3, GRID)
    assert torch.allclose(vector, other, atol=1e-5)
    if weights is not None:
        assert torch.allclose(weights[..., order], other_weights, atol=1e-5)


@EVERY
def test_an_image_is_pooled_by_itself_in_evaluation(name):
    pooler, dim = pooler_of(name)
    tokens = torch.randn(5, 3 + 15, dim) * torch.tensor([1, 10, 0.1, 3, 1])[:, None, None]
    vectors, _ = pooler(tokens, 3, GRID)
    for i in range(5):
        alone, _ = pooler(tokens[i : i + 1], 3, GRID)
        assert torch.allclose(alone[0], vectors[i], rtol=1e-4, atol=1e-5)


@EVERY
def test_it_depends_on_its_input_and_passes_gradients_back(name):
    pooler, dim = pooler_of(name)
    tokens = torch.rand(2, 3 + 15, dim, requires_grad=True)
    vector, _ = pooler(tokens, 3, GRID)
    (gradient,) = torch.autograd.grad(vector.square().sum(), tokens)
    assert gradient.isfinite().all() and gradient.abs().sum((1, 2)).min() > 0


@EVERY
def test_bfloat16(name):
    pooler, dim = pooler_of(name)
    tokens = torch.rand(2, 3 + 15, dim)
    wanted, _ = pooler(tokens, 3, GRID)
    got, _ = pooler.bfloat16()(tokens.bfloat16(), 3, GRID)
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
    assert torch.allclose(out.pooler_output, wanted, atol=1e-5)
    assert torch.allclose(out.pooler_output, plain.pooler_output, atol=1e-5)
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
    if name == "cls":
        with pytest.raises(ValueError, match="pooler 'cls' needs an encoder with a class token.*'mean'"):
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
