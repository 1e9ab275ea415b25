"""Vision models of transformers for the encoders that wrap them: their configs, their weights, their parts."""

import inspect
import json
from typing import Any

from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from .configuration_base import MIMConfigBase
from .foreign import check_config, trusts_remote_code
from .loading import config_fields, file_of, load_whole
from .options import Grid, pair, shorten, unknown_choice


# What a saved model may lack: parts of its task, and positions that are computed.
NEW = ("pooler.", "mask_token", "classifier", "position_embeddings", "decoder_pos_embed")
# What a saved config holds beside the architecture, or what MIMConfig says.
NOT_OPTIONS = {
    *("image_size", "num_channels", "model_type", "architectures", "transformers_version", "dtype", "_name_or_path"),
    *("id2label", "label2id", "out_features", "out_indices", "stage_names", "auto_map"),
}


def native_config(
    config: MIMConfigBase, model_type: str, options: dict, use_mask_token: bool = False
) -> PreTrainedConfig:
    """The wrapped model's config; `MIMConfig` says channels, and the image size where `options` do not: the size that
    the positions of the wrapped model are those of.

    Raises:
        ValueError: the model type or an option is unknown.
    """
    check_config(options)
    if model_type not in CONFIG_MAPPING:
        raise unknown_choice("transformers model type", model_type, sorted(MODEL_FOR_IMAGE_MAPPING_NAMES))
    config_class = CONFIG_MAPPING[model_type]
    fields = {**config_class().to_dict(), **dict.fromkeys(config_class.__dataclass_fields__)}
    for option in options:
        if option not in fields and not option.startswith("_"):
            choices = sorted(name for name in fields if name not in PreTrainedConfig.__dataclass_fields__)
            raise unknown_choice(f"option of the transformers model {model_type!r}", option, choices)
    if "image_size" in fields and "image_size" not in options:
        height, width = pair(config.image_size)
        square = height == width and isinstance(config_class().image_size, int)
        options = {**options, "image_size": height if square else [height, width]}
    if "num_channels" in fields:
        options = {**options, "num_channels": config.num_channels}
    if "mask_ratio" in fields:  # ViTMAE hides patches by itself, in evaluation too
        options = {**options, "mask_ratio": 0.0}
    if "use_mask_token" in fields:
        options = {**options, "use_mask_token": use_mask_token}
    return config_class(**options)


def native_model(config: MIMConfigBase, native: PreTrainedConfig, use_mask_token: bool = False) -> PreTrainedModel:
    """The bare model of a native config, without its pooling layer, with the attention of `config` where it has it.

    Raises:
        ValueError: it has no bare model.
    """
    if type(native) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no bare model of type {native.model_type!r}")
    model_class: Any = MODEL_MAPPING[type(native)]
    supported = {"eager": True, "sdpa": model_class._supports_sdpa, "flex_attention": model_class._supports_flex_attn}
    if supported.get(config._attn_implementation, model_class._supports_flash_attn):
        native._attn_implementation = config._attn_implementation
    takes = inspect.signature(model_class).parameters
    options = {"add_pooling_layer": False, "use_mask_token": use_mask_token}
    return model_class(native, **{name: value for name, value in options.items() if name in takes})


def native_options(native: PreTrainedConfig) -> dict[str, Any]:
    """The model type of a config, and what it has other than by default, without what `MIMConfig` says."""
    defaults = type(native)().to_dict()
    changed = {name: value for name, value in native.to_dict().items() if defaults.get(name, ...) != value}
    options = {name: value for name, value in changed.items() if name not in NOT_OPTIONS}
    return {"model_type": native.model_type, **options}


def check_images(fields: dict, source: str) -> None:
    """Checks the fields of somebody's config before weights are loaded.

    Raises:
        ValueError: transformers does not know the model, it takes no images, or the config would run code.
    """
    check_config(fields)
    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING and "auto_map" in fields and trusts_remote_code():
        return  # its own code will say
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{source} holds a model of type {shorten(model_type)}, which transformers does not know")
    config = CONFIG_MAPPING[model_type]()
    if not any(hasattr(part, "num_channels") for part in (config, getattr(config, "vision_config", None))):
        raise ValueError(f"{source} is a {model_type!r} model, which takes no images: it has no vision tower")


