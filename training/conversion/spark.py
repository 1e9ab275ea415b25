"""The whole of an official SparK file: the sparse encoder is read elsewhere, its decoder here."""

import re

from torch import Tensor

from .reading import Weights


# A block of the released decoder under ours: transposed convolution, convolution, norm, ReLU6, convolution, norm.
BLOCK = {"up_sample": 0, "conv.0": 1, "conv.1": 2, "conv.3": 4, "conv.4": 5}


def spark_decoder(weights: Weights, ratio: float) -> tuple[dict, dict[str, Tensor]]:
    """-> the fields of a `MIMConfig` for SparK's decoder, target and masks, and the decoder's weights under our names.

    Raises:
        ValueError: weights are missing.
    """
    state = {}
    for name in list(weights.tensors):
        ours = decoder_name(name)
        if ours is not None:
            value = weights.take(name)
            state[f"decoder.{ours}"] = value.flatten() if name.startswith("mask_tokens.") else value
    norm = "none"
    if "decoder.inputs.0.norm.weight" in state:
        norm = "batch" if "decoder.inputs.0.norm.running_mean" in state else "layer"
    width = state["decoder.blocks.0.0.weight"].shape[0]
    fields = {"decoder": "spark", "decoder_config": {"hidden_size": width, "norm": norm}}
    fields |= {"masking": "random", "masking_config": {"ratio": ratio}}
    return {**fields, "target": "pixel", "target_config": {"normalize": True, "loss": "mse"}}, state


def decoder_name(name: str) -> str | None:
    """Our name, without `decoder.`, of a weight of SparK beside the encoder; None where there is none."""
    if part := re.match(r"dense_decoder\.dec\.(\d+)\.(up_sample|conv\.\d)\.(\w+)$", name):
        return f"blocks.{part[1]}.{BLOCK[part[2]]}.{part[3]}"
    if part := re.match(r"densify_(norm|proj)s\.(\d+)\.(\w+)$", name):
        return f"inputs.{part[2]}.{'norm' if part[1] == 'norm' else 'projection'}.{part[3]}"
    if part := re.match(r"mask_tokens\.(\d+)$", name):
        return f"inputs.{part[1]}.token"
    if name.startswith("dense_decoder.proj."):
        return name.replace("dense_decoder.proj", "head")
    return None
