"""Maps of several strides from an encoder of one stride."""

from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch, channels, height, width)."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """Four maps of equal size become maps with 4, 2, 1 and 1/2 times the rows and columns: strides 4, 8, 16 and 32 for
    patches of 16 (BEiT, 2106.08254, its code for segmentation, which MAE takes over). The norm between the two
    transposed convolutions is ViTDet's (2203.16527, section 3) instead of a batch norm: it takes any batch.

    Args:
        dim: channels of every map.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            ChannelNorm(dim, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.down2 = nn.MaxPool2d(2, ceil_mode=True)  # odd sides are rounded up

    def forward(self, maps: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four (batch, dim, rows, cols) -> (batch, dim, 4 rows, 4 cols), and with factors 2, 1 and 1/2."""
        return self.up4(maps[0]), self.up2(maps[1]), maps[2], self.down2(maps[3])


def make_pyramid(encoder, config) -> nn.Module:
    """From the maps of `config.out_features` to those that a backbone gives: the pyramid, or the maps as they are.

    Raises:
        ValueError: `config.feature_pyramid` with other than four stages, or with stages of several strides.
    """
    if not config.feature_pyramid:
        return nn.Identity()
    if hasattr(encoder, "strides") or len(set(encoder.num_features)) > 1:
        raise ValueError("feature_pyramid is for encoders of one stride; the stages of this one have several")
    if len(config.out_features) != 4:
        stages = ", ".join(config.out_features)
        raise ValueError(f"feature_pyramid needs four out_features, got {len(config.out_features)}: {stages}")
    return FeaturePyramid(encoder.hidden_size)
