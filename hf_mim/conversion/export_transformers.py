"""A checkpoint's encoder as a model of transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, HieraModel, PixioConfig, PixioModel, ViTConfig, ViTModel

from hf_mim.modeling.hiera import hiera_cell, in_reading_order
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.native_models import native_config, native_model
from hf_mim.modeling.options import pair

from .counterparts import check_same, named, patch_convolution, position_table, refuse, scaled
from .to_origin import origin_of, tokens_of, transformers_model


def to_transformers(model: MIMModel, out: Path) -> list[str]:
    """Raises:
    ValueError: transformers has no counterpart; the message says of what.
    """
    encoder: Any = model.encoder
    kind: str = model.config.encoder
    native: Any
    origin = origin_of(model, "transformers")
    if origin is not None:
        native = transformers_model(model, origin)
    elif kind == "vit":
        pixio = encoder.num_cls_tokens > 1  # ViTModel has one class token
        refuse(encoder.extra_parts(), f"transformers' {'Pixio' if pixio else 'ViT'}Model")
        native = pixio_model(model) if pixio else vit_model(model)
    elif kind == "hiera":
        native = hiera_model(model)
    elif kind == "native":
        native = native_model(model.config, encoder.native)
        norm = {f"{encoder.taken_norm}.{name}": value for name, value in encoder.final_norm.state_dict().items()}
        native.load_state_dict({**encoder.network.state_dict(), **norm})
    else:
        native = convnet_model(model)
    line = check_same(model, lambda images: native_tokens(native.eval(), images), type(native).__name__)
    native.save_pretrained(out)
    name = type(native).__name__
    lines = [f"{name} of transformers, without hf_mim: {name}.from_pretrained", line]
    if "add_pooling_layer" in type(native).__init__.__code__.co_varnames:
        lines.append("its own pooling layer is not part of it: load with add_pooling_layer=False")
    return lines


def native_tokens(native: Any, images: Tensor) -> Tensor:
    """The last hidden state, of a Hiera in reading order."""
    tokens = tokens_of(native, images, **native_noise(native, images))
    if native.config.model_type != "hiera":
        return tokens
    cells = hiera_cell(native.config)
    return in_reading_order(tokens, native.config, (images.shape[2] // cells[0], images.shape[3] // cells[1]))


def hiera_model(model: MIMModel) -> HieraModel:
    """Raises:
    ValueError: its tokens pass a last norm, which transformers' has behind its pooling alone.
    """
    encoder: Any = model.encoder
    if not isinstance(encoder.final_norm, nn.Identity):
        raise ValueError("transformers' HieraModel has no norm of its last tokens (final_norm true)")
    native = HieraModel(encoder.native, add_pooling_layer=False)
    native.load_state_dict(encoder.network.state_dict())
    return native


def native_noise(native, images: Tensor) -> dict:
    """ViTMAE shuffles its patches by a noise; rising values keep their order."""
    if native.config.model_type != "vit_mae":
        return {}
    patches = native.embeddings.patch_embeddings.num_patches
    return {"noise": torch.arange(float(patches)).expand(len(images), -1)}


def vit_options(model: MIMModel) -> dict[str, Any]:
    """What the configs of ViT and Pixio have in common."""
    encoder: Any = model.encoder
    first, patch, size = encoder.layers[0], encoder.patch_size, pair(model.config.image_size)
    return {
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": len(encoder.layers),
        "num_attention_heads": first.attention.num_heads,
        "layer_norm_eps": first.norm1.eps,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": model.config.num_channels,
    }


def vit_model(model: MIMModel) -> ViTModel:
    encoder: Any = model.encoder
    config = ViTConfig(**vit_options(model), intermediate_size=encoder.layers[0].mlp.fc2.in_features)
    native = ViTModel(config, add_pooling_layer=False)
    native.load_state_dict(vit_state(model))
    return native


def pixio_model(model: MIMModel) -> PixioModel:
    """Raises:
    ValueError: its images or patches are not square, or its MLP's width is no multiple of the encoder's.
    """
    encoder: Any = model.encoder
    options, inner = vit_options(model), encoder.layers[0].mlp.fc2.in_features
    if isinstance(options["image_size"], list) or isinstance(options["patch_size"], list):
        raise ValueError("transformers' PixioModel takes square images of square patches, and this encoder does not")
    if inner % encoder.hidden_size:
        raise ValueError(f"transformers' PixioModel has no MLP of width {inner} beside {encoder.hidden_size}")
    mlp_ratio = inner // encoder.hidden_size
    native = PixioModel(PixioConfig(**options, mlp_ratio=mlp_ratio, n_cls_tokens=encoder.num_cls_tokens))
    native.load_state_dict(vit_state(model))
    return native


def vit_state(model: MIMModel) -> dict[str, Tensor]:
    """The weights under the names of transformers' ViT and Pixio."""
    encoder: Any = model.encoder
    no_places = torch.zeros(encoder.num_cls_tokens, encoder.hidden_size)
    state = {
        "embeddings.cls_token": encoder.prefix_tokens.detach()[None],
        "embeddings.position_embeddings": torch.cat([no_places, position_table(model)])[None],
        "embeddings.patch_embeddings.projection.weight": patch_convolution(model),
        "embeddings.patch_embeddings.projection.bias": encoder.patch_embedding.bias.detach(),
        **named("layernorm", encoder.final_norm),
    }
    for i, layer in enumerate(encoder.layers):
        block = named("layernorm_before", layer.norm1) | named("layernorm_after", layer.norm2)
        for part, value in layer.attention.qkv.state_dict().items():
            block |= {f"attention.{name}_proj.{part}": chunk for name, chunk in zip("qkv", value.chunk(3))}
        block |= scaled(layer.attention.proj, layer.scale1, "attention.o_proj")
        block |= named("mlp.fc1", layer.mlp.fc1) | scaled(layer.mlp.fc2, layer.scale2, "mlp.fc2")
        state |= {f"layers.{i}.{name}": value for name, value in block.items()}
    return state


def convnet_state(model: MIMModel) -> dict[str, Tensor]:
    """The weights of a ConvNet of transformers under its own names, the norm after pooling included."""
    encoder: Any = model.encoder
    state = {name: value for name, value in encoder.network.state_dict().items() if "layernorm.eps" not in name}
    return state | named("layernorm", model.pooled_norm)


def convnet_model(model: MIMModel) -> nn.Module:
    options = {**model.config.options("encoder")}
    model_type = options.pop("model_type", "resnet")
    if options.pop("final_norm", False):
        raise ValueError("transformers' ConvNeXt has its last norm after pooling, this model before: export to timm")
    for ours in [name for name in options if name.startswith("mask_") or name == "pixel_fill"]:
        options.pop(ours)
    native = native_config(model.config, model_type, options)
    network: Any = MODEL_MAPPING[type(native)]  # type: ignore[index]
    network = network(native)
    network.load_state_dict(convnet_state(model))
    return network
