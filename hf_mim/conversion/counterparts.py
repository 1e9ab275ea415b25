"""What exports have in common: parts of an encoder as other libraries have them, and the comparison of the two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair


LARGEST_DIFFERENCE = 1e-5


def check_same(model: MIMModel, other: Callable[[Tensor], Tensor], what: str) -> str:
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
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape)}, not {tuple(ours.shape)}"
        raise ValueError(f"cannot be exported as {what}: its tokens would be {shapes}")
    difference = float(((ours - theirs).abs() / ours.abs().clamp(min=1)).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"cannot be exported as {what}: its outputs would differ by {difference:.1e}")
    return f"outputs differ by {difference:.0e} at most, on random images of the checkpoint's size"


def refuse(obstacles: list[str], what: str) -> None:
    if obstacles:
        raise ValueError(f"this encoder cannot be exported as {what}, which has no {', no '.join(obstacles)}")


def position_table(model: MIMModel) -> Tensor:
    """Fixed and learned positions as one table (rows * cols, dim), for the patches of the config's image size."""
    encoder: Any = model.encoder
    positions = encoder.token_positions(encoder.base_grid, torch.device("cpu"))
    if positions is None:
        return torch.zeros(encoder.base_grid[0] * encoder.base_grid[1], encoder.hidden_size)
    return positions[0].detach()


def patch_convolution(model: MIMModel) -> Tensor:
    """The patch embedding as the weight of a convolution (dim, channels, rows, cols)."""
    encoder: Any = model.encoder
    weight = encoder.patch_embedding.weight.detach()
    return weight.unflatten(1, (*encoder.patch_size, model.config.num_channels)).permute(0, 3, 1, 2).contiguous()


def scaled(linear: nn.Linear, scale: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of a linear layer with the LayerScale after it multiplied in."""
    factor = getattr(scale, "scale", torch.ones(linear.out_features)).detach()
    return {f"{name}.weight": linear.weight.detach() * factor[:, None], f"{name}.bias": linear.bias.detach() * factor}


def named(name: str, module: nn.Module | None) -> dict[str, Tensor]:
    """The weights of a module under a name; none of a module that is not there."""
    if module is None:
        return {}
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}
