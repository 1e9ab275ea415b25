"""From encoded tokens to predictions on the mask grid. A decoder is a class in `DECODERS`.

Made as `Decoder(config, encoder, out_dim, **options)` and called with (encoded, bool_masked_pos, grid, scope); returns
(batch, K, out_dim): the hidden tokens in raster order where it can leave the others out and `scope` is "hidden", else
all tokens of the grid. Where the encoder's map is coarser than the mask grid, the decoder upsamples.
"""

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_base import MIMConfigBase
from .decoder_base import Decoder
from .decoder_convnext import ConvNeXtDecoder
from .decoder_spark import SparKDecoder
from .encoder_base import Encoder, EncoderOutput, Grid, choose, map_to_tokens, tokens_to_map
from .initial_weights import LINEAR, draw_as
from .layers import CrossLayer, FixedTables, PixelShuffleLinear, ViTLayer, sincos_2d, take_tokens
from .masking import num_hidden_tokens
from .options import OptionError, at_least, pair


class LinearDecoder(Decoder):
    """One linear layer (SimMIM, A2MIM: a 1x1 convolution and a pixel shuffle).

    Options:
        initialization: how its weights are drawn: xavier, trunc_normal (BEiT-v2, DTM), normal (A2MIM) or torch, torch's
            default (SimMIM).
    """

    def __init__(self, config: MIMConfigBase, encoder: Encoder, out_dim: int, *, initialization: str = "xavier"):
        super().__init__(config, encoder)
        self._need_all_tokens("linear")
        self.head = PixelShuffleLinear(encoder.hidden_size, out_dim, self.factor)
        draw_as(self.head.linear, choose("initialization of decoder 'linear'", initialization, LINEAR))

    def forward(self, encoded, bool_masked_pos, grid, scope):
        return self.head(encoded.tokens[:, self.num_prefix_tokens :], grid)


class MLPDecoder(Decoder):
    """Two linear layers on each token with LayerNorm and GELU between them (RADIO's heads, 2312.06709).

    Options:
        hidden_size: of the first layer; None: that of the encoder.
    """

    def __init__(self, config: MIMConfigBase, encoder: Encoder, out_dim: int, *, hidden_size: int | None = None):
        super().__init__(config, encoder)
        self._need_all_tokens("mlp")
        width = hidden_size or encoder.hidden_size
        self.layers = nn.Sequential(nn.Linear(encoder.hidden_size, width), nn.LayerNorm(width, eps=1e-6), nn.GELU())
        self.head = PixelShuffleLinear(width, out_dim, self.factor)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        return self.head(self.layers(encoded.tokens[:, self.num_prefix_tokens :]), grid)


