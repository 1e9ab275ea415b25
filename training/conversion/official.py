"""What the weights of a file are, told by their names and shapes, and where they go in a model of ours."""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.decoder_base import Decoder
from hf_mim.modeling.encoder_base import is_mask_parameter
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import Size, pair

from . import data2vec
from . import vit_family as vit
from .convnets import FROM_OFFICIAL, NEW_POOLED_NORM, PARTS, convnext, dense_kernels, mask_parts, resnet, timm_convnet
from .data2vec import data2vec_decoder, is_data2vec
from .fcmae import fcmae_decoder, is_fcmae
from .pooling_heads import abmilp_classifier
from .reading import Weights
from .spark import spark_decoder
from .swin import NAMES as SWIN
from .swin import is_swin, swin_encoder, swin_mask_token


KINDS = (
    "MAE, SimMIM, BEiT, BEiT-v2, DTM, DINO, Beyond [cls], A2MIM, SparK, FCMAE, data2vec 2.0 and the encoders of Swin "
    "and ConvNeXt V2 as their authors save them",
    "state dicts of timm's ViTs, ResNets and ConvNeXts (others with --timm-name)",
    "folders and Hub ids of vision models of transformers",
)
ENCODER_PARTS = (*PARTS, "blocks.", "patch_embed.", "norm.", "norm_pre.", "pos_embed", "rel_pos_bias.", "rope.")


@dataclass
class Converted:
    """What was made of a source: the config's fields, the weights as our models name them without `mim.`, whether they
    are all that `MIMForPreTraining` or `MIMForImageClassification` needs, and what to tell about it."""

    kind: str
    fields: dict
    state: dict[str, Tensor]
    weights: Weights
    notes: list[str] = field(default_factory=list)
    pretraining: bool = False
    classifier: bool = False


@dataclass
class Hints:
    """What a file does not say and the user, or a config beside it, does."""

    heads: int | None = None
    image_size: Size | None = None
    timm_name: str | None = None
    eps: float = 1e-6
    decoder_heads: int | None = None
    arguments: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)


def convert_state(tensors: dict[str, Tensor], hints: Hints) -> Converted:
    """What the weights of a file are, by their names and shapes.

    Raises:
        ValueError: they are of no known kind, or parts of the encoder are unknown.
    """
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    reader = recognise(tensors, hints)
    if reader is None:
        raise ValueError(
            f"the keys of the file are of no kind known here (the first: {', '.join(list(tensors)[:3])}). "
            f"Known: {'; '.join(KINDS)}"
        )
    converted = reader(tensors, hints)
    converted.fields |= hints.statistics
    finish(converted.weights)
    return converted


