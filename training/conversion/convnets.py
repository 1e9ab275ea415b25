"""ConvNets of other projects as our encoder `convnet`, and its names under theirs.

Plain ResNets and ConvNeXts become the models of transformers; any other ConvNet of timm keeps timm's own code.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.native_models import native_config, native_model

from .reading import Weights


# Names of the official ConvNeXt (SparK's too) and of mmcls (OpenMixup's, A2MIM's) under timm's.
FROM_OFFICIAL = (
    (r"^(sparse_encoder\.sp_cnn|backbone|encoder)\.", ""),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.(dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"\.(?:pwconv|pointwise_conv)(\d)\.", r".mlp.fc\1."),
    (r"\.(?:ln|linear)\.(weight|bias)$", r".\1"),  # of FCMAE's sparse layers
    (r"\.kernel$", ".weight"),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm3?\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
# Names of transformers' ConvNeXt under timm's.
CONVNEXT = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
)
# Names of DINOv3's ConvNeXt in transformers under timm's.
FROM_DINOV3 = (
    (r"^model\.stages\.0\.downsample_layers\.", "stem."),
    (r"^model\.stages\.(\d+)\.downsample_layers\.", r"stages.\1.downsample."),
    (r"^model\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv(\d)\.", r".mlp.fc\1."),
    (r"^layer_norm\.", "head.norm."),
)
NEW_POOLED_NORM = "no norm after pooling in the file: a new one"
PARTS = ("stem.", "stages.", "conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")  # what an encoder computes


def timm_name(model_type: str, name: str) -> str:
    """The name that timm gives to a weight of transformers' `resnet`, `convnext` or `convnextv2`."""
    if model_type == "resnet":
        return resnet_name(name)
    for pattern, replacement in CONVNEXT:
        name = re.sub(pattern, replacement, name)
    return name


def resnet_name(name: str) -> str:
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    place = re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name)
    if place is None:
        return name
    stage, block, rest = int(place[1]) + 1, place[2], place[3]
    rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    layer = re.match(r"layer\.(\d+)\.(convolution|normalization)\.(.*)", rest)
    if layer is not None:
        kind = "conv" if layer[2] == "convolution" else "bn"
        rest = f"{kind}{int(layer[1]) + 1}.{layer[3]}"
    return f"layer{stage}.{block}.{rest}"


def native_convnet(weights: Weights, model_type: str, options: dict, channels: int, image_size) -> tuple[dict, dict]:
    """-> the fields of a `MIMConfig`, and the weights under our names, from `weights` under timm's.

    Raises:
        ValueError: they are not those of this architecture.
    """
    fields: dict[str, Any] = {"image_size": image_size or 224, "num_channels": channels, "encoder": "convnet"}
    fields["encoder_config"] = {"model_type": model_type, **options}
    config = MIMConfig(**fields)
    with torch.device("meta"):
        network = native_model(config, native_config(config, model_type, options))
    state = {}
    for name, target in network.state_dict().items():
        theirs = timm_name(model_type, name)
        if name.startswith("layernorm."):  # it acts after pooling
            continue
        if name.endswith("num_batches_tracked") and theirs not in weights:
            state[f"encoder.network.{name}"] = torch.zeros((), dtype=torch.long)
            continue
        value = weights.take(theirs)
        if value.numel() != target.numel():
            raise ValueError(
                f"{theirs} is {tuple(value.shape)}, which no plain {model_type} has. For another ConvNet of timm say "
                "which: --timm-name NAME"
            )
        state[f"encoder.network.{name}"] = value.reshape(target.shape)
    return fields, state


def resnet(weights: Weights, image_size) -> tuple[dict, dict[str, Tensor], list[str]]:
    """A ResNet with the names of torchvision, timm and mmcls."""
    depths = [weights.count(rf"layer{i}\.(\d+)\.") for i in range(1, 5)]
    stem = weights.tensors["conv1.weight"]
    bottleneck = "layer1.0.conv3.weight" in weights
    last = "conv3" if bottleneck else "conv2"
    if 0 in depths or f"layer1.0.{last}.weight" not in weights or stem.shape[2:] != (7, 7):
        raise ValueError("this is no plain ResNet. For another ConvNet of timm say which: --timm-name NAME")
    widths = [len(weights.tensors[f"layer{i}.0.{last}.weight"]) for i in range(1, 5)]
    options = {"embedding_size": len(stem), "hidden_sizes": widths, "depths": depths}
    options["layer_type"] = "bottleneck" if bottleneck else "basic"
    return *native_convnet(weights, "resnet", options, stem.shape[1], image_size), []


