"""A checkpoint's encoder as a model of timm: its weights, and the arguments to build it with."""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mim.modeling.encoder_timm import run_timm, timm_errors
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair
from hf_mim.training.conversion.convnets import timm_name

from .counterparts import check_same, named, patch_convolution, position_table, refuse
from .to_origin import origin_of, timm_model


def to_timm(model: MIMModel, out: Path) -> list[str]:
    """Writes `model.safetensors` and the `config.json` that timm's own `local-dir:` reads.

    Raises:
        ValueError: timm has no counterpart; the message says of what.
    """
    architecture, options, state = describe(model)
    with timm_errors(f"timm cannot make its {architecture} whole"):
        network: Any = timm.create_model(architecture, **options).eval()
    state, new = fill(network, state)
    way, line = compare(model, network, architecture)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors")
    height, width = pair(model.config.image_size)
    saved = {"mean": model.config.image_mean, "std": model.config.image_std, "num_classes": 0}
    saved["input_size"] = [model.config.num_channels, height, width]
    # Which layer is the classifier: without that, timm refuses to load the weights under another number of classes.
    saved |= {key: network.pretrained_cfg[key] for key in ("first_conv", "classifier") if key in network.pretrained_cfg}
    described = {"architecture": architecture, "num_classes": 0, "model_args": options, "pretrained_cfg": saved}
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    lines = [f'timm.create_model("local-dir:{out}", pretrained=True)', f"{way}: {line}"]
    if new:
        lines.append(f"{', '.join(new)}: not part of the encoder, with new random weights, for fine-tuning to train")
    return lines


def describe(model: MIMModel) -> tuple[str, dict, dict[str, Tensor]]:
    """-> an architecture's name, the arguments that make it this encoder, and the weights."""
    origin, kind = origin_of(model, "timm"), model.config.encoder
    if kind == "timm":
        return timm_whole(model)
    if kind != "vit":
        return timm_convnet(model)
    return timm_vit(model) if origin is None else timm_model(model, origin)


