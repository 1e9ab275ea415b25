"""Models of transformers and timm, from a folder or the Hub, where a config says what the weights do not."""

from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, ViTMAEForPreTraining

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_native import load_native
from hf_mim.modeling.foreign import check_config, refuse_loading, trusts_remote_code
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.training.common.errors import CheckpointError

from . import vit_family as vit
from .official import Converted, Hints, convert_state, finish, with_mae_decoder
from .reading import Weights, read_file


VITS = ("vit", "vit_mae", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers")
CONVNETS = ("resnet", "convnext", "convnextv2")


def convert_folder(source: str, hints: Hints) -> Converted:
    """A model of transformers or timm.

    Raises:
        ValueError: there is none, or it is ours already.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} was not found, locally or on the Hub: {reason}", source) from error
    if not fields:
        raise CheckpointError(f"{source} has no config.json; give the file of the weights itself", source)
    check_config(fields)
    if "architecture" in fields and fields.get("model_type", "timm_wrapper") == "timm_wrapper":
        return convert_timm(Path(source), fields, hints)
    kind = fields.get("model_type")
    if kind is None:
        raise CheckpointError(f"the config.json of {source} names no model type", source)
    if kind == MIMConfig.model_type:
        message = f"{source} is a checkpoint of this project already; hf-mim export goes the other way"
        raise CheckpointError(message, source)
    if kind in VITS and fields.get("hidden_act", "gelu") == "gelu":
        return convert_vit(source, kind, hints)
    return convert_native(source, kind)


def convert_timm(folder: Path, fields: dict, hints: Hints) -> Converted:
    """A folder as timm saves it: its config names the architecture."""
    names = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        message = f"{folder} has none of {', '.join(names)}; download the model of timm first: hf download"
        raise CheckpointError(message, str(folder))
    tensors, _, _ = read_file(path)
    name, options = fields["architecture"], fields.get("model_args") or {}
    saved = fields.get("pretrained_cfg") or {}
    statistics = {f"image_{key}": list(saved[key]) for key in ("mean", "std") if key in saved}
    refuse_loading(options, name)
    with torch.device("meta"):
        network: Any = timm.create_model(name, **options)
    blocks = getattr(network, "blocks", None)
    if blocks is not None and hasattr(network, "patch_embed"):
        if getattr(network, "rope", None) is not None:
            raise ValueError(f"timm's {name} has rotary positions of its own, which our encoder does not")
        activation = type(blocks[0].mlp.act).__name__
        if activation not in ("GELU", "SiLU"):
            raise ValueError(f"timm's {name} uses {activation}, and our encoder GELU")
        heads, eps = blocks[0].attn.num_heads, blocks[0].norm1.eps
        size = list(network.patch_embed.img_size)
        converted = convert_state(tensors, Hints(heads, size, eps=eps, statistics=statistics))
    else:
        try:
            converted = convert_state(dict(tensors), Hints(image_size=hints.image_size, statistics=statistics))
        except ValueError:  # a ConvNet that transformers does not have
            named = Hints(image_size=hints.image_size, timm_name=name, statistics=statistics)
            converted = convert_state(tensors, named)
    converted.kind = f"timm's {name}"
    return converted


def load_pretrained(source: str, model_class):
    """-> the model and what it left out of the file.

    Raises:
        ValueError: the file lacks weights.
    """
    model, info = model_class.from_pretrained(source, output_loading_info=True, trust_remote_code=trusts_remote_code())
    new = ("pooler.", "mask_token", "classifier", "position_embeddings", "decoder_pos_embed")
    missing = [name for name in info["missing_keys"] if not any(part in name for part in new)]
    if missing:
        raise ValueError(f"{source} lacks weights: {', '.join(sorted(missing)[:4])}")
    return model.eval(), sorted(info["unexpected_keys"])


def convert_vit(source: str, kind: str, hints: Hints) -> Converted:
    """A vision transformer of transformers as our encoder `vit`."""
    native = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusts_remote_code())
    with_decoder = kind == "vit_mae" and "ViTMAEForPreTraining" in (native.architectures or [])
    network, unexpected = load_pretrained(source, ViTMAEForPreTraining if with_decoder else AutoModel)
    tensors = {name: value.float() for name, value in network.state_dict().items()}
    weights = Weights(tensors, vit.renamer(vit.FROM_TRANSFORMERS))
    eps, size = native.layer_norm_eps, native.image_size
    fields, state, notes = vit.vit_encoder(weights, native.num_attention_heads, size, eps)
    state = {f"encoder.{name}": value for name, value in state.items()}
    converted = Converted(f"transformers' {kind}", fields, state, weights, notes)
    if kind != "vit_mae":
        converted.fields["encoder_config"]["mask_style"] = "token"
    if with_decoder:
        hints = Hints(decoder_heads=native.decoder_num_attention_heads, eps=eps)
        hints.arguments = {"norm_pix_loss": native.norm_pix_loss}
        converted = with_mae_decoder(converted, hints)
        converted.kind = "transformers' vit_mae with its decoder"
    finish(weights)
    weights.left |= dict.fromkeys(unexpected, "the head of the old task")
    converted.fields |= load_statistics(source)
    return converted


def load_statistics(source: str) -> dict:
    """How images are normalised, where an image processor is saved beside the model."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=trusts_remote_code())
        return {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def convert_native(source: str, kind: str) -> Converted:
    """A ConvNet of transformers as our encoder `convnet`, any other model as `native`."""
    _, unexpected = load_pretrained(source, AutoModel)
    fields, tensors = load_native(source)
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
