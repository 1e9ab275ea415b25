"""An encoder to start from, whoever saved it, in the place of the encoder that a recipe describes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_base import Encoder, is_mask_parameter
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.options import LEARNING_OPTIONS, OptionError, options_of, pair, size_title, unknown_choice
from hf_mim.modeling.parts import ENCODERS, make_encoder


# Fields of a `MIMConfig` that describe an encoder.
DESCRIBES = ("image_size", "num_channels", "image_mean", "image_std", "encoder", "encoder_config", "origin")
METHOD = ("decoder", "decoder_config", "target")  # what a head is for
# Learning options that mean the same for each kind of encoder.
SHARED = ("mask_style", "pixel_fill", "drop_path_rate")
MASK_STYLES = {"vit": ("drop", "token", "add"), "convnet": ("add", "token", "sparse"), "native": (), "hiera": ()}
CHANNELS = {
    "repeat": "the new channels take the weights of the old ones in turn",
    "average": "each new channel takes the mean weights of the old ones",
    "new": "a new first layer: features mean nothing until it is trained",
}


@dataclass
class StartingEncoder:
    """An encoder with its weights.

    Attributes:
        source: where it comes from.
        fields: those of a `MIMConfig` that describe the encoder and its images: `encoder`, `encoder_config`,
            `image_size`, `num_channels`, and `image_mean`, `image_std` and `origin` where the source says them.
        state: its weights as `MIMModel` names them (`encoder.`).
        description: what it is, and as which encoder of ours.
        notes: what a user should know of the conversion, a line each.
        head: the weights behind the encoder as `MIMForPreTraining` names them, where the source has them.
        method: the fields of a `MIMConfig` that these weights are for.
    """

    source: str
    fields: dict[str, Any]
    state: dict[str, Tensor]
    description: str
    notes: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)

    def model(self) -> MIMModel:
        """The encoder as it is at the source, without a pooler and without a mask token, in eval mode."""
        model = MIMModel(MIMConfig(**self.fields), add_pooling_layer=False)
        fill(model, self.state)
        return model.eval()


def fill(model: MIMModel, state: dict[str, Tensor], new: Iterable[str] = ()) -> None:
    """Loads the weights of a start; the mask token, which it may lack or have in another width, may stay new, and so
    may what `new` names.

    Raises:
        ValueError: the weights do not fill the encoder.
    """
    own = model.state_dict()
    masks = [name for name in own if is_mask_parameter(name) or name in new]
    state = {
        name: value for name, value in state.items() if name not in new and (name in own or not is_mask_parameter(name))
    }
    state = {name: value for name, value in state.items() if name not in masks or value.shape == own[name].shape}
    wrong = sorted(name for name in own.keys() ^ state.keys() if name not in masks)
    wrong += [
        f"{name} is {tuple(value.shape)}, and {tuple(own[name].shape)} by the recipe"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"the weights do not fill the encoder: {', '.join(wrong[:4])}")
    model.load_state_dict(state, strict=False)


def fill_head(model: MIMForPreTraining, start: StartingEncoder) -> bool:
    """Loads the decoder of a start, where the model's is the same and predicts the same. -> whether it did."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("mim.")}
    method = {name: getattr(model.config, name) for name in METHOD}
    shapes = [{name: value.shape for name, value in state.items()} for state in (own, start.head)]
    if not start.head or method != start.method or shapes[0] != shapes[1]:
        return False
    model.load_state_dict(start.head, strict=False)
    return True


