"""Models of transformers and timm, from a folder or the Hub, where a config says what the weights do not."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, ViTMAEForPreTraining
from transformers.utils import cached_file

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.foreign import refuse_loading, trusts_remote_code
from hf_mim.modeling.loading import load_whole
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.native_models import NEW, check_images, load_native, native_options, native_statistics

from . import vit_family as vit
from .convnets import FROM_DINOV3, convnext
from .official import Converted, Hints, convert_state, finish, with_mae_decoder
from .reading import Weights, read_file
from .starting import DESCRIBES, METHOD, StartingEncoder


VITS = (
    *("vit", "deit", "vit_mae", "ijepa", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "pixio"),
)
# Names of activations in transformers' configs and in timm's classes under ours.
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATIONS |= {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "SiLU": "swiglu"}
CONVNETS = ("resnet", "convnext", "convnextv2")
TIMM = "timm_wrapper"  # the model type of timm's models in transformers
DECIDED = ("heads", "decoder_heads", "timm_name")  # by the config of a folder
TIMM_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")


def convert_folder(source: str, fields: dict, hints: Hints) -> Converted:
    """A model of transformers or timm.

    Args:
        source: a local folder or an id on the Hub.
        fields: of its config.json.
        hints: of the user: the image size of timm's ConvNets, which their configs leave open.

    Raises:
        ValueError: it is of no known kind, or ours already, or a hint is another.
    """
    kind = fields.get("model_type")
    if "architecture" in fields and (kind or TIMM) == TIMM:
        return convert_timm(source, fields, hints)
    if kind is None:
        raise ValueError(f"the config.json of {source} names no model type")
    if kind == MIMConfig.model_type:
        raise ValueError(f"{source} is a checkpoint of this project already; hf-mim export goes the other way")
    check_images(fields, source)
    refuse_hints(hints, "image_size", *DECIDED)
    if kind == "dinov3_convnext":
        return convert_dinov3_convnext(source)
    reason = f"our encoder 'vit' has not the blocks of {kind}"
    if kind in VITS:
        try:
            return convert_vit(source, kind)
        except ValueError as error:
            reason = str(error)
    converted = convert_native(source, kind)
    if kind not in CONVNETS:
        converted.notes.append(f"as the class of transformers: {reason}")
    return converted


def refuse_hints(hints: Hints, *names: str) -> None:
    """Raises:
    ValueError: the user says one of these, which the config of a folder decides.
    """
    if name := next((name for name in names if getattr(hints, name) is not None), None):
        option = f"--{name.replace('_', '-')}"
        raise ValueError(f"{option} is for files of weights, and here the config.json decides: leave {option} out")


def convert_file(path: Path, hints: Hints, encoder: Path | None = None) -> Converted:
    """A file of weights alone; `encoder` is that of the encoder, where it holds a pooling head (Beyond [cls]).

    Raises:
        ValueError: it is of no known kind, or holds other types than tensors.
    """
    tensors, hints.arguments, notes = read_file(path)
    if encoder is not None:
        tensors = with_encoder(tensors, encoder)
    converted = convert_state(tensors, hints)
    converted.notes[:0] = notes
    if not converted.fields.get("image_mean"):
        converted.notes.append("the file does not say how its images were normalised: ImageNet's mean and std assumed")
    return converted


def with_encoder(head: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A head of Beyond [cls] that was saved alone, and the weights of its encoder's file, under the names that they
    have in one file.

    Raises:
        ValueError: the head's file has other weights, or the encoder's is none.
    """
    if not all(re.match(r"\d+\.", name) for name in head):
        raise ValueError("--encoder goes with a pooling head of Beyond [cls] that was saved alone")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # Pretraining files have a decoder, fine-tuned ones a classifier, which would be taken for what the file is about.
    unused = r"(fc_norm|head|lm_head|decoder\w*)\.|mask_token|decoder_pos_embed"
    encoder = {name: value for name, value in read_file(path)[0].items() if not re.match(unused, name)}
    return encoder | {f"head.{name}": value for name, value in head.items()}