def load_native(name_or_path: str) -> tuple[dict, dict[str, Tensor], list[str]]:
    """-> the fields of a `MIMConfig` that wraps this pretrained model, the weights of the model, and the names of those
    in its files that it does not use.

    Of a model of images and text (CLIP, SigLIP, AIMv2) it is the image half, and its weights bring the projection into
    the space of the text, `visual_projection.weight`, where there is one. Where an image processor is saved beside it,
    the normalisation is that processor's.
    """
    check_images(config_fields(name_or_path), name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusts_remote_code())
    network, info = load_whole(AutoModel, name_or_path, config, NEW)
    if config.model_type not in CONFIG_MAPPING:  # of code that the user trusts: what wraps it asks for it by this name
        AutoConfig.register(config.model_type, type(config))
        AutoModel.register(type(config), type(network))
    projection = getattr(network, "visual_projection", None)
    network = getattr(network, "vision_model", network)
    native = network.config
    fields: dict[str, Any] = {"encoder": "native", "encoder_config": native_options(native)}
    fields |= {name: getattr(native, name) for name in ("image_size", "num_channels") if hasattr(native, name)}
    fields |= native_statistics(name_or_path, native)
    state = network.state_dict()
    if projection is not None:
        state["visual_projection.weight"] = projection.weight.detach()
    return fields, state, sorted(info["unexpected_keys"])


def fill_native(network: nn.Module, state: dict[str, Tensor], prefix: str = "") -> None:
    """Loads those weights of `state` that are `network`'s, there named with `prefix`; a mask token may be missing.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    own = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    missing = [name for name in own if name not in state and "mask_token" not in name]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing[:5])}")
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)} in the checkpoint and {tuple(value.shape)} by the config"
            raise ValueError(f"weights and config do not fit: {name} is {shapes}")
    network.load_state_dict({name.removeprefix(prefix): state.get(name, value) for name, value in own.items()})


def normalisation(processor: dict[str, Any], num_channels: int) -> dict[str, list[float]]:
    """What the fields of an image processor say, as fields of a `MIMConfig`; {} where they say nothing."""
    if not processor.get("do_normalize", True):
        return {"image_mean": [0.0] * num_channels, "image_std": [1.0] * num_channels}
    return {name: [float(v) for v in processor[name]] for name in ("image_mean", "image_std") if processor.get(name)}


def native_statistics(name_or_path: str, native: PreTrainedConfig) -> dict[str, list[float]]:
    """The normalisation that a model's images want, as fields of a `MIMConfig`; {} where nothing says it. RADIO
    normalises its images itself: they come as they are.

    Raises:
        ValueError: the file of the image processor is damaged.
    """
    channels = getattr(native, "num_channels", 3)
    if native.model_type == "radio":
        return normalisation({"do_normalize": False}, channels)
    try:
        processor: Any = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trusts_remote_code())
        return normalisation(vars(processor), channels)
    except (OSError, ValueError, AttributeError, TypeError):
        path = file_of(name_or_path, "preprocessor_config.json")
    if path is None:
        return {}
    try:  # a processor of a class that cannot be loaded
        with open(path, encoding="utf-8") as file:
            return normalisation(json.load(file), channels)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it does not say how images are normalised") from error


def patch_embedding(network: nn.Module, num_channels: int, patch: Grid) -> nn.Conv2d | None:
    """The convolution that makes tokens of an image's patches; None where there is none."""
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    fits = (m for m in convolutions if m.in_channels == num_channels and m.kernel_size == m.stride == patch)
    return next(fits, None)


def native_blocks(network: nn.Module) -> list[list[nn.Module]]:
    """Of a model of transformers: the outermost list of modules of one class; blocks of stages, where stages are made
    of a list `blocks` (Swin), whose other parts, such as the merging of patches, count as their last block."""
    queue: list[nn.Module] = [network]
    while queue:
        module = queue.pop(0)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(inner) for inner in module}) == 1:
            break
        queue += list(module.children())
    else:
        return []
    blocks: list[list[nn.Module]] = []
    for stage in module:
        inner = getattr(stage, "blocks", None)
        if not isinstance(inner, nn.ModuleList) or len(inner) == 0:
            blocks.append([stage])
            continue
        blocks += [[block] for block in inner]
        blocks[-1] += [part for name, part in stage.named_children() if name != "blocks"]
    return blocks
