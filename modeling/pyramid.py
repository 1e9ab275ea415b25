"""Maps of several strides from an encoder of one stride."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import initialization as init

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch, channels, height, width)."""

    def init_parameters(self):
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.ModuleList):
    """Scales each of several maps of one size by its own factor. The factors 4, 2, 1 and 1/2 make strides 4, 8, 16 and
    32 of patches of 16, as BEiT (2106.08254) does for segmentation, whose code MAE takes over.

    Maps grow by transposed convolutions and shrink by taking the maximum; sides that do not divide are rounded up. The
    norm between two convolutions is ViTDet's (2203.16527, section 3) instead of a batch norm: it takes any batch.

    Args:
        dim: channels of every map.
        factors: one per map, powers of two.
    """

    def __init__(self, dim: int, factors: Sequence[float]):
        super().__init__(scale_map(dim, factor) for factor in factors)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Each (batch, dim, rows, cols) -> (batch, dim, factor * rows, factor * cols)."""
        return tuple(scale(features) for scale, features in zip(self, maps, strict=True))


def scale_map(dim: int, factor: float) -> nn.Module:
    """(batch, dim, rows, cols) -> (batch, dim, factor * rows, factor * cols).

    Raises:
        ValueError: the factor is no power of two.
    """
    steps = math.log2(factor) if factor > 0 else 0.5
    if steps != round(steps):
        raise ValueError(f"factors of feature_pyramid are powers of two like 4 or 0.5, not {factor}")
    if steps == 0:
        return nn.Identity()
    if steps < 0:
        return nn.MaxPool2d(round(1 / factor), ceil_mode=True)
    layers = []
    for _ in range(round(steps)):
        layers += [nn.ConvTranspose2d(dim, dim, 2, stride=2), ChannelNorm(dim, eps=1e-6), nn.GELU()]
    return nn.Sequential(*layers[:-2])


def make_pyramid(encoder: Encoder, config: MIMConfigBase) -> nn.Module:
    """From the maps of `config.out_features` to those that a backbone gives: the pyramid, or the maps as they are.

    Raises:
        ValueError: `config.feature_pyramid` for stages of several strides, or with another number of factors.
    """
    factors, stages = config.feature_pyramid, config.out_features
    if factors is None:
        return nn.Identity()
    if encoder.strides is not None or len(set(encoder.num_features)) > 1:
        raise ValueError("feature_pyramid is for encoders of one stride; the stages of this one have several")
    if len(factors) != len(stages):
        raise ValueError(f"feature_pyramid has {len(factors)} factors for {len(stages)} stages: {', '.join(stages)}")
    return FeaturePyramid(encoder.hidden_size, factors)