def fill(network: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Loads the weights of an encoder. -> the weights of the whole network, and its modules that keep their new ones.

    Args:
        state: names may have `_` for a point, as timm writes them where it cuts a network into stages.

    Raises:
        ValueError: a weight has no place in the network, or another shape.
    """
    places = {name.replace(".", "_"): name for name in network.state_dict()}
    state = {places.get(name.replace(".", "_"), name): value for name, value in state.items()}
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"this encoder does not fill timm's network: {str(error).splitlines()[1].strip()}") from None
    if unexpected:
        raise ValueError(f"this encoder has parts that timm's network has not: {', '.join(unexpected[:4])}")
    filled = {name[: i + 1] for name in state for i, letter in enumerate(name) if letter == "."}
    new = set()
    for name in missing:
        ends = [i + 1 for i, letter in enumerate(name) if letter == "."]
        new.add(next((name[: end - 1] for end in ends if name[:end] not in filled), name))
    return network.state_dict(), sorted(new)


def compare(model: MIMModel, network: Any, architecture: str) -> tuple[str, str]:
    """-> what of timm's network gives the encoder's features, and how near they are. Behind its last stage a network
    may have layers that belong to its classifier (EfficientNet), which `forward_features` runs too.

    Raises:
        ValueError: the outputs differ.
    """
    what, way = f"timm's {architecture}", "the last of forward_intermediates, as NCHW"
    maps = partial(run_timm, network)
    if model.config.encoder == "timm":
        way = f"{way}, with norm=True where it takes that"
    elif hasattr(network, "forward_intermediates"):
        maps = partial(network.forward_intermediates, output_fmt="NCHW", intermediates_only=True)
    try:
        return "forward_features", check_same(model, network.forward_features, what)
    except ValueError:
        if model.config.encoder == "vit" or not hasattr(network, "forward_intermediates"):
            raise
    return way, check_same(model, lambda images: maps(images)[-1], what)


def timm_whole(model: MIMModel) -> tuple[str, dict, dict[str, Tensor]]:
    """Of encoder `timm`. Results as of `describe`."""
    options, encoder = model.config.options("encoder"), cast(Any, model.encoder)
    name = options.pop("model_name", "vit_tiny_patch16_224")
    options.pop("pixel_fill", None)
    options |= {"in_chans": model.config.num_channels, "num_classes": 0}
    sized = {**options, "img_size": list(pair(model.config.image_size))}
    try:
        with torch.device("meta"):
            timm.create_model(name, **sized)
    except TypeError:  # it does not depend on the size
        sized = options
    return name, sized, encoder.network.model.state_dict()


def vit_arguments(model: MIMModel) -> dict:
    """The arguments of timm's VisionTransformer."""
    encoder: Any = model.encoder
    first = encoder.layers[0]
    has_cls = encoder.has_cls_token
    scaled_by = getattr(first.scale1, "value", None)
    return {
        "img_size": list(pair(model.config.image_size)),
        "patch_size": list(encoder.patch_size),
        "in_chans": model.config.num_channels,
        "embed_dim": encoder.hidden_size,
        "depth": len(encoder.layers),
        "num_heads": first.attention.num_heads,
        "mlp_ratio": first.mlp.fc2.in_features / encoder.hidden_size,
        "class_token": has_cls,
        "reg_tokens": encoder.num_prefix_tokens - has_cls,
        "no_embed_class": True,
        "qk_norm": first.attention.q_norm is not None,
        "init_values": scaled_by,
        "global_pool": "token" if has_cls else "avg",
        "fc_norm": False,
        "final_norm": not isinstance(encoder.final_norm, nn.Identity),
        "num_classes": 0,
    }


def timm_vit(model: MIMModel) -> tuple[str, dict, dict[str, Tensor]]:
    """-> an architecture's name, the arguments that make it this encoder, and the weights."""
    encoder: Any = model.encoder
    has_cls = encoder.has_cls_token
    impossible = ("relative", "rotary", "SwiGLU", "norms behind", "norm before")
    extra = [name for name in encoder.extra_parts() if name.startswith(impossible)]
    refuse(extra, "timm's VisionTransformer")
    options = vit_arguments(model)
    state = {
        "pos_embed": position_table(model)[None],
        "patch_embed.proj.weight": patch_convolution(model),
        "patch_embed.proj.bias": encoder.patch_embedding.bias.detach(),
        **named("norm", encoder.final_norm),
    }
    if has_cls:
        state["cls_token"] = encoder.prefix_tokens.detach()[None, :1]
    if options["reg_tokens"]:
        state["reg_token"] = encoder.prefix_tokens.detach()[None, int(has_cls) :]
    ours = {"attention.": "attn.", "scale1.scale": "ls1.gamma", "scale2.scale": "ls2.gamma"}
    for i, layer in enumerate(encoder.layers):
        for name, value in layer.state_dict().items():
            for own, theirs in ours.items():
                name = name.replace(own, theirs)
            state[f"blocks.{i}.{name}"] = value
    return "vit_base_patch16_224", options, state


def timm_convnet(model: MIMModel) -> tuple[str, dict, dict[str, Tensor]]:
    options, encoder = model.config.options("encoder"), cast(Any, model.encoder)
    kind = options.get("model_type", "resnet")
    channels = {"in_chans": model.config.num_channels, "num_classes": 0}
    if kind == "timm":
        state = {name.split(".", 2)[2]: value for name, value in encoder.network.state_dict().items()}
        own = {k: v for k, v in options.items() if k not in ("model_type", "model_name") and "mask" not in k}
        for ours in ("pixel_fill", "final_norm"):
            own.pop(ours, None)
        return options.get("model_name", "resnet18"), {**own, **channels}, state
    network = encoder.network.config
    state = {timm_name(kind, name): value for name, value in encoder.network.state_dict().items()}
    if kind == "resnet":
        widths, basic = network.hidden_sizes, network.layer_type == "basic"
        sizes = {"layers": network.depths, "channels": [width if basic else width // 4 for width in widths]}
        return "resnet18" if basic else "resnet50", {**sizes, **channels}, state
    if len(network.depths) != 4:
        raise ValueError(f"timm's ConvNeXts have four stages, and this encoder {len(network.depths)}")
    state = {name: value.flatten() if ".grn." in name else value for name, value in state.items()}
    first = options.get("final_norm", False)  # timm has both orders of norm and pooling
    state |= named("norm_pre", model.encoder.final_norm) if first else named("head.norm", model.pooled_norm)
    sizes = {"depths": network.depths, "dims": network.hidden_sizes, "patch_size": network.patch_size}
    scale = getattr(network, "layer_scale_init_value", 0) or None
    sizes |= {"head_norm_first": first, "ls_init_value": scale if kind == "convnext" else None}
    return f"{kind}_tiny", {**sizes, **channels}, state
