"""Seeing attention matrices one block at a time: fused attention hides them, and keeping all of them costs gigabytes.

Every transformer of this project and of transformers looks its attention function up by name. For the time of a
measurement that name is another one, of a function that computes the matrix, shows it and forgets it.
"""

import re
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_mim.modeling.options import pair


NAME = "hf_mim_exact"


def exact_attention(module, query, key, value, attention_mask=None, scaling=None, position_bias=None, **kwargs):
    """Eager attention, with the signature of transformers' attention functions. (batch, heads, length, head_dim) each
    -> (batch, length, heads, head_dim), and the weights (batch, heads, length, length), of float32 precision."""
    logits = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    for bias in (attention_mask, position_bias):
        if bias is not None:
            logits = logits + bias
    weights = logits.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


@contextmanager
def replaced_attention(network: nn.Module, function):
    """For a while, all attention in `network` is computed by `function`, which has the signature of
    `exact_attention`. Afterwards, also after an exception, everything is as it was."""
    configs = {id(c): c for c in (getattr(module, "config", None) for module in network.modules()) if c is not None}
    # The underlying attribute: the property's setter would also change what nested configs have.
    before = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    ALL_ATTENTION_FUNCTIONS[NAME] = function
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        del ALL_ATTENTION_FUNCTIONS[NAME]


def attention_modules(model) -> list[nn.Module]:
    """The modules of a `MIMModel` that compute attention, one per block and in their order, found by running it once.

    Raises:
        ValueError: it has none, or not one per block over all tokens; the message is a sentence for the report.
    """
    calls = []

    def note(module, query, key, *arguments, **options):
        out, weights = exact_attention(module, query, key, *arguments, **options)
        calls.append((module, tuple(weights.shape)))
        return out, weights

    config, encoder = model.config, model.encoder
    height, width = pair(config.image_size)
    pixel_values = torch.zeros(1, config.num_channels, height, width, device=model.device)
    with torch.inference_mode(), replaced_attention(encoder, note):
        length = encoder(pixel_values.to(model.dtype)).tokens.shape[1]
    if not calls:
        raise ValueError("This encoder has no attention, or computes it in a way that cannot be looked into.")
    if any(shape[0] != 1 or shape[2:] != (length, length) for _, shape in calls):
        raise ValueError("This encoder attends within windows or between scales, not from every token to every token.")
    modules = [module for module, _ in calls]
    if len(set(modules)) != len(modules) or not all(block_of(encoder, module) for module in modules):
        raise ValueError("This encoder's blocks cannot be told apart.")
    return modules


def block_of(network: nn.Module, attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The block that a module belongs to, which is the innermost numbered one around it, and the block's own child
    around the module: the whole attention branch, output projection included. None outside any block."""
    name = next(name for name, module in network.named_modules() if module is attention)
    numbered = re.match(r"(.*\.\d+)\.([^.\d][^.]*)", name)
    if numbered is None:
        return None
    return network.get_submodule(numbered[1]), network.get_submodule(f"{numbered[1]}.{numbered[2]}")


@contextmanager
def watched_attention(model, measurements: list):
    """For a while, every forward of a `MIMModel` calls `attention` and `branch` of the measurements, block by block."""
    if not measurements:
        yield
        return
    modules = attention_modules(model)
    blocks, entering = {module: i for i, module in enumerate(modules)}, {}

    def show(module, *arguments, **options):
        out, weights = exact_attention(module, *arguments, **options)
        for measurement in measurements:
            measurement.attention(blocks[module], weights)
        return out, None

    def hooks(index: int, block: nn.Module, branch: nn.Module):
        def enter(module, arguments, options):
            entering[index] = arguments[0] if arguments else options["hidden_states"]

        def leave(module, arguments, output):
            added, before = output[0] if isinstance(output, tuple) else output, entering.pop(index)
            for measurement in measurements:
                measurement.branch(index, before, added)

        yield block.register_forward_pre_hook(enter, with_kwargs=True)
        yield branch.register_forward_hook(leave)

    handles = []
    try:
        for i, module in enumerate(modules):
            block = block_of(model.encoder, module)
            assert block is not None  # `attention_modules` has looked
            handles.extend(hooks(i, *block))
        with replaced_attention(model.encoder, show):
            yield
    finally:
        for handle in handles:
            handle.remove()
