"""How attention is computed: by the kernels of transformers; on a processor in bfloat16 by matrix products; on a GPU,
where `attn_implementation="mim_short"` asks for them, by this project's kernels for few tokens."""

import importlib
import itertools
import warnings

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


SHORT = "mim_short"  # the name of `short_attention` for transformers; it is sdpa where that does not apply
SHORT_LENGTH = 256  # tokens up to which it was seen to be faster than the fused kernels of torch, on an H200
SHORT_HEADS = (16, 32, 64, 128)  # head sizes that its tiles can have
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
    if (
        name in ("sdpa", SHORT)
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and torch.is_grad_enabled()
    ):
        # The backward pass of the CPU's fused bfloat16 kernel is slower than two matrix products.
        function = eager_attention if key.shape[2] <= LONG else blockwise_attention
    extra = {} if position_bias is None else {"position_bias": position_bias}
    out, weights = function(module, query, key, value, None, scaling=module.scaling, is_causal=False, **extra)
    return out.flatten(2), weights


ALL_ATTENTION_FUNCTIONS.register(SHORT, ALL_ATTENTION_FUNCTIONS["sdpa"])


def takes_short(module, rest: Tensor) -> bool:
    """Whether `short_attention` computes attention: where it is asked for, on a GPU, in 16 bits, of few tokens.

    Args:
        module: with the config that names the implementation.
        rest: (batch, tokens, 2 or 3, heads, head size), see there.
    """
    return (
        module.config._attn_implementation == SHORT
        and rest.is_cuda
        and rest.dtype in (torch.bfloat16, torch.float16)
        and rest.shape[1] <= SHORT_LENGTH
        and rest.shape[-1] in SHORT_HEADS
        and not torch.compiler.is_exporting()
        and has_short_attention(rest.device)
    )


@torch.compiler.assume_constant_result
def has_short_attention(device: torch.device) -> bool:
    """Whether its kernels run on this GPU; loads them, or warns. They do not travel with a checkpoint: its own code
    needs no Triton, and does without where hf_mim is not installed."""
    missing = "a GPU of NVIDIA from Ampere on"
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0):
        try:
            importlib.import_module("hf_mim.short_attention")
            return True
        except ImportError as error:  # of Triton or hf_mim
            missing = f"{error.name or 'a package'} to be installed"
    warnings.warn(f"attn_implementation {SHORT!r} needs {missing}: sdpa takes its place", stacklevel=2)
    return False


def parts_of(rest: Tensor, query: Tensor | None) -> tuple[Tensor, ...]:
    """-> queries, keys and values, (batch, tokens, heads, head size) each, views of what `short_attention` takes."""
    return rest.unbind(2) if query is None else (query, *rest.unbind(2))


def attend_short(rest: Tensor, query: Tensor | None, scaling: float) -> Tensor:
    """-> (batch, queries, heads * head size); arguments as of `short_attention`."""
    return torch.ops.hf_mim.short_attention(rest, query, scaling)[0].flatten(2)
