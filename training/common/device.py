"""Where a model runs."""

import os
from typing import TypeVar, cast

import torch
from torch import nn


ModuleT = TypeVar("ModuleT")


def best_device() -> torch.device:
    """The GPU or other accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices by instruction, on its GPU or, without one, on its CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def cores_per_process() -> int:
    """The CPU cores that this process may use, shared with the other processes of the run on this machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def on_device(model: ModuleT, device: torch.device | str) -> ModuleT:
    """The model itself, moved: `PreTrainedModel.to` has no type."""
    return cast(ModuleT, cast(nn.Module, model).to(device))
