"""Official files of data2vec 2.0 for images: a student with its decoder; the teacher lies beside it."""

import re

from torch import Tensor

from .reading import Weights


IMAGE = "modality_encoders.IMAGE."
# Its names under timm's; blocks are counted through, the first ones lie in a `context_encoder`.
NAMES = (
    (r"^local_encoder\.proj\.", "patch_embed.proj."),
    (r"^extra_tokens$", "cls_token"),
    (r"^fixed_positional_encoder\.positions$", "pos_embed"),
    (r"^context_encoder\.norm\.", "norm_pre."),
    (r"^context_encoder\.", ""),
)


def is_data2vec(names) -> bool:
    return f"{IMAGE}local_encoder.proj.weight" in names


def renamer(names):
    """A function from a name of the file to timm's."""
    inside = [re.match(rf"{re.escape(IMAGE)}context_encoder\.blocks\.(\d+)\.", name) for name in names]
    before = max((int(match[1]) + 1 for match in inside if match), default=0)

    def rename(name: str) -> str:
        if place := re.match(r"blocks\.(\d+)\.(.*)", name):
            return f"blocks.{int(place[1]) + before}.{place[2]}"
        name = name.removeprefix(IMAGE)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def data2vec_decoder(weights: Weights) -> tuple[dict, dict[str, Tensor]]:
    """-> the fields of a `MIMConfig` for its decoder, target and masks, and the decoder's weights under our names."""
    depth, state = weights.count(r"decoder\.blocks\.(\d+)\."), {}
    for i in range(depth):
        for part in ("weight", "bias"):
            state[f"decoder.layers.{i}.{part}"] = weights.take(f"decoder.blocks.{i}.0.{part}")
    state |= {f"decoder.head.{part}": weights.take(f"decoder.proj.{part}") for part in ("weight", "bias")}
    kernel = state["decoder.layers.0.weight"]
    dim = len(state["decoder.head.weight"])
    options = {"hidden_size": len(kernel), "num_hidden_layers": depth, "kernel_size": kernel.shape[2]}
    options["groups"] = dim // kernel.shape[1]
    fields = {"decoder": "conv", "decoder_config": options, "masking": "inverse_block", "masks_per_image": 16}
    return {**fields, "target": "moving_average", "target_config": {"global_weight": 2.56}}, state
