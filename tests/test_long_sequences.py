"""Attention over many tokens on a processor in bfloat16: the same numbers, and memory that grows with the length."""

from types import SimpleNamespace

import pytest
import torch

from hf_mim.modeling import attention


def tensors(length: int, queries: int, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, count, 8) for count in (queries, length, length)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]
    return [value.requires_grad_() for value in values]


def by_hand(query, key, value, scale, bias=None):
    """softmax(q k' s + b) v, row by row, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale + (0 if bias is None else bias.double())
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries", [300, 5])
def test_blocks_of_queries_are_the_whole_with_its_gradients(queries, biased):
    inputs = tensors(300, queries)
    bias = torch.randn(2, 3, queries, 300, requires_grad=True) if biased else None
    out, _ = attention.blockwise_attention(None, *inputs, scaling=0.3, position_bias=bias)
    want = by_hand(*inputs, 0.3, bias)
    leaves = [*inputs, *([bias] if biased else [])]
    cotangent = torch.randn(out.shape)
    grads = torch.autograd.grad(out, leaves, cotangent)
    expected = torch.autograd.grad(want, leaves, cotangent.double())
    assert torch.allclose(out.double(), want, atol=1e-5)
    assert all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in zip(grads, expected, strict=True))


def saved_bytes(length: int) -> int:
    """Of the tensors that attention keeps for its backward pass."""
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), scaling=0.3)
    kept = dict[int, int]()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, value = tensors(length, length, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = attention.attend(module, query, key, value)
    out.float().sum().backward()
    assert torch.allclose(out.double(), by_hand(query, key, value, 0.3).flatten(2), atol=2e-2)  # bfloat16
    return sum(kept.values())


def test_memory_grows_with_the_length():
    assert saved_bytes(1600) <= 2.1 * saved_bytes(800)
