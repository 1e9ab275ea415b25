"""What several test files need: small configs, masks, images."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file

from hf_mim import MIMConfig, MIMModel


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
DECODER_OPTIONS = {  # small values for the options that the decoders share
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "groups": 4,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
TIMM_VIT = {"model_name": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
NATIVE_VIT = {**VIT, "model_type": "vit", "intermediate_size": 32}
DINOV2 = {**VIT, "model_type": "dinov2"}


def tiny_config(**changes) -> MIMConfig:
    """A config of a ViT that is quick to build; `encoder_config` is taken together with its small sizes."""
    encoder = changes.pop("encoder_config", {})
    if changes.get("encoder", "vit") == "vit":
        encoder = {**VIT, **encoder}
    if changes.get("decoder", "transformer") == "transformer" and "decoder_config" not in changes:
        changes["decoder_config"] = {name: DECODER_OPTIONS[name] for name in list(DECODER_OPTIONS)[:3]}
    return MIMConfig(**{"image_size": 16, "encoder_config": encoder, **changes})


def random_masks(batch: int, tokens: int, hidden: int) -> torch.Tensor:
    """bool (batch, tokens) with `hidden` True entries in every row."""
    order = torch.rand(batch, tokens).argsort(dim=1)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, order[:, :hidden], True)


@torch.no_grad()
def perturb(module: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Adds noise to every parameter: tables, tokens and biases that start at zero would hide mistakes."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


# What the targets need that have no default: a teacher, a codebook, features to wrap.
TARGET_OPTIONS = {
    "token_morphing": {"features": {"name": "hog"}},
    "discrete_token": {"features": {"name": "hog", "cell_size": 8}},
}


def target_options(name: str, folder, patch: int = 8) -> dict:
    """`TARGET_OPTIONS` with a small teacher and a codebook of 5 codes for HOG of square patches in `folder`."""
    options = dict(TARGET_OPTIONS.get(name, {}))
    if name in ("teacher_feature", "teacher_features"):
        if not (folder / "teacher").exists():
            MIMModel(tiny_config(image_size=32)).save_pretrained(folder / "teacher")
        teacher = {"teacher": str(folder / "teacher"), "match": "interpolate", "input_size": 32}
        several = {"teachers": [teacher, {**teacher, "layers": [1]}], "norm": "layer"}
        options |= teacher if name == "teacher_feature" else several
    if name == "discrete_token":
        save_file({"codes": torch.rand(5, 27 * (patch // 8) ** 2)}, folder / "codebook.safetensors")
        options = {**options, "codebook": str(folder / "codebook.safetensors")}
    return options


def png(array, mode=None) -> bytes:
    """The file of an array (height, width[, channels]), with mode "P" as indices of colours."""
    file, image = io.BytesIO(), PIL.Image.fromarray(array)
    if mode == "P":
        image.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    image.save(file, "PNG")
    return file.getvalue()


def write_pairs(images: Path, masks: Path, count: int, seed=0, size=(24, 32), channels=3, ids=3, ending="png"):
    """Files p0.png, ... of pictures, every other one turned, and of their masks, which follow from the brightness."""
    rng = np.random.default_rng(seed)
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = size if i % 2 else size[::-1]
        found = rng.integers(ids, size=(height // 8, width // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = (found * 60 + rng.integers(20, size=found.shape)).astype(np.uint8)
        PIL.Image.fromarray(np.dstack([pixels] * 3) if channels == 3 else pixels).save(images / f"p{i}.{ending}")
        PIL.Image.fromarray(found).save(masks / f"p{i}.png")


def save_grey_vits(folder: Path) -> list[str]:
    """Two grey ViTs of this project, 12 and 16 channels wide, saved; their folders."""
    torch.manual_seed(0)
    for width in (12, 16):
        encoder = {"hidden_size": width, "num_hidden_layers": 1}
        model = MIMModel(tiny_config(num_channels=1, image_size=16, encoder_config=encoder))
        perturb(model).save_pretrained(folder / f"vit{width}")
    return [str(folder / "vit12"), str(folder / "vit16")]
