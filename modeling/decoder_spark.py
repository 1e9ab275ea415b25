"""The decoder of SparK as it was released (2301.03580, section 3.2)."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_base import MIMConfigBase
from .decoder_base import Decoder
from .encoder_base import Encoder, patchify
from .initial_weights import draw_as
from .options import unknown_choice
from .sparse import SparseBatchNorm2d, SparseMask


NORMS = ("batch", "layer", "none")


class SparKDecoder(Decoder):
    """From the coarsest map of a sparse ConvNet to an image of full resolution, one block for every doubling
    (SparK, 2301.03580, as released).

    The last map of each stride is normalised over its visible positions, gets a learned token in its hidden ones, is
    projected to the block's width (1x1 for the coarsest map, nothing where the widths agree; 3x3 for the others) and
    is added to what enters the block. A block doubles the resolution by a transposed convolution and halves the width.
    Every pixel of the result is projected to the image's channels.

    Options:
        hidden_size: width of the first block, halved by each block but not below 1.
        norm: batch (over the visible positions), layer or none; None is batch where the encoder has batch norms, else
            layer, as released.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        out_dim: int,
        *,
        hidden_size: int = 768,
        norm: str | None = None,
    ):
        super().__init__(config, encoder)
        strides = sparse_strides(encoder)
        coarsest = strides[-1]
        if out_dim != coarsest**2 * config.num_channels:
            raise ValueError("decoder 'spark' predicts pixels; choose decoder 'unet' for any other target")
        if norm is None:
            norm = "batch" if any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()) else "layer"
        if norm not in NORMS:
            raise unknown_choice("norm of decoder 'spark'", norm, NORMS)
        num_blocks = coarsest.bit_length() - 1
        widths = [max(1, hidden_size // 2**i) for i in range(num_blocks + 1)]
        self.mask = SparseMask()
        self.inputs = nn.ModuleList()
        self.map_index: list[int | None] = []  # which of the encoder's maps enters a block
        for i, width in enumerate(widths[:-1]):
            index = _last_of_stride(strides, coarsest >> i)
            self.map_index.append(index)
            if index is not None:
                channels = encoder.num_features[index]
                self.inputs.append(DensifiedMap(channels, width, 1 if i == 0 else 3, norm, self.mask, self.std))
        self.blocks = nn.ModuleList(_up_block(*pair_of_widths) for pair_of_widths in zip(widths, widths[1:]))
        self.head = nn.Conv2d(widths[-1], config.num_channels, 1)
        for module in self.blocks.modules():
            if isinstance(module, nn.ConvTranspose2d):
                draw_as(module, "kaiming")

    def forward(self, encoded, bool_masked_pos, grid, scope):
        self.mask.visible = ~bool_masked_pos.view(-1, 1, *grid)
        try:
            return patchify(self._image(encoded.feature_maps), grid)
        finally:
            self.mask.visible = None

    def _image(self, maps: tuple[Tensor, ...]) -> Tensor:
        image, inputs = None, iter(self.inputs)
        for index, block in zip(self.map_index, self.blocks):
            if index is not None:
                entering = next(inputs)(maps[index])
                image = entering if image is None else image + entering
            image = block(image)
        return self.head(image)


class DensifiedMap(nn.Module):
    """A sparse map (batch, channels, rows, cols) -> a dense one of `width` channels."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm: str, mask: SparseMask, std: float):
        super().__init__()
        self.mask, self.std = mask, std
        self.norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.norm = SparseBatchNorm2d(channels)
            self.norm.mask = mask
        elif norm == "layer":
            self.norm = ChannelLayerNorm(channels, eps=1e-6)
        self.token = nn.Parameter(torch.zeros(channels))
        same = kernel_size == 1 and channels == width
        self.projection: nn.Module = nn.Identity()
        if not same:
            self.projection = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
            draw_as(self.projection, "torch")

    def init_parameters(self):
        init.trunc_normal_(self.token, std=self.std, a=-self.std, b=self.std)  # cut at one deviation, as released

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        token = self.token.to(normed.dtype)[:, None, None]
        return self.projection(torch.where(self.mask.at(normed), normed, token))


class ChannelLayerNorm(nn.LayerNorm):
    """Over the channels of (batch, channels, rows, cols)."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


def sparse_strides(encoder: Encoder) -> list[int]:
    """The strides of the maps of a sparse ConvNet, the coarsest last.

    Raises:
        ValueError: the encoder is not sparse, or its coarsest stride is not a power of 2.
    """
    if encoder.mask_style != "sparse" or encoder.strides is None:
        raise ValueError("decoder 'spark' needs encoder 'convnet' with mask_style 'sparse'; 'unet' takes any ConvNet")
    coarsest = encoder.strides[-1]
    if coarsest & (coarsest - 1):
        raise ValueError(f"decoder 'spark' doubles its map up to the pixels: stride {coarsest} is not a power of 2")
    return encoder.strides


def _last_of_stride(strides: list[int], stride: int) -> int | None:
    """The deepest stage (the stem, 0, is none) of this stride."""
    return next((i for i in range(len(strides) - 1, 0, -1) if strides[i] == stride), None)


def _up_block(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
        nn.Conv2d(width, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
    )
