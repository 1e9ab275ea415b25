"""How attention is computed: by the kernels of transformers, and on a processor in bfloat16 by matrix products."""

import itertools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


LONG = 512  # keys from which the matrix of attention weights costs more memory than recomputing it costs time
QUERY_BLOCK = 128


def eager_attention(module, query, key, value, attention_mask=None, scaling=None, position_bias=None, **kwargs):
    """Attention by matrix products, which returns its weights; the signature is that of transformers' attention."""
    # The query is smaller than the logits. softmax computes in float32 and rounds its result, whatever the dtype.
    logits = (query * scaling) @ key.transpose(2, 3)
    if position_bias is not None:
        logits = logits + position_bias
    weights = logits.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


def blockwise_attention(module, query, key, value, attention_mask=None, scaling=None, position_bias=None, **kwargs):
    """`eager_attention` of `QUERY_BLOCK` queries at a time, computed again in the backward pass, so that memory grows
    with the length, not with its square."""
    biases = itertools.repeat(None) if position_bias is None else position_bias.split(QUERY_BLOCK, dim=2)
    blocks = [
        checkpoint(
            lambda *inputs: eager_attention(module, *inputs[:3], scaling=scaling, position_bias=inputs[3])[0],
            *(part, key, value, bias),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part, bias in zip(query.split(QUERY_BLOCK, dim=2), biases)
    ]
    return torch.cat(blocks, dim=1), None


def attend(module, query, key, value, position_bias=None, output_attentions=False) -> tuple[Tensor, Tensor | None]:
    """(batch, heads, length, head_dim) each -> (batch, queries, heads * head_dim), and the weights where the
    implementation returns them. Fused ones do not: `output_attentions` takes `eager_attention`."""
    name = "eager" if output_attentions else module.config._attn_implementation or "eager"
    if position_bias is not None:
        if "flash" in name:
            raise ValueError(f"{name} takes no relative position bias; use attn_implementation='sdpa'")
        position_bias = position_bias.to(query.dtype).expand(query.shape[0], -1, -1, -1)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    if name == "sdpa" and query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The backward pass of the CPU's fused bfloat16 kernel is slower than two matrix products.
        function = eager_attention if key.shape[2] <= LONG else blockwise_attention
    extra = {} if position_bias is None else {"position_bias": position_bias}
    out, weights = function(module, query, key, value, None, scaling=module.scaling, is_causal=False, **extra)
    return out.flatten(2), weights
