"""Where a model runs."""

from typing import TypeVar, cast

import torch
from torch import nn


ModuleT = TypeVar("ModuleT")


def best_device() -> torch.device:
    """The GPU or other accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def on_device(model: ModuleT, device: torch.device | str) -> ModuleT:
    """The model itself, moved: `PreTrainedModel.to` has no type."""
    return cast(ModuleT, cast(nn.Module, model).to(device))
