"""Attention of a few hundred tokens on a GPU, as operators of torch, in Triton.

Fused kernels are made for long sequences: their backward pass takes several kernels, adds up the gradient of the
queries in float32 in memory, and the three gradients are then copied together. A masked autoencoder has 50 tokens in
its encoder and 197 in its decoder. Here one program has a block of keys and goes through all queries, another has a
block of queries and goes through all keys, so that nothing is added in memory; up to one block of tokens one program
does both. Reads and writes are where the projections have their values. Figures: docs/benchmarks.md.

The names of dimensions that a kernel knows when it is compiled are in capitals: few lengths occur in a run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_mim.modeling.attention import parts_of


LOG2_E = 1.4426950408889634
BLOCK, INNER = 64, 32  # tokens that a program has, and takes at a time of the others: measured on an H200


@triton.jit
def forward_kernel(
    query, key, value, out, sums, scale, heads, query_batch, query_step, key_batch, key_step,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head of one image; `sums`: log2 of the sum of each softmax, for the backward pass.

    query (batch, QUERIES, heads, SIZE), key and value (batch, KEYS, heads, SIZE) with these steps from image to image
    and from token to token; out (batch, QUERIES, heads, SIZE), sums (batch, heads, QUERIES); `scale` has log2(e) in it.
    """
    pair = tl.program_id(0) // BLOCKS
    image, head = (pair // heads).to(tl.int64), pair % heads
    dims = tl.arange(0, SIZE)
    rows = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    there = (rows < QUERIES)[:, None]
    query += image * query_batch + head * SIZE + dims
    key += image * key_batch + head * SIZE + dims
    value += image * key_batch + head * SIZE + dims
    asked = tl.load(query + rows[:, None] * query_step, mask=there, other=0.0)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, SIZE], tl.float32)
    for start in range(0, KEYS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        known = (columns < KEYS)[:, None]
        keys = tl.load(key + columns[:, None] * key_step, mask=known, other=0.0)
        values = tl.load(value + columns[:, None] * key_step, mask=known, other=0.0)
        logits = tl.dot(asked, tl.trans(keys)) * scale
        logits = tl.where((columns < KEYS)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        highest = higher
    places = out + (image * QUERIES * heads + head) * SIZE + rows[:, None] * heads * SIZE + dims
    tl.store(places, (mixed / total[:, None]).to(out.dtype.element_ty), mask=there)
    tl.store(sums + pair * QUERIES + rows, highest + tl.log2(total), mask=rows < QUERIES)


@triton.jit
def backward_kernel(
    query, key, value, out, sums, grad, grad_query, grad_key, grad_value, scale, log_scale, heads,
    query_batch, query_step, key_batch, key_step,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of the BLOCKS programs of a head the first PARTS have a block of keys each, the others a block of queries; with
    WHOLE one block has all keys, and its program gives the gradient of the queries too. Gradients lie as what they are
    of."""
    pair, part = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    image, head = (pair // heads).to(tl.int64), pair % heads
    dims = tl.arange(0, SIZE)
    asked, found = image * query_batch + head * SIZE + dims, image * key_batch + head * SIZE + dims
    mixed, step = (image * QUERIES * heads + head) * SIZE + dims, heads * SIZE
    sums += pair * QUERIES
    if part < PARTS:
        gradient_of_keys(
            query + asked, key + found, value + found, out + mixed, sums, grad + mixed, grad_query + asked,
            grad_key + found, grad_value + found, scale, log_scale, query_step, key_step, step,
            part * BLOCK, QUERIES, KEYS, SIZE, BLOCK, INNER, WHOLE,
        )  # fmt: skip
    else:
        gradient_of_queries(
            query + asked, key + found, value + found, out + mixed, sums, grad + mixed, grad_query + asked,
            scale, log_scale, query_step, key_step, step, (part - PARTS) * BLOCK,
            QUERIES, KEYS, SIZE, BLOCK, INNER,
        )  # fmt: skip


@triton.jit
def gradient_of_keys(
    query, key, value, out, sums, grad, grad_query, grad_key, grad_value, scale, log_scale,
    query_step, key_step, step, first,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Of a block of keys and their values, from all queries, `INNER` at a time."""
    columns = first + tl.arange(0, BLOCK)
    known = (columns < KEYS)[:, None]
    keys = tl.load(key + columns[:, None] * key_step, mask=known, other=0.0)
    values = tl.load(value + columns[:, None] * key_step, mask=known, other=0.0)
    sum_key = tl.zeros([BLOCK, SIZE], tl.float32)
    sum_value = tl.zeros([BLOCK, SIZE], tl.float32)
    for start in range(0, QUERIES, INNER):
        rows = start + tl.arange(0, INNER)
        there = (rows < QUERIES)[:, None]
        asked = tl.load(query + rows[:, None] * query_step, mask=there, other=0.0)
        mixed = tl.load(out + rows[:, None] * step, mask=there, other=0.0)
        upper = tl.load(grad + rows[:, None] * step, mask=there, other=0.0)
        total = tl.load(sums + rows, mask=rows < QUERIES, other=float("inf"))  # no weights where no query is
        weights = tl.exp2(tl.dot(keys, tl.trans(asked)) * log_scale - total[None, :])  # (keys, queries)
        weights = tl.where(known, weights, 0.0)
        sum_value += tl.dot(weights.to(upper.dtype), upper)
        mean = tl.sum(mixed.to(tl.float32) * upper.to(tl.float32), 1)
        slope = (weights * (tl.dot(values, tl.trans(upper)) - mean[None, :]) * scale).to(asked.dtype)
        sum_key += tl.dot(slope, asked)
        if WHOLE:
            sum_query = tl.dot(tl.trans(slope), keys)
            tl.store(grad_query + rows[:, None] * query_step, sum_query.to(keys.dtype), mask=there)
    tl.store(grad_key + columns[:, None] * key_step, sum_key.to(keys.dtype), mask=known)
    tl.store(grad_value + columns[:, None] * key_step, sum_value.to(keys.dtype), mask=known)


@triton.jit
def gradient_of_queries(
    query, key, value, out, sums, grad, grad_query, scale, log_scale, query_step, key_step, step, first,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Of a block of queries, from all keys, `INNER` at a time."""
    rows = first + tl.arange(0, BLOCK)
    there = (rows < QUERIES)[:, None]
    asked = tl.load(query + rows[:, None] * query_step, mask=there, other=0.0)
    mixed = tl.load(out + rows[:, None] * step, mask=there, other=0.0)
    upper = tl.load(grad + rows[:, None] * step, mask=there, other=0.0)
    total = tl.load(sums + rows, mask=rows < QUERIES, other=float("inf"))
    mean = tl.sum(mixed.to(tl.float32) * upper.to(tl.float32), 1)
    sum_query = tl.zeros([BLOCK, SIZE], tl.float32)
    for start in range(0, KEYS, INNER):
        columns = start + tl.arange(0, INNER)
        known = (columns < KEYS)[:, None]
        keys = tl.load(key + columns[:, None] * key_step, mask=known, other=0.0)
        values = tl.load(value + columns[:, None] * key_step, mask=known, other=0.0)
        weights = tl.exp2(tl.dot(asked, tl.trans(keys)) * log_scale - total[:, None])  # (queries, keys)
        weights = tl.where((columns < KEYS)[None, :], weights, 0.0)
        slope = weights * (tl.dot(upper, tl.trans(values)) - mean[:, None]) * scale
        sum_query += tl.dot(slope.to(keys.dtype), keys)
    tl.store(grad_query + rows[:, None] * query_step, sum_query.to(asked.dtype), mask=there)


def steps(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """From image to image and from token to token."""
    return query.stride(0), query.stride(1), key.stride(0), key.stride(1)


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@torch.library.custom_op("hf_mim::short_attention", mutates_args=())
def short_attention(rest: Tensor, query: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax attention, in bfloat16 or float16 with sums in float32.

    Args:
        rest: (batch, keys, 3, heads, head size), of queries, keys and values; (batch, keys, 2, heads, head size) beside
            a `query`. The head size is a power of two from 16 to 128.
        query: (batch, queries, heads, head size), or None.
        scaling: of the logits.

    Returns:
        (batch, queries, heads, head size), and (batch, heads, queries) float32, which the backward pass reads.
    """
    rest, query = rest.contiguous(), query if query is None else query.contiguous()
    query, key, value = parts_of(rest, query)
    batch, queries, heads, size = query.shape
    out = query.new_empty(query.shape)
    sums = query.new_empty(batch, heads, queries, dtype=torch.float32)
    forward_kernel[(blocks(queries) * batch * heads,)](  # of one dimension: the others end at 65,535
        query, key, value, out, sums, scaling * LOG2_E, heads, *steps(query, key),
        QUERIES=queries, KEYS=key.shape[1], SIZE=size, BLOCK=BLOCK, BLOCKS=blocks(queries), num_warps=4,
    )  # fmt: skip
    return out, sums


@torch.library.custom_op("hf_mim::short_attention_backward", mutates_args=())
def short_attention_backward(
    rest: Tensor, query: Tensor | None, out: Tensor, sums: Tensor, grad: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """-> the gradients of `rest` and of `query`, empty where there was none."""
    rest, query = rest.contiguous(), query if query is None else query.contiguous()
    out, sums, grad = out.contiguous(), sums.contiguous(), grad.contiguous()
    grad_rest = torch.empty_like(rest)
    grad_query = rest.new_empty(0) if query is None else torch.empty_like(query)
    asked, key, value = parts_of(rest, query)
    batch, queries, heads, size = asked.shape
    keys = key.shape[1]
    whole = keys <= BLOCK
    programs = blocks(keys) + (0 if whole else blocks(queries))
    backward_kernel[(programs * batch * heads,)](
        asked, key, value, out, sums, grad, *parts_of(grad_rest, None if query is None else grad_query),
        scaling, scaling * LOG2_E, heads, *steps(asked, key),
        QUERIES=queries, KEYS=keys, SIZE=size, BLOCK=BLOCK, INNER=INNER,
        PARTS=blocks(keys), BLOCKS=programs, WHOLE=whole, num_warps=4,
    )  # fmt: skip
    return grad_rest, grad_query


@short_attention.register_fake
def _(rest, query, scaling):
    asked = parts_of(rest, query)[0]
    batch, queries, heads, _ = asked.shape
    return asked.new_empty(asked.shape), asked.new_empty(batch, heads, queries, dtype=torch.float32)


@short_attention_backward.register_fake
def _(rest, query, out, sums, grad, scaling):
    return rest.new_empty(rest.shape), rest.new_empty(0 if query is None else query.shape)


def keep_for_backward(ctx, inputs, output) -> None:
    rest, query, ctx.scaling = inputs
    ctx.save_for_backward(rest, query, *output)


def differentiate(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor | None, None]:
    rest, query, out, sums = ctx.saved_tensors
    grad_rest, grad_query = short_attention_backward(rest, query, out, sums, grad, ctx.scaling)
    return grad_rest, grad_query if query is not None else None, None


short_attention.register_autograd(differentiate, setup_context=keep_for_backward)
