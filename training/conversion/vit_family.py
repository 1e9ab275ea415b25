"""Vision transformers of other projects as our encoder `vit`.

All are renamed to one set of names first, that of timm, which official files of MAE, SimMIM, BEiT, DTM and DINO use
nearly unchanged; then one function per part reads them.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.modeling.layers import sincos_2d
from hf_mim.modeling.options import Size, pair

from .reading import Weights


Grid = tuple[int, int]
# Heads are not written into weights. They are 64 channels wide in all published ViTs except these.
HEADS_OF_WIDTH = {1280: 16, 1152: 16, 1408: 16, 1664: 16}

# Names of transformers' models (in memory and, for some, as they are saved) under timm's.
FROM_TRANSFORMERS = (
    (r"^(vit|model)\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
    (r"^embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^decoder_layers\.", "decoder_blocks."),
    (r"^(encoder\.layer|layers|layer)\.", "blocks."),
    (r"^(shared_position_bias|encoder\.relative_position_bias)\.", "rel_pos_bias."),
    (r"\.(attention\.attention\.)?relative_position_bias\.relative", ".attn.relative"),
    (r"\.attention(\.attention)?\.(q|k|v)_proj\.", r".attn.\2."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
# mmcv's names, which OpenMixup and its A2MIM use.
FROM_OPENMIXUP = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
PLAIN = ((r"^(encoder|backbone)\.", ""), (r"^register_tokens$", "reg_token"))


def renamer(table):
    """A function from a name to what the rules make of it, one after the other."""

    def rename(name: str) -> str:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def vit_encoder(
    weights: Weights, heads: int | None, image_size, eps: float, fixed: str | None = None
) -> tuple[dict, dict, list[str]]:
    """-> the fields of a `MIMConfig`, the encoder's weights under our names, and notes. What is taken of `weights` is
    everything that the encoder computes with. `fixed` is the kind of positions that are computed and not in a file.

    Raises:
        ValueError: weights are missing, or the size of the images cannot be told.
    """
    patch_weight = weights.take("patch_embed.proj.weight")
    dim, channels, *patch = patch_weight.shape
    depth = weights.count(r"blocks\.(\d+)\.")
    relative, names, sizes = relative_tables(weights, depth)
    heads, notes = heads_of(dim, heads, relative)
    bias = weights.maybe("patch_embed.proj.bias")
    state = {
        "patch_embedding.weight": patch_weight.permute(0, 2, 3, 1).flatten(1),
        "patch_embedding.bias": patch_weight.new_zeros(dim) if bias is None else bias,
    }
    options: dict[str, Any] = {"patch_size": patch if patch[0] != patch[1] else patch[0], "hidden_size": dim}
    options |= {"num_hidden_layers": depth, "num_attention_heads": heads, "layer_norm_eps": eps}
    grid = next(iter(sizes), None) if image_size is None else patch_grid(image_size, patch)
    prefix, positions, grid, kinds = token_positions(weights, grid, computed=bool(names or fixed))
    state |= prefix_state(prefix, weights, options)
    if positions is not None:
        state["learned_positions.table"] = positions
    state |= relative
    kinds = kinds + names + ([fixed] if fixed else [])
    options["position_embedding"] = kinds[0] if len(kinds) == 1 else kinds
    for i in range(depth):
        state |= {f"layers.{i}.{name}": value for name, value in block(weights, f"blocks.{i}", options).items()}
    if "norm_pre.weight" in weights:
        options["embedding_norm"] = True
        state |= linear(weights, "norm_pre", "embedding_norm")
    options["final_norm"] = "norm.weight" in weights
    if options["final_norm"]:
        state |= {"final_norm.weight": weights.take("norm.weight"), "final_norm.bias": weights.take("norm.bias")}
    size = [cells * step for cells, step in zip(grid, patch)]
    fields = {"image_size": size[0] if size[0] == size[1] else size, "num_channels": channels, "encoder": "vit"}
    return {**fields, "encoder_config": options}, state, notes


def patch_grid(image_size: Size, patch: Sequence[int]) -> Grid:
    """Rows and columns of the patches of an image."""
    height, width = pair(image_size)
    return height // patch[0], width // patch[1]


def heads_of(dim: int, heads: int | None, relative: dict[str, Tensor]) -> tuple[int, list[str]]:
    """-> the number of heads, as given, as the relative tables say, or as published models of this width have."""
    told = next((table.shape[1] for table in relative.values()), None)
    if heads is None and told is None:
        heads = HEADS_OF_WIDTH.get(dim, max(1, dim // 64))
        return heads, [f"{heads} attention heads are assumed, as usual at width {dim}: --heads says otherwise"]
    if heads is not None and told not in (None, heads):
        raise ValueError(f"the relative positions of the file are for {told} heads, not {heads}")
    return heads or told or 1, []


def relative_tables(weights: Weights, depth: int) -> tuple[dict[str, Tensor], list[str], list[Grid]]:
    """-> BEiT's tables under our names, the names of the position kinds, and the square grids they are for."""
    state: dict[str, Tensor] = {}
    names: list[str] = []
    sizes: list[Grid] = []
    table = "relative_position_bias_table"
    tables = {"shared_relative": weights.maybe(f"rel_pos_bias.{table}")}
    tables |= {f"relative.{i}": weights.maybe(f"blocks.{i}.attn.{table}") for i in range(depth)}
    weights.leave(r".*relative_position_index$", "computed from the size")
    for name, value in tables.items():
        if value is None:
            continue
        # BEiT keeps the biases of the class token, to patches, from patches, to itself, in the last three rows.
        state |= {f"{name}.table": value[:-3], f"{name}.prefix": value[-3:]}
        side = math.isqrt(len(value) - 3)
        sizes += [((side + 1) // 2, (side + 1) // 2)] if side**2 == len(value) - 3 else []
        kind = name.split(".")[0]
        names += [kind] if kind not in names else []
    return state, names, sizes


def token_positions(weights: Weights, grid: Grid | None, computed: bool):
    """-> the tokens without a patch (count, dim) with their positions in them, the patches' learned positions
    (rows * cols, dim) or None, the grid, and the kinds of positions by name."""
    stored = [weights.maybe(name) for name in ("cls_token", "dist_token", "reg_token")]
    tokens = [token.reshape(-1, token.shape[-1]) for token in stored if token is not None]
    num_cls = 0 if stored[0] is None else len(tokens[0])
    prefix = torch.cat(tokens) if tokens else None
    table = weights.maybe("pos_embed")
    if table is None:
        if not computed:
            raise ValueError("the file has no positions: rotary ones, which are not in a file, cannot be converted")
        if grid is None:
            raise ValueError("the file does not say the size of its images: --image-size HEIGHTxWIDTH does")
        return (prefix, num_cls), None, grid, []
    table = table.flatten(0, -2) if table.ndim == 3 else table
    count = 0 if prefix is None else len(prefix)
    for before in dict.fromkeys([count, min(1, count), 0]):
        side = math.isqrt(len(table) - before)
        if (math.prod(grid) if grid else side**2) == len(table) - before:
            break
    else:
        raise ValueError(
            f"the file has {len(table)} positions, which are not those of "
            + (f"{grid[0]}x{grid[1]} patches" if grid else "a square image: --image-size HEIGHTxWIDTH says which")
        )
    grid = grid or (side, side)
    if before and prefix is not None:
        prefix = prefix + F.pad(table[:before], (0, 0, 0, count - before))
    table = table[before:]
    fixed = table.shape[1] % 4 == 0 and torch.allclose(table, sincos_2d(grid, grid, table.shape[1]), atol=1e-5)
    return (prefix, num_cls), None if fixed else table, grid, ["sincos" if fixed else "learned"]


def prefix_state(prefix, weights: Weights, options: dict) -> dict[str, Tensor]:
    tokens, num_cls = prefix
    options["use_cls_token"] = num_cls > 0
    if tokens is None:
        return {}
    if num_cls > 1:
        options["num_cls_tokens"] = num_cls
    if len(tokens) > num_cls:
        options["num_register_tokens"] = len(tokens) - num_cls
    return {"prefix_tokens": tokens}


def block(weights: Weights, name: str, options: dict) -> dict[str, Tensor]:
    """A block under our names; `options` get what it says about the architecture."""
    state: dict[str, Tensor] = {}
    for norm in ("norm1", "norm2"):
        state |= linear(weights, f"{name}.{norm}", norm)
    weight = weights.maybe(f"{name}.attn.qkv.weight")
    parts = [weights.take(f"{name}.attn.{part}.weight") for part in "qkv"] if weight is None else weight.chunk(3)
    state["attention.qkv.weight"] = torch.cat(list(parts))
    state["attention.qkv.bias"] = qkv_bias(weights, f"{name}.attn", parts[0])
    state |= linear(weights, f"{name}.attn.proj", "attention.proj")
    for norm in ("q_norm", "k_norm"):
        if f"{name}.attn.{norm}.weight" in weights:
            options["qk_norm"] = True
            state |= linear(weights, f"{name}.attn.{norm}", f"attention.{norm}")
    for i in (1, 2):
        scale = weights.maybe(f"{name}.gamma_{i}")
        scale = weights.maybe(f"{name}.ls{i}.gamma") if scale is None else scale
        if scale is not None:
            options["layer_scale_init_value"] = 0.1  # where a new model would start
            state[f"scale{i}.scale"] = scale
    return state | mlp(weights, f"{name}.mlp", options)


def qkv_bias(weights: Weights, name: str, like: Tensor) -> Tensor:
    """(3 * dim,): a part without a bias has one of zeros here. BEiT's keys have none."""
    whole = weights.maybe(f"{name}.qkv.bias")
    if whole is not None:
        return whole
    parts = [weights.maybe(f"{name}.{part}.bias") for part in "qkv"]
    parts = [weights.maybe(f"{name}.{part}_bias") if bias is None else bias for part, bias in zip("qkv", parts)]
    return torch.cat([torch.zeros(len(like)) if bias is None else bias for bias in parts])


def mlp(weights: Weights, name: str, options: dict) -> dict[str, Tensor]:
    """The two layers, or the three of SwiGLU, the first two of them in one."""
    state: dict[str, Tensor] = {}
    if f"{name}.gate_proj.weight" in weights:
        gates = [linear(weights, f"{name}.{part}", "") for part in ("gate_proj", "up_proj")]
        state = {f"mlp.fc1{key}": torch.cat([gate[key] for gate in gates]) for key in gates[0]}
        state |= linear(weights, f"{name}.down_proj", "mlp.fc2")
    else:
        names = (("w12", "w3"), ("up_proj", "down_proj"), ("fc1", "fc2"))
        first, second = next((pair for pair in names if f"{name}.{pair[0]}.weight" in weights), names[-1])
        state |= linear(weights, f"{name}.{first}", "mlp.fc1") | linear(weights, f"{name}.{second}", "mlp.fc2")
    options["intermediate_size"] = state["mlp.fc2.weight"].shape[1]
    if len(state["mlp.fc1.weight"]) == 2 * options["intermediate_size"]:
        options["mlp"] = "swiglu"
    return state


def linear(weights: Weights, name: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{suffix}": weights.take(f"{name}.{suffix}") for suffix in ("weight", "bias")}


def mae_decoder(weights: Weights, fields: dict, heads: int | None, eps: float) -> tuple[dict, dict[str, Tensor]]:
    """-> the fields of a `MIMConfig` for MAE's decoder, and its weights under our names.

    Raises:
        ValueError: its positions are not the fixed ones that our decoder has.
    """
    table = weights.take("decoder_pos_embed").flatten(0, -2)
    dim, patch = table.shape[1], pair(fields["encoder_config"]["patch_size"])
    grid = patch_grid(fields["image_size"], patch)
    count = len(table) - math.prod(grid)  # class tokens: several in Pixio's
    is_fixed = count > 0 and torch.allclose(table[count:], sincos_2d(grid, grid, dim), atol=1e-5)
    if not is_fixed or table[:count].any():
        raise ValueError("the decoder's positions are not MAE's fixed ones")
    encoder = fields["encoder_config"]
    prefix = encoder.get("num_cls_tokens", int(encoder["use_cls_token"])) + encoder.get("num_register_tokens", 0)
    if count != prefix:
        raise ValueError(
            f"the decoder has places for {count} tokens without a patch, and the encoder {prefix} such tokens"
        )
    options: dict[str, Any] = {}
    depth = weights.count(r"decoder_blocks\.(\d+)\.")
    state = {"decoder.mask_token": weights.take("mask_token").flatten()}
    state |= linear(weights, "decoder_embed", "decoder.embed.linear")
    state |= linear(weights, "decoder_norm", "decoder.norm") | linear(weights, "decoder_pred", "decoder.head")
    for i in range(depth):
        layer = block(weights, f"decoder_blocks.{i}", options)
        state |= {f"decoder.layers.{i}.{name}": value for name, value in layer.items()}
    # 16 heads in all of the official models, whose decoders are 512 wide.
    decoder: dict[str, Any] = {
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads or max(1, dim // 32),
    }
    decoder |= {"intermediate_size": options["intermediate_size"], "layer_norm_eps": eps}
    return {"decoder": "transformer", "decoder_config": decoder}, state


def pixel_head(weights: Weights, name: str, channels: int, factor: Grid, cell: Grid) -> dict[str, Tensor]:
    """SimMIM's head, a 1x1 convolution before a pixel shuffle: its channel, row, column become row, column, channel,
    inside each of the `factor` cells that a token of a coarse map makes."""
    state, inside = {}, (channels, factor[0], cell[0], factor[1], cell[1])
    for suffix in ("weight", "bias"):
        value = weights.take(f"{name}.{suffix}").unflatten(0, inside).movedim((1, 3), (0, 1)).movedim(2, 4)
        value = value.flatten(0, 4)
        state[f"decoder.head.linear.{suffix}"] = value.flatten(1) if suffix == "weight" else value
    return state
