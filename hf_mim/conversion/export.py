"""A checkpoint's encoder for those who do not have hf_mim: as a model of transformers or timm, or as ONNX."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, ViTConfig, ViTModel

from hf_mim.modeling.encoder_native import native_config, native_model
from hf_mim.modeling.layers import sincos_2d
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair, unknown_choice


FORMATS = ("transformers", "timm", "onnx")
LARGEST_DIFFERENCE = 1e-5


def export(checkpoint: str, out: str | Path, to: str) -> list[str]:
    """Writes the encoder of a checkpoint into the folder `out`.

    Args:
        checkpoint: a folder, or an id on the Hub.
        to: `transformers`, `timm` or `onnx`.

    Returns:
        the report, line by line.

    Raises:
        ValueError: there is no checkpoint or no such format, or the format has no counterpart of what the encoder
            does, or a package is not installed; the message says which.
    """
    from hf_mim.training.checkpoint import load_config, resolve
    from hf_mim.training.data.processors import processor_for

    if to not in FORMATS:
        raise unknown_choice("format", to, FORMATS)
    config = load_config(checkpoint)
    model = MIMModel.from_pretrained(resolve(checkpoint), config=config, use_safetensors=True).float().eval()
    out, formats = Path(out), model.encoder.export_formats
    if to not in formats:
        raise ValueError(f"this encoder has no counterpart in {to}: export it --to {' or '.join(formats)}")
    if to == "onnx":
        from .onnx import to_onnx as write
    elif to == "timm":
        from .export_timm import to_timm as write
    else:
        write = to_transformers
    lines = write(model, out)
    processor_for(config).save_pretrained(out)
    return [f"{out}: {lines[0]}", *lines[1:]]


def check_same(model: MIMModel, other, what: str) -> str:
    """Compares the tokens of both on random images. -> a line that says how near they are.

    Raises:
        ValueError: they differ by more than `LARGEST_DIFFERENCE`, relative to values above 1.
    """
    height, width = pair(model.config.image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, model.config.num_channels, height, width, generator=generator)
    with torch.no_grad():
        ours, theirs = model(images).last_hidden_state, other(images)
        theirs = theirs.flatten(2).transpose(1, 2) if theirs.ndim == 4 else theirs
        difference = float(((ours - theirs).abs() / ours.abs().clamp(min=1)).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"cannot be exported as {what}: its outputs would differ by {difference:.1e}")
    return f"outputs differ by {difference:.0e} at most, on random images of the checkpoint's size"


def to_transformers(model: MIMModel, out: Path) -> list[str]:
    """Raises:
    ValueError: transformers has no counterpart; the message says of what.
    """
    encoder, kind = model.encoder, model.config.encoder
    if kind == "vit":
        refuse(encoder.extra_parts(), "transformers' ViTModel")
        native = vit_model(model)
    elif kind == "native":
        native = native_model(model.config, encoder.native)
        norm = {f"{encoder.taken_norm}.{name}": value for name, value in encoder.final_norm.state_dict().items()}
        native.load_state_dict({**encoder.network.state_dict(), **norm})
    else:
        native = convnet_model(model)
    line = check_same(
        model, lambda images: native.eval()(images, **native_noise(native, images)).last_hidden_state, "it"
    )
    native.save_pretrained(out)
    name = type(native).__name__
    lines = [f"{name} of transformers, without hf_mim: {name}.from_pretrained", line]
    if "add_pooling_layer" in type(native).__init__.__code__.co_varnames:
        lines.append("its own pooling layer is not part of it: load with add_pooling_layer=False")
    return lines


def native_noise(native, images: Tensor) -> dict:
    """ViTMAE shuffles its patches by a noise; rising values keep their order."""
    if native.config.model_type != "vit_mae":
        return {}
    patches = native.embeddings.patch_embeddings.num_patches
    return {"noise": torch.arange(float(patches)).expand(len(images), -1)}


def refuse(obstacles: list[str], what: str) -> None:
    if obstacles:
        raise ValueError(f"this encoder cannot be exported as {what}, which has no {', no '.join(obstacles)}")


def position_table(model: MIMModel) -> Tensor:
    """Fixed and learned positions as one table (rows * cols, dim)."""
    encoder = model.encoder
    table = torch.zeros(encoder.base_grid[0] * encoder.base_grid[1], encoder.hidden_size)
    if "sincos" in encoder.positions:
        table = table + sincos_2d(encoder.base_grid, encoder.base_grid, encoder.hidden_size)
    return table if encoder.learned_positions is None else table + encoder.learned_positions.table.detach()


def patch_convolution(model: MIMModel) -> Tensor:
    """The patch embedding as the weight of a convolution (dim, channels, rows, cols)."""
    weight = model.encoder.patch_embedding.weight.detach()
    return weight.unflatten(1, (*model.encoder.patch_size, model.config.num_channels)).permute(0, 3, 1, 2).contiguous()


def scaled(linear: nn.Linear, scale: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of a linear layer with the LayerScale after it multiplied in."""
    factor = getattr(scale, "scale", torch.ones(linear.out_features)).detach()
    return {f"{name}.weight": linear.weight.detach() * factor[:, None], f"{name}.bias": linear.bias.detach() * factor}


def named(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def vit_model(model: MIMModel) -> ViTModel:
    encoder, config = model.encoder, model.config
    first, patch = encoder.layers[0], encoder.patch_size
    size = pair(config.image_size)
    native = ViTModel(
        ViTConfig(
            hidden_size=encoder.hidden_size,
            num_hidden_layers=len(encoder.layers),
            num_attention_heads=first.attention.num_heads,
            intermediate_size=first.mlp.fc2.in_features,
            layer_norm_eps=first.norm1.eps,
            image_size=size[0] if size[0] == size[1] else list(size),
            patch_size=patch[0] if patch[0] == patch[1] else list(patch),
            num_channels=config.num_channels,
        ),
        add_pooling_layer=False,
    )
    table = position_table(model)
    state = {
        "embeddings.cls_token": encoder.prefix_tokens.detach()[None],
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, encoder.hidden_size), table])[None],
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
    native.load_state_dict(state)
    return native


def convnet_state(model: MIMModel) -> dict[str, Tensor]:
    """The weights of a ConvNet of transformers under its own names, the norm after pooling included."""
    state = {name: value for name, value in model.encoder.network.state_dict().items() if "layernorm.eps" not in name}
    return state | named("layernorm", model.pooled_norm)


def convnet_model(model: MIMModel) -> nn.Module:
    options = {**model.config.encoder_config}
    model_type = options.pop("model_type", "resnet")
    if options.pop("final_norm", False):
        raise ValueError("transformers' ConvNeXt has its last norm after pooling, this model before: export to timm")
    for ours in [name for name in options if name.startswith("mask_") or name == "pixel_fill"]:
        options.pop(ours)
    native = native_config(model.config, model_type, options)
    network = MODEL_MAPPING[type(native)](native)
    network.load_state_dict(convnet_state(model))
    return network