def start_from(source: str, converted: Converted) -> StartingEncoder:
    """The encoder of what was converted, and its decoder where it has one."""
    defaults = {"image_size": 224, "num_channels": 3}  # of ConvNets, which have no size of their own
    fields = defaults | {name: value for name, value in converted.fields.items() if name in DESCRIBES}
    state = {name: value for name, value in converted.state.items() if name.startswith("encoder.")}
    encoder = fields["encoder"]
    form = f"as our encoder {encoder!r}" if encoder != "native" else "as its own class (encoder 'native')"
    start = StartingEncoder(source, fields, state, f"{converted.kind} {form}", list(converted.notes))
    if any(name.startswith("pooled_norm.") for name in converted.state):
        start.notes.append("its last norm, which acts after pooling, is left out: later on a new one stands there")
    if converted.pretraining:
        config = MIMConfig(**converted.fields)
        start.head = {name: value for name, value in converted.state.items() if name.startswith("decoder.")}
        start.method = {name: getattr(config, name) for name in METHOD}
    return start


def timm_weights(source: str) -> Path:
    """The file with the weights of a model that timm saved.

    Raises:
        ValueError: there is none.
    """
    for name in TIMM_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            return Path(path)
    raise ValueError(f"{source} has none of {', '.join(TIMM_FILES)}")


def convert_timm(source: str, fields: dict, hints: Hints) -> Converted:
    """A model as timm saves it: its config names the architecture."""
    import timm  # slow to import, and not everybody has it

    refuse_hints(hints, *DECIDED)
    path = timm_weights(source)
    tensors, _, _ = read_file(path)
    name, options = fields["architecture"], fields.get("model_args") or {}
    saved = fields.get("pretrained_cfg") or {}
    statistics = {f"image_{key}": list(saved[key]) for key in ("mean", "std") if key in saved}
    refuse_loading(options, name)
    with torch.device("meta"):
        network: Any = timm.create_model(name, **options)
    blocks = getattr(network, "blocks", None)
    if blocks is not None and hasattr(network, "patch_embed"):
        refuse_hints(hints, "image_size")
        if getattr(network, "rope", None) is not None:
            raise ValueError(f"timm's {name} has rotary positions of its own, which our encoder does not")
        activation = activation_option(type(blocks[0].mlp.act).__name__)
        heads, eps = blocks[0].attn.num_heads, blocks[0].norm1.eps
        size = list(network.patch_embed.img_size)
        converted = convert_state(tensors, Hints(heads, size, eps=eps, statistics=statistics))
        converted.fields["encoder_config"] |= activation
        converted.fields["origin"] = {"library": "timm", "architecture": name, "model_args": options}
    else:
        try:
            converted = convert_state(dict(tensors), Hints(image_size=hints.image_size, statistics=statistics))
        except ValueError:  # a ConvNet that transformers does not have
            named = Hints(image_size=hints.image_size, timm_name=name, statistics=statistics)
            converted = convert_state(tensors, named)
    converted.kind = f"timm's {name}"
    return converted


def convert_vit(source: str, kind: str) -> Converted:
    """A vision transformer of transformers, or the vision tower of a model of images and text, as our encoder `vit`.

    Raises:
        ValueError: our encoder does not compute what it does.
    """
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusts_remote_code())
    with_decoder = kind == "vit_mae" and "ViTMAEForPreTraining" in (config.architectures or [])
    network, info = load_whole(ViTMAEForPreTraining if with_decoder else AutoModel, source, config, NEW)
    tower = getattr(network, "vision_model", network)
    native = tower.config
    tensors = {name: value.float() for name, value in tower.state_dict().items()}
    weights = Weights(tensors, vit.renamer(vit.FROM_TRANSFORMERS))
    eps, size = native.layer_norm_eps, native.image_size
    fields, state, notes = vit.vit_encoder(weights, native.num_attention_heads, size, eps, fixed_positions(native))
    options = fields["encoder_config"]
    if options.get("mlp") != "swiglu":
        options |= activation_option(native.hidden_act)
    state = {f"encoder.{name}": value for name, value in state.items()}
    fields["origin"] = {"library": "transformers", **native_options(native)}
    converted = Converted(f"transformers' {kind}", fields, state, weights, notes)
    if kind not in ("vit_mae", "pixio"):
        options["mask_style"] = "token"
    if with_decoder:
        hints = Hints(decoder_heads=native.decoder_num_attention_heads, eps=eps)
        hints.arguments = {"norm_pix_loss": native.norm_pix_loss}
        converted = with_mae_decoder(converted, hints)
        converted.kind = "transformers' vit_mae with its decoder"
    finish(weights)
    weights.left |= dict.fromkeys(sorted(info["unexpected_keys"]), "the head of the old task")
    if tower is not network:
        notes.append("the vision tower alone: the text tower and the projections are left out")
    converted.fields |= native_statistics(source, native)
    return converted