def recognise(tensors: dict[str, Tensor], hints: Hints):
    """-> the function that reads weights of these names; None where there is none."""
    names = [name.removeprefix("backbone.").removeprefix("sparse_encoder.sp_cnn.") for name in tensors]
    inner = {name.removeprefix("encoder.") for name in names}
    if hints.timm_name:
        return read_convnet
    if is_swin(tensors):
        return read_swin
    if is_data2vec(tensors) or "layers.0.ln1.weight" in inner or "blocks.0.norm1.weight" in inner:
        return read_vit
    if {"layer1.0.conv1.weight", "conv1.weight"} <= inner or "downsample_layers.0.0.weight" in inner:
        return read_convnet
    if {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"} <= inner:
        return read_convnet
    if any("attention_predictor." in name for name in names):
        raise ValueError(
            f"the file holds a pooling head of Beyond [cls] without its encoder ({', '.join(list(tensors)[:4])}): give "
            "the encoder's file beside it, --encoder FILE"
        )
    if any("embeddings.patch_embeddings" in name or "embedder.embedder" in name for name in names):
        raise ValueError(
            "the keys are those of a model of transformers, whose config.json is needed too: give its folder or Hub id"
        )
    return None


def read_vit(tensors: dict[str, Tensor], hints: Hints) -> Converted:
    """MAE, SimMIM, BEiT, BEiT-v2, DTM, DINO, A2MIM, Beyond [cls] or timm."""
    if is_data2vec(tensors):
        return read_data2vec(tensors, hints)
    openmixup = any(name.endswith("layers.0.ln1.weight") for name in tensors)
    # Both have their encoder under a name of its own; what lies beside it must keep its name.
    table = vit.FROM_OPENMIXUP if openmixup else vit.PLAIN
    weights = Weights(tensors, vit.renamer(table))
    fields, state, notes = vit.vit_encoder(weights, hints.heads, hints.image_size, hints.eps)
    options = fields["encoder_config"]
    converted = Converted("", fields, {f"encoder.{name}": value for name, value in state.items()}, weights, notes)
    if "decoder_pred.weight" in weights and "decoder_embed.weight" in weights:
        return with_mae_decoder(converted, hints)
    head = next((n for n in ("decoder.0", "neck.decoder.0", "neck.decoder_pred.0") if f"{n}.weight" in weights), None)
    if head is not None:
        return with_pixel_head(converted, head, "A2MIM" if head == "neck.decoder_pred.0" else "SimMIM")
    if any("attention_predictor." in name for name in weights.tensors):
        return with_abmilp_head(converted, hints)
    if "lm_head.weight" in weights and "mask_token" in weights:
        return with_token_head(converted)
    if openmixup:
        converted.kind = "A2MIM or another ViT of OpenMixup"
    elif any(name.startswith("encoder.") for name in tensors):
        converted.kind = "SimMIM"
        options["mask_style"] = "token"
    elif options["position_embedding"] == "sincos":
        converted.kind = "MAE, the encoder"
    else:
        converted.kind = "BEiT" if "relative" in str(options["position_embedding"]) else "ViT with the names of timm"
    return converted


def with_token_head(converted: Converted) -> Converted:
    """BEiT's, BEiT-v2's or DTM's linear head on every token. Codes number thousands, features of a teacher hundreds."""
    weights, fields = converted.weights, converted.fields
    rows = len(weights.tensors["lm_head.weight"])
    second = any(name.startswith("cls_pt_layers") for name in weights.tensors)
    converted.kind = "BEiT-v2" if second else "DTM" if rows < 2048 else "BEiT or BEiT-v2"
    fields["encoder_config"]["mask_style"] = "token"
    features = {"name": "teacher_feature", "teacher": "openai/clip-vit-base-patch16", "project": True, "norm": "none"}
    if converted.kind == "DTM":
        features["feature_dims"] = [rows]
        fields |= {"target": "token_morphing", "target_config": {"features": features, "halves": "alternating"}}
        converted.notes.append("the file does not name its teacher: CLIP ViT-B/16 assumed, as in the released program")
    else:
        features["feature_dims"] = [512]
        fields |= {"target": "discrete_token", "target_config": {"features": features, "num_codes": rows}}
        converted.notes.append("the codes that its head predicts are those of a tokenizer that is not in the file")
    fields |= {"decoder": "linear", "masking": "block", "masking_config": {"ratio": 0.38}}  # 75 of 196
    converted.state["encoder.mask_token"] = weights.take("mask_token").flatten()
    converted.state |= {f"decoder.head.linear.{part}": weights.take(f"lm_head.{part}") for part in ("weight", "bias")}
    converted.pretraining = True
    return converted


def read_data2vec(tensors: dict[str, Tensor], hints: Hints) -> Converted:
    weights = Weights(tensors, data2vec.renamer(tensors))
    fields, state, notes = vit.vit_encoder(weights, hints.heads, hints.image_size, hints.eps)
    fields["encoder_config"] |= {"block_norm": "post", "mask_style": "drop"}
    state = {f"encoder.{name}": value for name, value in state.items()}
    converted = Converted("data2vec 2.0, the encoder", fields, state, weights, notes)
    if "decoder.proj.weight" in weights:
        decoder, values = data2vec_decoder(weights)
        converted.kind, converted.pretraining = "data2vec 2.0", True
        converted.fields |= decoder
        converted.state |= values
        notes.append("these are the student's weights; its teacher, a moving average, begins anew with them")
    return converted


def with_abmilp_head(converted: Converted, hints: Hints) -> Converted:
    converted.kind = "Beyond [cls]"
    try:
        fields, state = abmilp_classifier(converted.weights, converted.fields, hints.arguments)
    except ValueError as error:
        converted.notes.append(f"{error}: only the encoder is converted")
        return converted
    if "abmilp_cond" not in hints.arguments:
        converted.notes.append(
            "the file does not say whether its pooling head reads positions: assumed that it does not"
        )
    if hints.arguments.get("return_block"):
        block = hints.arguments["return_block"]
        converted.notes.append(f"the head was trained on block {block} of the encoder, and reads the last one here")
    converted.notes.append("the batch norm before the classifier is folded into it: the same in evaluation")
    converted.fields |= fields
    converted.state |= state
    converted.classifier = True
    return converted


def with_mae_decoder(converted: Converted, hints: Hints) -> Converted:
    converted.kind = "MAE with its decoder"
    try:
        fields, state = vit.mae_decoder(converted.weights, converted.fields, hints.decoder_heads, hints.eps)
    except ValueError as error:
        converted.notes.append(f"{error}: only the encoder is converted")
        return converted
    if hints.decoder_heads is None:
        number = fields["decoder_config"]["num_attention_heads"]
        converted.notes.append(f"{number} attention heads of the decoder are assumed: --decoder-heads says otherwise")
    normalize = hints.arguments.get("norm_pix_loss")
    if normalize is None:
        converted.notes.append("the file does not say whether the targets were normalised per patch: assumed")
    target = {"target": "pixel", "target_config": {"normalize": normalize is not False}}
    converted.fields |= {**fields, **target, "masking": "random", "masking_config": {"ratio": 0.75}}
    converted.state |= state
    converted.pretraining = True
    return converted


# A2MIM's losses, which differ by architecture and are not in the weights: those of the released configurations.
A2MIM_LOSSES = {
    "vit": {"loss": "l1", "weight": 0.1},
    "resnet": {"loss": "focal_l1", "weight": 0.5, "visible_share": 0.001},
    "convnext": {"loss": "focal_l1", "weight": 0.0},
}


def with_pixel_head(converted: Converted, head: str, kind: str) -> Converted:
    """SimMIM's and A2MIM's head, where it is one 1x1 convolution and the token that it goes with is there."""
    weights, fields, options = converted.weights, converted.fields, converted.fields["encoder_config"]
    converted.kind = kind
    a2mim, unit = kind == "A2MIM", 2
    if fields["encoder"] == "native":
        swin_token = swin_mask_token(weights)
        converted.state |= swin_token
        complete, unit = bool(swin_token), 2 ** (len(options["depths"]) - 1)
    elif fields["encoder"] == "vit":
        token = weights.maybe("mask_token")
        if token is not None:
            converted.state["encoder.mask_token"] = token.flatten()
        options |= {"mask_style": "add", "pixel_fill": "mean"} if a2mim else {"mask_style": "token"}
        complete = token is not None
    else:
        complete = mask_parts(weights, fields, converted.state)
        unit = 1 if options.get("mask_after_downsampling") else 2
    fields |= {"masking": "random", "masking_config": {"ratio": 0.6, "unit": unit}, "decoder": "linear"}
    if a2mim:
        loss = A2MIM_LOSSES[options.get("model_type", fields["encoder"])]
        fields |= {"target": "frequency", "target_config": dict(loss)}
        converted.notes.append("the file does not say its losses: those of the released configurations assumed")
    else:
        fields |= {"target": "pixel", "target_config": {"normalize": False, "loss": "l1"}}
    if not complete or weights.tensors[f"{head}.weight"].shape[2:] != (1, 1):
        converted.notes.append(
            "the head is not the one that goes with our linear decoder: only the encoder is converted"
        )
        converted.state = {name: value for name, value in converted.state.items() if not is_mask_parameter(name)}
        return converted
    with torch.device("meta"):
        decoder = cast(Decoder, MIMForPreTraining(MIMConfig(**fields)).decoder)
    rows, cols = decoder.base_grid
    height, width = pair(fields["image_size"])
    converted.state |= vit.pixel_head(
        weights, head, fields["num_channels"], decoder.factor, (height // rows, width // cols)
    )
    converted.pretraining = True
    return converted


def read_swin(tensors: dict[str, Tensor], hints: Hints) -> Converted:
    """SimMIM's, with its head, or a fine-tuned one without."""
    weights = Weights(tensors, vit.renamer(SWIN))
    fields, state, notes = swin_encoder(weights, hints.image_size, eps=1e-5)
    converted = Converted("Swin", fields, state, weights, notes)
    if "decoder.0.weight" in weights:
        return with_pixel_head(converted, "decoder.0", "SimMIM")
    return converted


def read_convnet(tensors: dict[str, Tensor], hints: Hints) -> Converted:
    """A ResNet or ConvNeXt of timm, torchvision, SparK or A2MIM, or the ConvNet of timm that is named."""
    weights = Weights(dense_kernels(tensors), vit.renamer(FROM_OFFICIAL))
    if hints.timm_name:
        parts = timm_convnet(weights, hints.timm_name, hints.image_size)
        return Converted(f"timm's {hints.timm_name}", *parts[:2], weights, parts[2])
    is_resnet = "layer1.0.conv1.weight" in weights
    black = weights.tensors.get("norm_black")  # SparK's unused picture, of the size that it was trained at
    size = hints.image_size or (None if black is None else list(black.shape[2:]))
    fields, state, notes = (resnet if is_resnet else convnext)(weights, size)
    name = "ResNet" if is_resnet else "ConvNeXt"
    converted = Converted(name, fields, state, weights, notes)
    if any(key.startswith("sparse_encoder.") for key in tensors):
        converted.kind = f"SparK, {name}"
        if "dense_decoder.proj.weight" in weights:
            with_spark_decoder(converted)
    elif is_fcmae(tensors):
        with_fcmae_decoder(converted)
    elif "neck.decoder_pred.0.weight" in weights:
        if not is_resnet:
            norm_every_position(converted)
        converted = with_pixel_head(converted, "neck.decoder_pred.0", "A2MIM")
        if converted.pretraining:
            leave_pooled_norm(converted)
        converted.kind = f"A2MIM, {name}"
    return converted


def norm_every_position(converted: Converted) -> None:
    """A2MIM's ConvNeXt norms the last map, not what is pooled of it."""
    if NEW_POOLED_NORM not in converted.notes:
        converted.fields["encoder_config"]["final_norm"] = True
        for suffix in ("weight", "bias"):
            converted.state[f"encoder.final_norm.{suffix}"] = converted.state.pop(f"pooled_norm.{suffix}")


def with_spark_decoder(converted: Converted) -> None:
    cells = math.prod(length // 32 for length in pair(converted.fields["image_size"]))
    hidden = cells - round(0.4 * cells)  # as released: the visible share is rounded
    fields, state = spark_decoder(converted.weights, hidden / cells)
    converted.fields |= fields
    converted.fields["encoder_config"] |= {"mask_style": "sparse", "pixel_fill": "none"}
    converted.state |= state
    converted.pretraining = True
    leave_pooled_norm(converted)


def with_fcmae_decoder(converted: Converted) -> None:
    converted.kind = "FCMAE, ConvNeXt V2"
    converted.fields["encoder_config"] |= {"mask_style": "sparse", "pixel_fill": "none"}
    fields, state = fcmae_decoder(converted.weights, converted.fields)
    converted.notes.append(
        "the norm of its GRN layers is that of each image, as in the paper; the released program takes that of a batch"
    )
    converted.fields |= fields
    converted.state |= state
    converted.pretraining = True
    leave_pooled_norm(converted)


def leave_pooled_norm(converted: Converted) -> None:
    """A model for pretraining has no pooling, hence not the norm after it."""
    converted.notes[:] = [note for note in converted.notes if note != NEW_POOLED_NORM]
    for suffix in ("weight", "bias"):
        if converted.state.pop(f"pooled_norm.{suffix}", None) is not None:
            name = converted.weights.sources.get(f"head.norm.{suffix}")
            if name in converted.weights.used:
                converted.weights.used.remove(name)
                converted.weights.left[name] = "it acts after pooling, which a model for pretraining does not do"


def finish(weights: Weights) -> None:
    """Names what is left of the weights, with the reason.

    Raises:
        ValueError: some of it belongs to the encoder: without it, outputs would be other ones.
    """
    unknown = [weights.sources[name] for name in weights.tensors if name.startswith(ENCODER_PARTS)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} weights of the encoder belong to a variant that is not known here: "
            f"{', '.join(unknown[:4])}"
        )
    weights.leave(r"oracle\.", "the DINO of a baseline of Beyond [cls], beside the encoder")
    weights.leave(r".*attention_predictor|.*self_attn", "the pooling head of Beyond [cls], see the note")
    weights.leave(r"mask_token|mask_gamma", "only pretraining needs it, and this kind's is not rebuilt")
    weights.leave(r"(fc_norm|pooler)\.", "it acts after pooling, as a part of the classifier")
    weights.leave(r"(head|fc|head_dist|classifier|.*head\..*)\b", "the head of the old task")
    weights.leave(r"cls_pt_", "BEiT-v2's second head, on its class token and an earlier block")
    weights.leave(r"lm_head", "the pretraining head, whose mask token is missing")
    weights.leave(r"(imn_|norm_black)", "SparK's statistics of pixels, which it does not use")
    weights.leave(r"(dense_decoder|densify|mask_tokens)", "SparK's decoder")
    weights.leave(r"(neck|decoder)", "the decoder")
    weights.leave(r".*", "not known")
