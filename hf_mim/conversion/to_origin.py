"""An encoder that was made of a model of transformers or timm, as that model again: the conversion read backwards."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.modeling.foreign import refuse_loading
from hf_mim.modeling.layers import resize_table
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.native_models import native_config, native_model
from hf_mim.modeling.options import pair
from hf_mim.training.conversion.convnets import FROM_DINOV3, timm_name
from hf_mim.training.conversion.vit_family import FROM_TRANSFORMERS, PLAIN, renamer

from .counterparts import named, patch_convolution, position_table


TOKENS = ("cls_token", "dist_token", "reg_token")  # in our order
KEPT = ("mask_token", "relative_position_index", "num_batches_tracked")  # what the other class may keep as it makes it
POOLING = ("pooler.", "head.", "attn_pool.", "fc_norm.")  # parts that act after the tokens


def origin_of(model: MIMModel, library: str) -> dict | None:
    """The options of the model that an encoder was made of, where it is one of this library."""
    origin = dict(model.config.origin or {})
    return origin if origin.pop("library", None) == library else None


def transformers_model(model: MIMModel, origin: dict) -> nn.Module:
    """-> the model of transformers with the weights of the encoder.

    Raises:
        ValueError: the weights do not fill it.
    """
    options = dict(origin)
    if options["model_type"] == "dinov3_vit":  # behind rotary positions a bias of the keys counts, and ours has one
        options["key_bias"] = True
    native = native_config(model.config, options.pop("model_type"), options)
    network = native_model(model.config, native)
    if model.config.encoder == "convnet":
        fill(network, convnet_weights(model), FROM_DINOV3)
    else:
        fill(network, vit_weights(model), FROM_TRANSFORMERS)
    return network.eval()


def timm_model(model: MIMModel, origin: dict) -> tuple[str, dict, dict[str, Tensor]]:
    """-> the architecture's name in timm, the arguments that make it this encoder, and the weights.

    Raises:
        ValueError: the weights do not fill it.
    """
    import timm  # slow to import, and not everybody has it

    name, options = origin["architecture"], dict(origin.get("model_args") or {})
    refuse_loading(options, name)
    options |= {"img_size": list(pair(model.config.image_size)), "in_chans": model.config.num_channels}
    options["num_classes"] = 0
    network = timm.create_model(name, **options)
    fill(network, vit_weights(model), PLAIN)
    return name, options, network.state_dict()


def fill(network: nn.Module, weights: dict[str, Tensor], names) -> None:
    """Gives a model of others the weights under timm's names, by the table that renames its own to these.

    Raises:
        ValueError: it has a part before its tokens that these do not fill.
    """
    rename, state = renamer(names), network.state_dict()
    theirs = {name: rename(name) for name in state}
    place = 0
    for token in TOKENS:
        for name in (name for name in state if theirs[name] == token):
            count = state[name].numel() // state[name].shape[-1]
            state[name] = weights["prefix"][place : place + count].reshape(state[name].shape)
            place += count
    has_bias = any(name == "patch_embed.proj.bias" for name in theirs.values())
    for name, like in state.items():
        source = theirs[name]
        if source in TOKENS or any(part in name for part in KEPT):
            continue
        if source == "pos_embed":
            table = weights[source] if has_bias else weights[source] + weights["patch_embed.proj.bias"]
            state[name] = F.pad(table, (0, 0, like.shape[-2] - len(table), 0)).reshape(like.shape)
        elif source in weights:
            state[name] = weights[source].reshape(like.shape)
        elif not source.startswith(POOLING):
            raise ValueError(f"{type(network).__name__} has a part that this encoder does not fill: {name}")
    network.load_state_dict(state)


def vit_weights(model: MIMModel) -> dict[str, Tensor]:
    """The weights of our encoder `vit` under timm's names, a weight under each name that a family has for it; the
    tokens without a patch together as `prefix`."""
    encoder: Any = model.encoder
    prefix, size = encoder.prefix_tokens, encoder.base_grid
    weights = {"prefix": torch.zeros(0, encoder.hidden_size) if prefix is None else prefix.detach()}
    weights |= {"pos_embed": position_table(model), "patch_embed.proj.weight": patch_convolution(model)}
    weights |= {"patch_embed.proj.bias": encoder.patch_embedding.bias.detach()}
    weights |= named("norm", encoder.final_norm) | named("norm_pre", encoder.embedding_norm)
    table = "relative_position_bias_table"
    if encoder.shared_relative is not None:
        weights[f"rel_pos_bias.{table}"] = relative_table(encoder.shared_relative, size)
    for i, layer in enumerate(encoder.layers):
        block = block_weights(layer)
        if len(encoder.relative):
            block[f"attn.{table}"] = relative_table(encoder.relative[i], size)
        weights |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return weights


def relative_table(bias: Any, grid: tuple[int, int]) -> Tensor:
    """BEiT's table, the biases of the class token in the last three rows, for the patches of `grid`."""
    old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (bias.base, grid))
    table = bias.table if old == new else resize_table(bias.table, old, new)
    return torch.cat([table, bias.prefix]).detach()


def block_weights(layer: Any) -> dict[str, Tensor]:
    """A block under all the names that timm's classes and transformers' have for its parts."""
    block = named("norm1", layer.norm1) | named("norm2", layer.norm2)
    block |= named("attn.qkv", layer.attention.qkv) | named("attn.proj", layer.attention.proj)
    for part, value in layer.attention.qkv.state_dict().items():
        for name, chunk in zip("qkv", value.chunk(3)):
            block[f"attn.{name}.{part}"] = chunk
            if part == "bias":
                block[f"attn.{name}_bias"] = chunk
    block |= named("attn.q_norm", layer.attention.q_norm) | named("attn.k_norm", layer.attention.k_norm)
    for i in (1, 2):
        scale = getattr(getattr(layer, f"scale{i}"), "scale", None)
        if scale is not None:
            block |= {f"ls{i}.gamma": scale.detach(), f"gamma_{i}": scale.detach()}
    for first, second in (("fc1", "fc2"), ("w12", "w3"), ("up_proj", "down_proj")):
        block |= named(f"mlp.{first}", layer.mlp.fc1) | named(f"mlp.{second}", layer.mlp.fc2)
    if layer.mlp.gated:
        for part, value in layer.mlp.fc1.state_dict().items():
            block[f"mlp.gate_proj.{part}"], block[f"mlp.up_proj.{part}"] = value.chunk(2)
    return block


def convnet_weights(model: MIMModel) -> dict[str, Tensor]:
    """The weights of our encoder `convnet`, a ConvNeXt, under timm's names."""
    encoder: Any = model.encoder
    state: dict[str, Tensor] = {
        timm_name("convnext", name): value for name, value in encoder.network.state_dict().items()
    }
    return state | named("head.norm", encoder.final_norm)


def tokens_of(network: Any, images: Tensor, **options) -> Tensor:
    """The tokens of a model of transformers as our encoders give them: behind the last norm, also where the class norms
    what it has pooled alone (CLIP), and without a mean among them (DINOv3's ConvNeXt)."""
    norm: Any = getattr(network, "post_layernorm", None)
    seen: list[int] = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].ndim)) if norm else None
    tokens = network(images, **options).last_hidden_state
    if hook is not None:
        hook.remove()
    if network.config.model_type == "dinov3_convnext":
        return tokens[:, 1:]
    return norm(tokens) if norm is not None and 3 not in seen else tokens