def fixed_positions(native: Any) -> str | None:
    """The kind of positions that a model computes, as our encoder names it; None where they are weights.

    Raises:
        ValueError: our encoder has them with another base or a gate of another kind.
    """
    if native.model_type != "dinov3_vit":
        return None
    if native.rope_theta != 100:
        raise ValueError(f"our encoder 'vit' has rotary positions of base 100, not {native.rope_theta}")
    if native.use_gated_mlp and native.hidden_act != "silu":
        raise ValueError(f"our encoder 'vit' has no MLP with a gate of {native.hidden_act}")
    return "rotary_normalized"


def activation_option(name: str) -> dict[str, str]:
    """Raises:
    ValueError: our encoder has no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"our encoder 'vit' has no activation {name}")
    return {} if ACTIVATIONS[name] == "gelu" else {"mlp": ACTIVATIONS[name]}


def convert_dinov3_convnext(source: str) -> Converted:
    """DINOv3's ConvNeXt as our encoder `convnet`. Its last norm acts on every position of the last map.

    Raises:
        ValueError: our encoder does not compute what it does.
    """
    native = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusts_remote_code())
    network, info = load_whole(AutoModel, source, native, NEW)
    if native.layer_norm_eps != 1e-6 or native.hidden_act != "gelu":
        raise ValueError(f"{source}: a DINOv3 ConvNeXt with other norms or activations than the released ones")
    tensors = {name: value.float() for name, value in network.state_dict().items()}
    weights = Weights(tensors, vit.renamer(FROM_DINOV3))
    fields, state, _ = convnext(weights, native.image_size)
    fields["encoder_config"]["final_norm"] = True
    for part in ("weight", "bias"):
        state[f"encoder.final_norm.{part}"] = state.pop(f"pooled_norm.{part}")
    fields["origin"] = {"library": "transformers", **native_options(native)}
    finish(weights)
    weights.left |= dict.fromkeys(sorted(info["unexpected_keys"]), "the head of the old task")
    return Converted("transformers' dinov3_convnext", fields | native_statistics(source, native), state, weights)


def convert_native(source: str, kind: str) -> Converted:
    """A ConvNet of transformers as our encoder `convnet`, any other model as `native`."""
    fields, tensors, unexpected = load_native(source)
    weights = Weights(tensors)
    if kind in CONVNETS:
        fields |= {"encoder": "convnet"}
        norm = {"layernorm.weight": "pooled_norm.weight", "layernorm.bias": "pooled_norm.bias"}
        state = {norm.get(name, f"encoder.network.{name}"): weights.take(name) for name in list(tensors)}
    else:
        model = MIMModel(MIMConfig(**fields))
        model.encoder.load_native_state(tensors)
        state = model.state_dict()
        taken = model.encoder.taken_norm
        for name in tensors:
            ours = f"encoder.network.{name}"
            if taken and name.startswith(f"{taken}."):
                ours = f"encoder.final_norm.{name.removeprefix(f'{taken}.')}"
            if ours in state:
                weights.take(name)
    weights.leave(r"pooler\.", "it acts after pooling, as a part of the classifier")
    weights.leave(r".*", "not known")
    weights.left |= dict.fromkeys(unexpected, "the head of the old task")
    return Converted(f"transformers' {kind}", fields, state, weights)