class TransformerDecoder(Decoder):
    """A narrow transformer over all tokens, a learned token standing for the hidden ones (MAE, 2111.06377).

    Options:
        hidden_size: width, divisible by 4.
        num_hidden_layers, num_attention_heads: depth, at least 1, and heads.
        intermediate_size: of the MLPs; None is 4 * hidden_size.
        layer_norm_eps: of the LayerNorms.
    """

    layer_class: type[ViTLayer | CrossLayer] = ViTLayer

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        out_dim: int,
        *,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 16,
        intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__(config, encoder)
        if hidden_size % 4:
            raise ValueError(f"the decoder's hidden_size must be divisible by 4, got {hidden_size}")
        at_least(1, "the decoder's ", num_hidden_layers=num_hidden_layers)
        self.hidden_size = hidden_size
        self.embed = PixelShuffleLinear(encoder.hidden_size, hidden_size, self.factor)
        needs_token = encoder.drops_tokens or self.layer_class is CrossLayer
        self.mask_token = nn.Parameter(torch.zeros(hidden_size)) if needs_token else None
        self.positions = FixedTables(partial(sincos_2d, base=self.base_grid, dim=hidden_size))
        width = (hidden_size, num_attention_heads, intermediate_size or 4 * hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, *width, eps=layer_norm_eps) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.head = nn.Linear(hidden_size, out_dim)

    def init_parameters(self):
        if self.mask_token is not None:
            init.normal_(self.mask_token, std=self.std)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        positions = self.positions(grid, encoded.tokens.device)
        if encoded.visible_index is None:
            tokens, num_queries = self._all_tokens(encoded, grid, positions), None
        else:
            # The order of tokens is free, as each carries its position: visible first, hidden last. The last block
            # then computes only what is asked for.
            tokens = self._visible_then_hidden(encoded, grid, positions)
            num_queries = encoded.hidden_index.shape[1] if scope == "hidden" else None
        for layer in self.layers[:-1]:
            tokens, _ = layer(tokens)
        tokens, _ = self.layers[-1](tokens, None, None, num_queries)
        if num_queries is None:
            tokens = tokens[:, self.num_prefix_tokens :]
            if encoded.visible_index is not None:
                order = torch.cat([encoded.visible_index, encoded.hidden_index], dim=1)
                tokens = take_tokens(tokens, order.argsort(dim=1))
        return self.head(self.norm(tokens))

    def _all_tokens(self, encoded: EncoderOutput, grid: Grid, positions: Tensor) -> Tensor:
        prefix, patches = encoded.tokens.tensor_split([self.num_prefix_tokens], dim=1)
        patches = self.embed(patches, grid) + positions.to(patches.dtype)
        return patches if not self.num_prefix_tokens else torch.cat([self.embed(prefix, grid), patches], dim=1)

    def _visible_then_hidden(self, encoded: EncoderOutput, grid: Grid, positions: Tensor) -> Tensor:
        visible = self.embed(encoded.tokens, grid)
        assert encoded.visible_index is not None and self.mask_token is not None
        table = F.pad(positions.to(visible.dtype), (0, 0, self.num_prefix_tokens, 0))  # the prefix has no place: zeros
        index = F.pad(encoded.visible_index + self.num_prefix_tokens, (self.num_prefix_tokens, 0))
        hidden = self.mask_token.to(visible.dtype) + positions.to(visible.dtype)[encoded.hidden_index]
        return torch.cat([visible + table[index], hidden], dim=1)


