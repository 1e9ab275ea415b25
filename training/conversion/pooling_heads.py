"""The classifiers of Beyond [cls] (2412.03215): AbMILP, a batch norm without parameters, one linear layer."""

import re
from typing import Any

import torch
from torch import Tensor

from hf_mim.modeling.layers import sincos_2d
from hf_mim.modeling.options import pair

from .reading import Weights
from .vit_family import patch_grid


EPS = 1e-6  # of the batch norm, as in the linear probe of MAE from which the release starts


def abmilp_classifier(weights: Weights, fields: dict, arguments: dict) -> tuple[dict, dict[str, Tensor]]:
    """-> the fields of a `MIMConfig` and the weights of `MIMForImageClassification` without its encoder. Takes the
    head from `weights`, all or nothing.

    Args:
        weights: with the encoder's taken already; the head's parts may be numbered in any way.
        fields: of the encoder.
        arguments: of the command that trained it, which say what weights do not.

    Raises:
        ValueError: the head cannot be told from this file; the message says what is missing.
    """
    names = list(weights.tensors)
    prefix = next(name.split("attention_predictor.")[0] for name in names if "attention_predictor." in name)
    outside = [name for name in names if name.startswith("head.") and not name.startswith(prefix)]
    linear = next((name.removesuffix(".weight") for name in outside if name.endswith(".weight")), None)
    norm = next((name.removesuffix(".running_mean") for name in outside if name.endswith(".running_mean")), None)
    if linear is None:
        raise ValueError("the file has no classifier behind its pooling head")
    options, layers = abmilp_options(weights, prefix, fields, arguments)
    sources = {"pooler.score": f"{layers[-1]}.weight", "pooler.score_bias": f"{layers[-1]}.bias"}
    for i, layer in enumerate(layers[:-1]):
        sources |= {f"pooler.hidden.{i}.{part}": f"{layer}.{part}" for part in ("weight", "bias")}
    if "self_attention" in options:
        parts = ("qkv.weight", "proj.weight", "proj.bias")
        sources |= {f"pooler.{part}": f"{prefix}self_attn.{part}" for part in parts}
    sources |= {f"classifier.{part}": f"{linear}.{part}" for part in ("weight", "bias")}
    statistics = [f"{norm}.{name}" for name in ("running_mean", "running_var") if norm]
    missing = [name for name in (*sources.values(), *statistics) if name not in weights]
    if missing:
        raise ValueError(f"the file lacks {', '.join(missing[:3])} of its pooling head")
    state = {ours: weights.take(theirs) for ours, theirs in sources.items()}
    classifier = state["classifier.weight"], state["classifier.bias"]
    if norm is not None:
        classifier = folded(*classifier, *(weights.take(name) for name in statistics))
        weights.leave(rf"{re.escape(norm)}\.num_batches_tracked$", "a counter of the training")
    weights.leave(rf"{re.escape(prefix)}pos_embed$", "computed from the size, or not read by this head")
    state |= dict(zip(("classifier.weight", "classifier.bias"), classifier))
    return {"pooler": "abmilp", "pooler_config": options, "num_labels": len(classifier[0])}, state


def abmilp_options(weights: Weights, prefix: str, fields: dict, arguments: dict) -> tuple[dict, list[str]]:
    """-> the options of our pooler and the names of its linear layers, the score last. The release pools the tokens
    before the last norm.

    Raises:
        ValueError: neither the weights nor the arguments say one of them.
    """
    matches = (
        re.fullmatch(rf"({re.escape(prefix)}attention_predictor\.(\d+))\.weight", name) for name in weights.tensors
    )
    layers = [match[1] for match in sorted(filter(None, matches), key=lambda match: int(match[2]))]
    options: dict[str, Any] = {"apply_final_norm": False, "depth": len(layers)}
    if len(layers) > 1:
        options["activation"] = told(arguments, "abmilp_act", ("tanh", "relu"))
    if f"{prefix}self_attn.qkv.weight" in weights:
        options["self_attention"] = told(arguments, "abmilp_sa", ("map", "both"))
    if arguments.get("abmilp_cond") == "pe":
        options["position"] = "sincos"
    table = weights.tensors.get(f"{prefix}pos_embed")
    patch = pair(fields["encoder_config"]["patch_size"])
    grid = patch_grid(fields["image_size"], patch)
    if table is not None:
        table = table.flatten(0, -2)
        if len(table) > grid[0] * grid[1]:
            options["content"] = "all"
        fixed = table[len(table) - grid[0] * grid[1] :]
        if "position" in options and not torch.allclose(fixed, sincos_2d(grid, grid, fixed.shape[1]), atol=1e-5):
            raise ValueError("the positions of its pooling head are not the fixed ones")
    elif arguments.get("abmilp_content") in (None, "all"):
        options["content"] = told(arguments, "abmilp_content", ("patch", "all"))
    if options.get("content") == "all" and not fields["encoder_config"]["use_cls_token"]:
        raise ValueError("its pooling head weighs a class token of zeros, which the encoder does not have")
    return options, layers


def told(arguments: dict, name: str, choices: tuple[str, ...]) -> str:
    """Raises:
    ValueError: the arguments do not say it.
    """
    if arguments.get(name) not in choices:
        raise ValueError(f"the file does not say --{name} ({' or '.join(choices)}) of its pooling head")
    return arguments[name]


def folded(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer (classes, dim) that does in evaluation what a batch norm without parameters and it did: exact, up
    to rounding."""
    weight, bias, mean, variance = (value.to(weight.device).double() for value in (weight, bias, mean, variance))
    weight = weight / (variance + EPS).sqrt()
    return weight.float(), (bias - weight @ mean).float()
