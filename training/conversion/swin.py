"""Official Swin transformers (SimMIM's among them) as the model of transformers, which the encoder `native` wraps."""

import math
import re

import torch
from torch import Tensor

from hf_mim.modeling.options import pair

from .reading import Weights


# Their names under transformers'; queries, keys and values lie in one matrix there.
NAMES = (
    (r"^encoder\.", ""),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^(mask_token|absolute_pos_embed)$", r"embeddings.\1"),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"^norm\.", "layernorm."),
)


def is_swin(names) -> bool:
    return any(re.fullmatch(r"(encoder\.)?layers\.0\.blocks\.0\.attn\.qkv\.weight", name) for name in names)


def swin_encoder(weights: Weights, image_size, eps: float) -> tuple[dict, dict[str, Tensor], list[str]]:
    """-> the fields of a `MIMConfig`, the weights under our names, and notes.

    Raises:
        ValueError: weights are missing, or it is another variant.
    """
    if any("continuous_position" in name or "cpb_mlp" in name for name in weights.tensors):
        raise ValueError("Swin V2, whose positions are computed, is not known here: only the first Swin is")
    projection = weights.tensors["embeddings.patch_embeddings.projection.weight"]
    depths = [weights.count(rf"encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(layer_count(weights))]
    table = "encoder.layers.{}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    tables = [weights.tensors[table.format(i)] for i in range(len(depths))]
    window, dim = (math.isqrt(len(tables[0])) + 1) // 2, len(projection)
    options = {"model_type": "swin", "embed_dim": dim, "depths": depths, "num_heads": [t.shape[1] for t in tables]}
    options |= {"window_size": window, "patch_size": projection.shape[2], "layer_norm_eps": eps}
    options["mlp_ratio"] = len(weights.tensors["encoder.layers.0.blocks.0.mlp.fc1.weight"]) / dim
    notes: list[str] = []
    if image_size is None:
        image_size, notes = size_of_masks(weights, options)
    if "embeddings.absolute_pos_embed" in weights:
        raise ValueError("Swins with absolute positions are not known here")
    weights.leave(r".*(relative_position_index|attn_mask)$", "computed from the size")
    state = {}
    for name in list(weights.tensors):
        if name.startswith("layernorm."):
            state[f"encoder.final_{name.replace('layernorm', 'norm')}"] = weights.take(name)
        elif ".attention.qkv." in name:
            for part, value in zip("qkv", weights.take(name).chunk(3)):
                state[f"encoder.network.{name.replace('.qkv.', f'.{part}_proj.')}"] = value
        elif name.startswith(("embeddings.", "encoder.")) and name != "embeddings.mask_token":
            state[f"encoder.network.{name}"] = weights.take(name)
    fields = {"image_size": image_size, "num_channels": projection.shape[1], "encoder": "native"}
    return {**fields, "encoder_config": options}, state, notes


def layer_count(weights: Weights) -> int:
    return weights.count(r"encoder\.layers\.(\d+)\.")


def size_of_masks(weights: Weights, options: dict) -> tuple[int, list[str]]:
    """-> the size of the images, as the attention mask of the first shifted block has it, which is (windows, window^2,
    window^2); else 224."""
    mask = next((value for name, value in weights.tensors.items() if re.search(r"layers\.0\..*attn_mask$", name)), None)
    if mask is not None and math.isqrt(len(mask)) ** 2 == len(mask):
        return math.isqrt(len(mask)) * options["window_size"] * pair(options["patch_size"])[0], []
    return 224, ["the file does not say the size of its images: 224 assumed, --image-size says otherwise"]


def swin_mask_token(weights: Weights) -> dict[str, Tensor]:
    token: Tensor | None = weights.maybe("embeddings.mask_token")
    return {} if token is None else {"encoder.network.embeddings.mask_token": torch.clone(token)}
