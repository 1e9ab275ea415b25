"""The whole of an official FCMAE file of ConvNeXt V2 (2301.00808), in and out: sparse encoder, decoder, mask token."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining

from .convnets import FROM_OFFICIAL, timm_name
from .reading import Weights


# timm's names under the official ones: of the sparse encoder, and of the dense decoder.
BLOCK = ((r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc(\d)\.", r".pwconv\1."))
GRN = ((r"\.mlp\.grn\.weight$", ".grn.gamma"), (r"\.mlp\.grn\.bias$", ".grn.beta"))
ENCODER = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.0\.", r"downsample_layers.\1.0.ln."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"(stages\.\d+\.\d+\.norm)\.", r"\1.ln."),
    *BLOCK,
    (r"\.pwconv(\d)\.", r".pwconv\1.linear."),
    (r"(downsample_layers\.[1-9]\d*\.1|dwconv)\.weight$", r"\1.kernel"),
    *GRN,
)
DECODER = ((r"^embed\.linear\.", "proj."), (r"^layers\.", "decoder."), (r"^head\.", "pred."), *BLOCK, *GRN)


def renamed(name: str, table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def official_name(name: str) -> str:
    """Of a weight of `MIMForPreTraining`."""
    if name.startswith("decoder."):
        return renamed(timm_name("convnextv2", name.removeprefix("decoder.")), DECODER)
    return f"encoder.{renamed(timm_name('convnextv2', name.removeprefix('mim.encoder.network.')), ENCODER)}"


def is_fcmae(names) -> bool:
    """Whether these are the names of a file of pretraining, with its decoder."""
    return {"proj.weight", "pred.weight", "mask_token", "encoder.downsample_layers.0.0.weight"} <= set(names)


def fcmae_decoder(weights: Weights, fields: dict) -> tuple[dict, dict[str, Tensor]]:
    """`fields` of a `MIMConfig` for the encoder -> those for decoder, target and masks, and the decoder's weights under
    our names.

    Raises:
        ValueError: weights are missing, or it predicts cells of another size than those that are hidden.
    """
    options: dict[str, Any] = {"hidden_size": len(weights.tensors["proj.weight"])}
    options["num_hidden_layers"] = weights.count(r"decoder\.(\d+)\.")
    added = {"decoder": "convnext", "decoder_config": options, "masking": "random", "masking_config": {"ratio": 0.6}}
    added |= {"target": "pixel", "target_config": {"normalize": True, "loss": "mse"}}
    with torch.device("meta"):
        decoder = MIMForPreTraining(MIMConfig(**{**fields, **added})).decoder
    state = {}
    for name, like in decoder.state_dict().items():
        official = official_name(f"decoder.{name}")
        value = weights.take(renamed(official, FROM_OFFICIAL))
        if value.numel() != like.numel():
            raise ValueError(f"{official} is {tuple(value.shape)}, and not made for cells of the last stage's stride")
        state[f"decoder.{name}"] = value.reshape(like.shape)
    return added, state


def sparse_layer(name: str, value: Tensor) -> Tensor:
    """A weight of the encoder in the shape of Minkowski's layers, which count the places of a kernel by column."""
    if name.endswith(".kernel"):
        kernel = value.permute(3, 2, 1, 0).flatten(0, 1)
        return kernel[:, 0] if ".dwconv." in name else kernel
    if re.search(r"dwconv\.bias|downsample_layers\.[1-9]\d*\.1\.bias|\.grn\.", name):
        return value.reshape(1, -1)
    return value


def fcmae_state(model: MIMForPreTraining) -> dict[str, Tensor]:
    """The weights under the names and in the shapes of the official program.

    Raises:
        ValueError: the model is not of the kind that this program trains.
    """
    config = model.config
    options: dict[str, Any] = config.options("encoder")
    if (
        options.get("model_type") != "convnextv2"
        or options.get("mask_style") != "sparse"
        or config.encoder != "convnet"
    ):
        raise ValueError("official files are written of FCMAE alone: encoder convnet, convnextv2, mask_style sparse")
    if config.decoder != "convnext":
        raise ValueError(f"FCMAE's decoder is 'convnext', and this checkpoint has {config.decoder!r}")
    if config.options("target").get("hog_weight"):
        raise ValueError("FCMAE predicts pixels alone, and this checkpoint has hog_weight, HOG beside them")
    state = {}
    for name, value in model.state_dict().items():
        official = official_name(name)
        if official.startswith("encoder."):
            value = sparse_layer(official, value)
        elif official in ("proj.weight", "pred.weight"):
            value = value[..., None, None]
        elif official == "mask_token":
            value = value.view(1, -1, 1, 1)
        state[official] = value.detach().contiguous()
    return state


def to_official(model: MIMForPreTraining, out: Path) -> list[str]:
    """Writes `fcmae.pth`, which the official programs load. Raises as `fcmae_state`."""
    state = fcmae_state(model)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, out / "fcmae.pth")
    return [f"{len(state)} weights under their official names in fcmae.pth, entry 'model'"]