def convnext(weights: Weights, image_size) -> tuple[dict, dict[str, Tensor], list[str]]:
    """A ConvNeXt or ConvNeXt V2 under timm's names."""
    depths = [weights.count(rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(weights.count(r"stages\.(\d+)\."))]
    stem = weights.tensors["stem.0.weight"]
    widths = [len(weights.tensors[f"stages.{i}.blocks.0.conv_dw.weight"]) for i in range(len(depths))]
    second = "stages.0.blocks.0.mlp.grn.weight" in weights
    options = {"hidden_sizes": widths, "depths": depths, "num_stages": len(depths), "patch_size": stem.shape[2]}
    options["layer_norm_eps"] = 1e-6
    if not second:
        options["layer_scale_init_value"] = 1e-6 if "stages.0.blocks.0.gamma" in weights else 0
    kind = "convnextv2" if second else "convnext"
    fields, state = native_convnet(weights, kind, options, stem.shape[1], image_size)
    notes = []
    if "head.norm.weight" in weights:
        state |= {f"pooled_norm.{suffix}": weights.take(f"head.norm.{suffix}") for suffix in ("weight", "bias")}
    else:
        dim = widths[-1]
        state |= {"pooled_norm.weight": torch.ones(dim), "pooled_norm.bias": torch.zeros(dim)}
        notes.append(NEW_POOLED_NORM)
    return fields, state, notes


def timm_convnet(weights: Weights, name: str, image_size) -> tuple[dict, dict[str, Tensor], list[str]]:
    """Any ConvNet of timm, by timm's own code and its `name`.

    Raises:
        ValueError: timm has none of this name, or the weights are another's.
    """
    import timm  # slow to import, and not everybody has it

    known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    first = getattr(known, "first_conv", None)
    first = f"{first[0] if isinstance(first, tuple) else first}.weight"
    channels = weights.tensors[first].shape[1] if first in weights else 3
    fields: dict[str, Any] = {"image_size": image_size or 224, "num_channels": channels, "encoder": "convnet"}
    fields["encoder_config"] = {"model_type": "timm", "model_name": name}
    with torch.device("meta"):
        encoder: Any = MIMModel(MIMConfig(**fields)).encoder
    state = {}
    for own, like in encoder.network.state_dict().items():
        _, _, theirs = own.split(".", 2)  # parts.<number>.<name>, where timm writes stages.0 as stages_0
        flat, *rest = theirs.split(".", 1)
        theirs = theirs if theirs in weights else ".".join([re.sub(r"_(\d+)$", r".\1", flat), *rest])
        value = weights.take(theirs)
        if value.shape != like.shape:
            raise ValueError(f"{theirs} is {tuple(value.shape)}, and timm's {name} has {tuple(like.shape)}")
        state[f"encoder.network.{own}"] = value
    return fields, state, []


def dense_kernels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sparse layers of FCMAE's encoder (Minkowski's) in the shapes of dense ones. Their kernels are (places,
    inputs, outputs), or (places, channels) where depthwise, and count places column by column."""
    dense = {}
    for name, value in tensors.items():
        if name.endswith(".kernel"):
            square = value.unflatten(0, (math.isqrt(len(value)), -1)).transpose(0, 1)
            value = (square[:, :, None] if value.ndim == 2 else square).permute(3, 2, 0, 1)
        elif re.search(r"(dwconv|downsample_layers\.\d\.1)\.bias$", name):
            value = value.flatten()
        dense[name] = value
    return dense


def mask_parts(weights: Weights, fields: dict, state: dict) -> bool:
    """Takes A2MIM's token, and the factor of what it is added to, where the stage it acts before can be told.
    -> whether it could."""
    token = weights.tensors.get("mask_token")
    if token is None:
        return False
    with torch.device("meta"):
        widths = MIMModel(MIMConfig(**fields)).encoder.num_features
    options = fields["encoder_config"]
    after = options["model_type"] == "convnext"  # A2MIM's acts behind the downsampling of a stage
    entering = widths[1:] if after else widths[:-1]
    if entering.count(token.numel()) != 1:
        return False
    options |= {"mask_style": "add", "mask_stage": entering.index(token.numel()), "mask_scale_init_value": None}
    options |= {"mask_after_downsampling": True, "mask_token_std": 0.0} if after else {}
    state["encoder.mask_token"] = weights.take("mask_token").flatten()
    scale = weights.maybe("mask_gamma")
    if scale is not None:
        options["mask_scale_init_value"] = 1e-6
        state["encoder.mask_scale"] = scale.flatten()
    return True
