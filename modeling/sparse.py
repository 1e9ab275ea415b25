"""ConvNets that compute on visible positions only (SparK, 2301.03580): dense convolutions on masked maps."""

from typing import cast

import torch
from torch import Tensor, nn


class SparseMask:
    """Which positions are visible in the image that is being encoded; None lets everything pass."""

    visible: Tensor | None = None  # (batch, 1, rows, cols), bool, on the mask grid

    def at(self, features: Tensor) -> Tensor:
        """`visible` at the resolution of (batch, channels, height, width)."""
        assert self.visible is not None
        rows, cols = (length // cells for length, cells in zip(features.shape[2:], self.visible.shape[2:]))
        return self.visible.repeat_interleave(rows, dim=2).repeat_interleave(cols, dim=3)


class SparseBatchNorm2d(nn.BatchNorm2d):
    """Batch statistics over the visible positions only."""

    mask: SparseMask

    def forward(self, features: Tensor) -> Tensor:
        if self.mask.visible is None or not self.training:
            return super().forward(features)
        hidden = ~self.mask.at(features)
        count = (~hidden).to(features.dtype).sum()
        mean = features.masked_fill(hidden, 0).sum((0, 2, 3)) / count
        gap = features - mean[:, None, None]
        variance = gap.square().masked_fill(hidden, 0).sum((0, 2, 3)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                # A momentum of None asks for the plain average over all batches.
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
        normalised = gap * torch.rsqrt(variance + self.eps)[:, None, None]
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


def make_sparse(network: nn.Module, mask: SparseMask) -> None:
    """Lets nothing of a hidden position reach another one: the input of everything that mixes positions is masked, and
    batch norm counts visible positions only. Parameters and their names stay as they are.

    Raises:
        ValueError: the network normalises in a way that mixes positions and is not known here.
    """

    def hide(module: nn.Module, arguments: tuple) -> tuple | None:
        if mask.visible is None:
            return None
        # A product would let NaN and infinity through, and `masked_fill` changes the memory format.
        return (torch.where(mask.at(arguments[0]), arguments[0], arguments[0].new_zeros(())), *arguments[1:])

    def hide_last_axis(module: nn.Module, arguments: tuple) -> tuple | None:
        if mask.visible is None:
            return None
        visible = mask.at(arguments[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (torch.where(visible, arguments[0], arguments[0].new_zeros(())), *arguments[1:])

    for module in network.modules():
        kind = type(module).__name__
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SparseBatchNorm2d
            cast(SparseBatchNorm2d, module).mask = mask
        elif isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 or isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(hide)
        elif kind == "ConvNextV2GRN":
            module.register_forward_pre_hook(hide_last_axis)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.AvgPool2d) or "GlobalResponseNorm" in kind:
            raise ValueError(f"mask_style 'sparse' knows no way to keep hidden positions out of {kind}")