class CrossAttentionDecoder(TransformerDecoder):
    """A learned token for each token asked for looks at the encoder's tokens, not at the others (CrossMAE,
    2401.14391).

    Options:
        mix_blocks: whether each block looks at a sum of its own, with learned weights, of what enters the encoder's
            first block and leaves each, in place of the encoder's output (inter-block attention). Choices made here:
            what leaves the last block has passed the encoder's last norm, and the sum passes a LayerNorm.
        prediction_ratio: share of all tokens that a training step predicts, drawn at random among the hidden ones; None
            predicts all of these, as evaluation does.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, layer_norm_eps: as of `transformer`.
    """

    layer_class = CrossLayer

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        out_dim: int,
        *,
        mix_blocks: bool = False,
        prediction_ratio: float | None = None,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 16,
        intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__(
            config,
            encoder,
            out_dim,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            layer_norm_eps=layer_norm_eps,
        )
        if prediction_ratio is not None:
            self._check_ratio(config, encoder, prediction_ratio)
        if mix_blocks and (encoder.strides is not None or set(encoder.num_features) != {encoder.hidden_size}):
            raise OptionError("mix_blocks needs an encoder whose blocks all have the same width", "mix_blocks", True)
        self.prediction_ratio, self.needs_hidden_states = prediction_ratio, mix_blocks
        norms = num_hidden_layers if mix_blocks else 0
        self.mix = nn.Parameter(torch.zeros(num_hidden_layers, len(encoder.num_features))) if mix_blocks else None
        self.mix_norms = nn.ModuleList(nn.LayerNorm(encoder.hidden_size, eps=layer_norm_eps) for _ in range(norms))

    def _check_ratio(self, config: MIMConfigBase, encoder: Encoder, ratio: float):
        hidden = num_hidden_tokens(config, self.base_grid) / math.prod(self.base_grid)
        if not encoder.drops_tokens:
            message = (
                f"prediction_ratio {ratio} needs an encoder that drops hidden tokens, which this one does not: set "
                "model.decoder_config.prediction_ratio=null to predict all of them"
            )
        elif not 0 < ratio <= 1:
            message = f"prediction_ratio {ratio} must be in (0, 1]"
        elif ratio > hidden + 1e-9:
            message = f"prediction_ratio {ratio} is more than the {hidden:.0%} of the tokens that are hidden"
        else:
            return
        raise OptionError(message, "prediction_ratio", ratio)

    def init_parameters(self):
        super().init_parameters()
        if self.mix is not None:
            init.normal_(self.mix, std=self.mix.shape[1] ** -0.5)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        positions = self.positions(grid, encoded.tokens.device).to(encoded.tokens.dtype)
        if encoded.visible_index is None or scope == "all":
            places = positions.expand(len(encoded.tokens), -1, -1)
        else:
            places = positions[encoded.hidden_index]
        queries = self.mask_token.to(places.dtype) + places
        for layer, context in zip(self.layers, self._contexts(encoded, grid, positions)):
            queries = layer(queries, context)
        return self.head(self.norm(queries))

    def _contexts(self, encoded: EncoderOutput, grid: Grid, positions: Tensor) -> list[Tensor]:
        """What each block looks at, (batch, prefix + visible, hidden_size)."""
        if self.mix is None:
            return [self._context(encoded.tokens, encoded.visible_index, grid, positions)] * len(self.layers)
        assert encoded.hidden_states is not None
        states = [state if state.ndim == 3 else map_to_tokens(state) for state in encoded.hidden_states[:-1]]
        stacked = torch.stack([*states, encoded.tokens])
        mixed = torch.tensordot(self.mix.to(stacked.dtype), stacked, dims=1)
        tokens = (norm(part) for norm, part in zip(self.mix_norms, mixed))
        return [self._context(part, encoded.visible_index, grid, positions) for part in tokens]

    def _context(self, tokens: Tensor, index: Tensor | None, grid: Grid, positions: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        patches = self.embed(tokens[:, prefix:], grid)
        patches = patches + (positions if index is None else positions[index]).to(patches.dtype)
        return patches if not prefix else torch.cat([self.embed(tokens[:, :prefix], grid), patches], dim=1)


class ConvDecoder(Decoder):
    """Grouped convolutions on the mask grid, then a linear layer (data2vec 2.0, 2212.07525, section 3.1).

    Options:
        hidden_size, num_hidden_layers: channels and number of the convolutions.
        kernel_size: of the convolutions, odd.
        groups: of the convolutions; must divide the widths of encoder and decoder.
        hidden: what stands in hidden places where the encoder drops them: noise, N(0, noise_std) in training and 0 in
            evaluation, as released, or token, a learned one.
        noise_std: see there.
        embed: whether a linear layer comes first; the release has none. It is needed for a map coarser than the mask
            grid.
        layer_norm_eps: of the norms without parameters behind the convolutions.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        out_dim: int,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        kernel_size: int = 3,
        groups: int = 16,
        hidden: str = "noise",
        noise_std: float = 0.01,
        embed: bool = False,
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__(config, encoder)
        has_token = choose("hidden of decoder 'conv'", hidden, ("noise", "token")) == "token" and encoder.drops_tokens
        self.noise_std = noise_std
        embed = embed or self.factor != (1, 1)
        widths = [hidden_size if embed else encoder.hidden_size, *[hidden_size] * num_hidden_layers]
        if any(width % groups for width in widths) or kernel_size % 2 == 0:
            raise ValueError(f"groups {groups} must divide the widths {widths}, kernel_size {kernel_size} be odd")
        self.embed = PixelShuffleLinear(encoder.hidden_size, hidden_size, self.factor) if embed else None
        self.mask_token = nn.Parameter(torch.zeros(widths[0])) if has_token else None
        self.layers = nn.ModuleList(
            nn.Conv2d(*widths, kernel_size, padding=kernel_size // 2, groups=groups)
            for widths in zip(widths, widths[1:])
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, elementwise_affine=False)
        self.head = nn.Linear(hidden_size, out_dim)
        for layer in (*self.layers, self.head):  # as released
            draw_as(cast(nn.Conv2d | nn.Linear, layer), "torch")

    def init_parameters(self):
        if self.mask_token is not None:
            init.normal_(self.mask_token, std=self.std)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        tokens = encoded.tokens[:, self.num_prefix_tokens :]
        tokens = tokens if self.embed is None else self.embed(tokens, grid)
        if encoded.visible_index is not None:
            hidden = self._hidden_tokens(tokens.new_zeros(len(tokens), encoded.hidden_index.shape[1], tokens.shape[2]))
            order = torch.cat([encoded.visible_index, encoded.hidden_index], dim=1)
            tokens = take_tokens(torch.cat([tokens, hidden], dim=1), order.argsort(dim=1))
        for layer in self.layers:
            branch = F.gelu(self.norm(map_to_tokens(layer(tokens_to_map(tokens, grid)))))
            tokens = tokens + branch if branch.shape == tokens.shape else branch
        return self.head(tokens)

    def _hidden_tokens(self, zeros: Tensor) -> Tensor:
        """What stands in the hidden places, of the shape (batch, hidden, dim) of `zeros`."""
        if self.mask_token is not None:
            return zeros + self.mask_token.to(zeros.dtype)
        return zeros.normal_(0, self.noise_std) if self.training else zeros


class UNetDecoder(Decoder):
    """From the coarsest to the finest map of a ConvNet, each with a learned token in its hidden positions (SparK,
    2301.03580, section 3.2): upsample, convolve, add the next map.

    Where the target is an image (its values fill the cells pixel by pixel), every position of the finest map predicts
    its own pixels; otherwise the finest map is averaged over each cell.

    Options:
        hidden_size: width at the coarsest map; halved at each finer one, but not below 16.
    """

    def __init__(self, config: MIMConfigBase, encoder: Encoder, out_dim: int, *, hidden_size: int = 512):
        super().__init__(config, encoder)
        if encoder.strides is None or encoder.drops_tokens:
            raise ValueError("decoder 'unet' needs the feature maps of encoder 'convnet'")
        widths, strides = encoder.num_features[:0:-1], encoder.strides[:0:-1]
        hidden = [max(16, hidden_size // 2**i) for i in range(len(widths))]
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in widths)
        self.tokens = nn.ParameterList(torch.zeros(width) for width in widths)
        self.inputs = nn.ModuleList(nn.Conv2d(width, size, 1) for width, size in zip(widths, hidden))
        self.blocks = nn.ModuleList(_up_block(*pair_of_widths) for pair_of_widths in zip(hidden, hidden[1:]))
        height, width = pair(config.image_size)
        cell = (height // self.base_grid[0], width // self.base_grid[1])
        if min(cell) < strides[-1]:
            raise ValueError(f"decoder 'unet' needs mask cells of {strides[-1]} pixels or more, not {min(cell)}")
        self.inside = tuple(length // strides[-1] for length in cell)  # positions of the finest map in a cell
        self.by_pixel = out_dim == cell[0] * cell[1] * config.num_channels
        self.channels = config.num_channels
        self.stride = strides[-1]
        self.head = nn.Linear(hidden[-1], self.channels * self.stride**2 if self.by_pixel else out_dim)

    def init_parameters(self):
        for token in self.tokens:
            init.trunc_normal_(token, std=self.std)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        image = None
        for i, features in enumerate(encoded.feature_maps[:0:-1]):
            entering = self.inputs[i](self._densify(features, bool_masked_pos, grid, i))
            if image is not None:
                entering = entering + self.blocks[i - 1](F.interpolate(image, size=entering.shape[2:]))
            image = entering
        batch, channels, height, width = image.shape
        (down, right), side = self.inside, self.stride
        cells = image.view(batch, channels, grid[0], down, grid[1], right).permute(0, 2, 4, 3, 5, 1)
        if not self.by_pixel:
            return self.head(cells.mean(dim=(3, 4))).flatten(1, 2)
        pixels = self.head(cells).unflatten(-1, (side, side, self.channels))  # a square of pixels per position
        return pixels.transpose(4, 5).reshape(batch, grid[0] * grid[1], -1)

    def _densify(self, features: Tensor, mask: Tensor, grid: Grid, i: int) -> Tensor:
        normed = self.norms[i](features.permute(0, 2, 3, 1))
        hidden = mask.view(-1, 1, *grid).float()
        if features.shape[2] < grid[0]:  # a position of a coarse map is hidden where all its cells are
            hidden = -F.adaptive_max_pool2d(-hidden, features.shape[2:])
        hidden = F.interpolate(hidden, size=features.shape[2:]).bool().permute(0, 2, 3, 1)
        return torch.where(hidden, self.tokens[i].to(normed.dtype), normed).permute(0, 3, 1, 2)


def _up_block(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
        nn.Conv2d(width, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
    )


DECODERS = {
    "linear": LinearDecoder,
    "mlp": MLPDecoder,
    "transformer": TransformerDecoder,
    "cross_attention": CrossAttentionDecoder,
    "conv": ConvDecoder,
    "convnext": ConvNeXtDecoder,
    "unet": UNetDecoder,
    "spark": SparKDecoder,
}