def start_fields(start: StartingEncoder, section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """-> the fields of a `MIMConfig` of a recipe's method with this encoder, and what to tell about it.

    Args:
        section: `model` of a recipe, without `init_from`; its `encoder` says which kind of encoder its
            `encoder_config` is for.

    Raises:
        ValueError: the recipe asks for other channels.
    """
    kind, section = start.fields["encoder"], dict(section)
    recipe_kind, asked = section.pop("encoder", "vit"), section.pop("encoder_config", None) or {}
    options, notes = learning_options(start.fields, recipe_kind, asked)
    kept = {name: value for name, value in start.fields["encoder_config"].items() if name not in LEARNING_OPTIONS}
    fields = {**start.fields, **section, "encoder": kind, "encoder_config": {**kept, **options}}
    notes += fit_size(start, fields)
    if fields["num_channels"] != start.fields["num_channels"] and "image_mean" not in section:
        fields["image_mean"] = fields["image_std"] = None
    return fields, notes


def learning_options(source: dict, recipe_kind: str, asked: dict) -> tuple[dict, list[str]]:
    """-> the recipe's options of the encoder as far as they go with that of the source, and what is left out."""
    kind, options = source["encoder"], dict(asked)
    if recipe_kind == "native" and kind == "vit":
        options.setdefault("mask_style", "token")  # which is what models of transformers do
    left = []
    for name, value in asked.items():
        applies = kind == recipe_kind or name in SHARED
        if name in LEARNING_OPTIONS:
            applies = applies and takes_option(source, name)
            applies = applies and (name != "mask_style" or value in MASK_STYLES[kind])
        if not applies:
            del options[name]
            left.append(f"{name}={value}")
    if kind == "native" and "mask_style=token" in left:  # it is what that encoder does
        left.remove("mask_style=token")
    notes = [f"of the recipe's encoder_config, this does not go with the source: {', '.join(left)}"]
    return options, notes if left else []


def takes_option(source: dict, name: str) -> bool:
    """Whether the encoder of a source has an option of this name."""
    kind, options = source["encoder"], source["encoder_config"]
    if name in options_of(ENCODERS[kind]):
        return True
    if options.get("model_type") == "timm":
        return name == "drop_path_rate"
    return kind != "vit" and hasattr(CONFIG_MAPPING[options.get("model_type", "vit")](), name)


def fit_size(start: StartingEncoder, fields: dict[str, Any]) -> list[str]:
    """Has positions stay those of the source's grid where the image size is another. -> what to tell about it.

    Raises:
        ValueError: the encoder does not take images of this size.
    """
    if fields["image_size"] == start.fields["image_size"]:
        return []
    size = pair(fields["image_size"])
    with torch.device("meta"):
        encoder: Any = make_encoder(MIMConfig(**start.fields))
    try:
        encoder.mask_grid(*size)
    except ValueError as error:
        near = start.fields["image_size"]
        raise OptionError(
            f"{start.source}: {error}; or train at its own size: model.image_size={near}", "image_size", size
        ) from None
    options, trained = fields["encoder_config"], size_title(start.fields["image_size"])
    if fields["encoder"] == "convnet":
        return []
    if fields["encoder"] == "native":
        options.setdefault("image_size", start.fields["image_size"])
        return [f"trained at {trained} pixels: its class brings its positions to {size_title(size)}"]
    if encoder.positions == {"rotary_normalized"}:  # which are those of any grid
        return []
    options["position_grid"] = list(encoder.position_grid)
    grids = ["x".join(map(str, grid)) for grid in (encoder.position_grid, encoder.mask_grid(*size))]
    if encoder.traces_any_size:
        return [f"trained at {trained} pixels: the coordinates of {grids[1]} patches are scaled to those of {grids[0]}"]
    return [f"trained at {trained} pixels: the positions of {grids[0]} patches are interpolated to {grids[1]}"]


@torch.no_grad()
def check_forward(model: MIMForPreTraining, start: StartingEncoder) -> None:
    """Has the class of a library see one empty image of the run's size, some of it hidden: it may refuse more than its
    config says.

    Raises:
        ValueError: it does.
    """
    config = model.config
    if config.encoder != "native":
        return
    try:
        model.eval()(torch.zeros(1, config.num_channels, *pair(config.image_size)), return_loss=False)
    except (RuntimeError, IndexError) as error:
        raise OptionError(
            f"{start.source}: its class does not take images of {size_title(config.image_size)} pixels "
            f"({' '.join(str(error).split())[:200]}); it was trained at model.image_size={start.fields['image_size']}",
            "image_size",
        ) from None


def describe_hiding(model: MIMForPreTraining) -> str:
    """What becomes of hidden tokens."""
    encoder: Any = model.mim.encoder
    if not model.hides_tokens:
        return "nothing is hidden"
    if encoder.drops_tokens:
        return "hidden tokens are dropped"
    if model.config.encoder == "native":
        own = encoder.mask_token is not None
        return f"hidden tokens become {'a new mask token' if own else 'the mask token of its class'}"
    return {
        "token": "hidden tokens become a mask token",
        "add": "a mask token is added to hidden ones",
        "sparse": "the network computes on visible positions only",
    }[encoder.mask_style]


# ---- other channels --------------------------------------------------------------------------------------------------
def adapt_channels(start: StartingEncoder, channels: int, how: str | None) -> dict[str, Tensor]:
    """The weights of a start for images of `channels` channels.

    Raises:
        ValueError: they are other than the source's, and nothing says how.
    """
    old = start.fields["num_channels"]
    if channels == old:
        return start.state
    if how is None:
        choices = "; ".join(f"{name} ({cost})" for name, cost in CHANNELS.items())
        raise OptionError(
            f"{start.source} takes {old} channels and the recipe's images have {channels}: say what its first layer "
            f"becomes by model.init_channels: {choices}. Or keep its channels: model.num_channels={old}",
            "init_channels",
        )
    if how not in CHANNELS:
        raise unknown_choice("model.init_channels", how, CHANNELS)
    name, is_linear = first_layer(start)
    state, weight = dict(start.state), start.state[name]
    if how == "new":
        return {key: value for key, value in state.items() if key != name}
    weight = weight.unflatten(1, (-1, old)).movedim(2, 1) if is_linear else weight
    if how == "repeat" and channels > 1:
        new = weight[:, torch.arange(channels) % old] * (old / channels)
    else:  # one grey channel stands for all of the old ones
        new = weight.mean(dim=1, keepdim=True).repeat_interleave(channels, dim=1) * (old / channels)
    state[name] = new.movedim(1, 2).flatten(1) if is_linear else new
    return state


def first_layer(start: StartingEncoder) -> tuple[str, bool]:
    """The name of the weight that reads the images, and whether it is a linear layer of patches.

    Raises:
        ValueError: it cannot be told.
    """
    if start.fields["encoder"] == "vit":
        return "encoder.patch_embedding.weight", True
    with torch.device("meta"):
        encoder: Encoder = make_encoder(MIMConfig(**start.fields))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == start.fields["num_channels"]:
            return f"encoder.{name}.weight", False
    raise ValueError(f"{start.source}: the layer that reads the image was not found, its channels cannot be changed")
