"""The poolers that select patches by their place or by the attention of the class token."""

import math

import pytest
import torch
from helpers import DINOV2, NATIVE_VIT, perturb, tiny_config
from test_poolers import GRID, WIDE, attention_of, pooler_of
from torch.nn import functional as F

from hf_mim import MIMModel


@pytest.mark.parametrize("size, rows, cols", [(1, [1], [2]), (2, [0, 1], [1, 2]), (3, [0, 1, 2], [1, 2, 3])])
def test_central_patches(size, rows, cols):
    pooler, dim = pooler_of("central", size=size)
    tokens = torch.randn(2, 18, dim)
    vector, weights = pooler(tokens, 3, GRID)
    places = [row * 5 + col for row in rows for col in cols]
    assert torch.allclose(vector, tokens[:, [3 + place for place in places]].mean(1), atol=1e-6)
    assert weights[0].nonzero().flatten().tolist() == places


@pytest.mark.parametrize("head", ["mean", "lowest_entropy"])
@pytest.mark.parametrize("only_its_row", [False, True])
def test_cls_attention_against_loops_in_float64(head, only_its_row):
    pooler, dim = pooler_of("cls_attention", head=head)
    tokens, attentions = torch.randn(4, 18, dim), attention_of(4)
    given = tuple(a[:, :, :1] for a in attentions) if only_its_row else attentions
    vector, weights = pooler(tokens, 3, GRID, given)
    chosen = set()
    for i in range(4):
        rows = attentions[-1][i, :, 0, 3:].double()
        if head == "mean":
            row = sum(rows) / 3
        else:
            shares = [[float(a / row.sum()) for a in row] for row in rows]
            entropies = [-sum(a * math.log(a + 1e-6) for a in share) for share in shares]
            chosen.add(entropies.index(min(entropies)))
            row = rows[entropies.index(min(entropies))]
        row = row / row.sum()
        assert torch.allclose(weights[i].double(), row, atol=1e-6)
        assert torch.allclose(vector[i].double(), row @ tokens[i, 3:].double(), atol=1e-5)
    assert head == "mean" or len(chosen) > 1


@pytest.mark.parametrize("encoder, options", [("vit", WIDE), ("native", NATIVE_VIT), ("native", DINOV2)])
def test_cls_attention_is_exact_whatever_the_attention_implementation(encoder, options):
    """Only the last block leaves the fused implementation, for this pooler alone."""
    torch.manual_seed(0)
    options = {**options, "num_hidden_layers": 3}
    model = perturb(MIMModel(tiny_config(encoder=encoder, encoder_config=options, pooler="cls_attention")), 0.1).eval()
    model.set_attn_implementation("sdpa")
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = model(pixel_values)
        whole = model(pixel_values, output_attentions=True)
        model.set_attn_implementation("eager")
        plain = model(pixel_values, output_attentions=True)
    assert (
        out.attentions is None
        and [a.shape for a in whole.attentions] == [(2, options["num_attention_heads"], 17, 17)] * 3
    )
    row = plain.attentions[-1][:, :, 0, 1:].mean(1)
    row = row / row.sum(-1, keepdim=True)
    for got in (out, whole, plain):
        assert torch.allclose(got.pooler_weights, row, atol=1e-5)
        assert torch.allclose(
            got.pooler_output, torch.einsum("bn,bnd->bd", row, got.last_hidden_state[:, 1:]), atol=1e-4
        )
    for a, b in zip(whole.attentions, plain.attentions):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("encoder, options", [("vit", {}), ("native", NATIVE_VIT)])
def test_only_the_last_block_leaves_the_fused_attention(encoder, options, monkeypatch):
    model = MIMModel(tiny_config(encoder=encoder, encoder_config=options, pooler="cls_attention")).eval()
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model(torch.randn(1, 3, 16, 16))
    assert len(calls) == 1  # of two blocks


@pytest.mark.parametrize("encoder, options", [("vit", {}), ("native", DINOV2)])
def test_cls_attention_is_learned_through_under_gradient_checkpointing(encoder, options):
    model = MIMModel(tiny_config(encoder=encoder, encoder_config=options, pooler="cls_attention")).train()
    pixel_values, found = torch.randn(2, 3, 16, 16), []
    for _ in range(2):
        model.zero_grad()
        model(pixel_values).pooler_output.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name
