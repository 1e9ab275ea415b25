"""The vision transformer that can hide tokens: the heart of the project."""

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_base import MIMConfigBase
from .encoder_base import (
    NO_MASK_TOKEN,
    PIXEL_FILLS,
    Encoder,
    EncoderOutput,
    Grid,
    choose,
    fill_hidden_pixels,
    grid_size,
    patchify,
    split_mask,
    tokens_to_map,
)
from .initial_weights import INITIALIZATIONS, draw_default_bias, draw_linear
from .layers import (
    FixedTables,
    LearnedPositions,
    RelativePositionBias,
    ViTLayer,
    rotary_2d,
    rotary_normalized_2d,
    sincos_2d,
    take_tokens,
)
from .masking import hides_tokens
from .mlp import ACTIVATIONS
from .options import Size, at_least, pair


# (patch_size, hidden_size, num_hidden_layers, num_attention_heads), as in DeiT, ViT and MAE.
NORMS = ("pre", "post")
SIZES = {
    "tiny": (16, 192, 12, 3),
    "small": (16, 384, 12, 6),
    "base": (16, 768, 12, 12),
    "large": (16, 1024, 24, 16),
    "huge": (14, 1280, 32, 16),
}
ROTARY = ("rotary", "rotary_normalized")
POSITIONS = ("sincos", "learned", "relative", "shared_relative", *ROTARY, "none")


def sizes_of(
    size: str, patch_size: Size | None, hidden_size: int | None, num_layers: int | None, num_heads: int | None
) -> tuple[Grid, int, int, int]:
    """-> the patch, width, depth and heads that were given, those of the named size in place of None."""
    patch, dim, depth, heads = SIZES[choose("size", size, SIZES)]
    depth = depth if num_layers is None else num_layers
    at_least(1, num_hidden_layers=depth)
    dim, heads = dim if hidden_size is None else hidden_size, heads if num_heads is None else num_heads
    return pair(patch if patch_size is None else patch_size), dim, depth, heads


def mlp_width(dim: int, mlp: str, intermediate_size: int | None) -> int:
    """Of the MLP between its two layers; where it is not given, SwiGLU's three matrices are as large as GELU's two."""
    swiglu = choose("mlp", mlp, (*ACTIVATIONS, "swiglu")) == "swiglu"
    return intermediate_size or (-(-8 * dim // 24) * 8 if swiglu else 4 * dim)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The drop rate of every block: from 0, growing linearly to `last`.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {last}")
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class ViTEncoder(Encoder):
    """A ViT (2010.11929) whose patches can be hidden in three ways.

    Options:
        size: tiny, small, base, large or huge; gives the defaults of the next four, which win where they are set.
        patch_size: pixels, an int or a (height, width) pair.
        hidden_size, num_hidden_layers, num_attention_heads: width, depth and heads; None is that of `size`.
        intermediate_size: of the MLP; 4 * hidden_size, for SwiGLU 8/3 of it rounded up to a multiple of 8.
        mask_style: `drop` encodes the visible patches only (MAE, 2111.06377); `token` puts a learned token in the
            place of hidden ones (BEiT, SimMIM); `add` adds it to them (A2MIM).
        mask_stage: the block before which `token` and `add` act; 0 is right after the patch embedding.
        pixel_fill: what hidden pixels are replaced by before the network: none, mean (A2MIM) or zero.
        position_embedding: sincos, learned, relative, shared_relative (one table for all blocks), rotary,
            rotary_normalized (DINOv3) or none; a list of them for several at once.
        position_grid: rows and columns of the patches that the positions are those of; None is the grid of
            `image_size`. Other grids cover the same picture: tables are resized, coordinates scaled.
        num_register_tokens: extra tokens without a patch (2309.16588), after the class token.
        use_cls_token: whether there is a class token; it comes first.
        num_cls_tokens: how many there are (Pixio: 8); what asks for the class token gets their mean.
        layer_scale_init_value: what the learned factors behind each branch of a block start from; None has none.
        drop_path_rate: probability that a branch of the last block is left out in training; it grows linearly with
            depth.
        qk_norm: whether queries and keys pass a norm before they meet.
        mlp: of the blocks: gelu, gelu_tanh (SigLIP), quick_gelu (CLIP) or swiglu.
        layer_norm_eps: of the LayerNorms.
        block_norm: pre, or post: the norms stand behind each sum (data2vec 2.0).
        embedding_norm: whether the tokens pass a LayerNorm before the first block (data2vec 2.0, CLIP).
        final_norm: whether the tokens pass a last LayerNorm.
        initialization: how the weights are drawn: xavier (MAE), trunc_normal (SimMIM, BEiT-v2, DTM), normal (A2MIM) or
            data2vec; see `initial_weights.py`.
    """

    export_formats = ("transformers", "timm", "onnx")

    def __init__(
        self,
        config: MIMConfigBase,
        use_mask_token: bool = False,
        *,
        size: str = "base",
        patch_size: int | tuple[int, int] | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
        mask_style: str = "drop",
        mask_stage: int = 0,
        pixel_fill: str = "none",
        position_embedding: str | list[str] = "sincos",
        position_grid: int | list[int] | tuple[int, int] | None = None,
        num_register_tokens: int = 0,
        use_cls_token: bool = True,
        num_cls_tokens: int = 1,
        layer_scale_init_value: float | None = None,
        drop_path_rate: float = 0.0,
        qk_norm: bool = False,
        mlp: str = "gelu",
        layer_norm_eps: float = 1e-6,
        block_norm: str = "pre",
        embedding_norm: bool = False,
        final_norm: bool = True,
        initialization: str = "xavier",
    ):
        super().__init__()
        patch, dim, depth, heads = sizes_of(size, patch_size, hidden_size, num_hidden_layers, num_attention_heads)
        self.config, self.patch_size, self.hidden_size = config, patch, dim
        self.initialization = choose("initialization", initialization, INITIALIZATIONS)
        self._name_stages([dim] * (depth + 1))
        self._set_masking(mask_style, mask_stage, pixel_fill, depth)
        self._add_embeddings(use_cls_token, num_cls_tokens, num_register_tokens, use_mask_token)
        self._add_positions(position_embedding, position_grid, dim, depth, heads)
        self._add_norms(embedding_norm, final_norm, layer_norm_eps)
        width, post_norm = mlp_width(dim, mlp, intermediate_size), choose("block_norm", block_norm, NORMS) == "post"
        block = partial(ViTLayer, config, dim, heads, width, mlp, qk_norm, layer_scale_init_value, post_norm=post_norm)
        self.layers = nn.ModuleList(block(rate, layer_norm_eps) for rate in drop_path_rates(drop_path_rate, depth))

    def _add_norms(self, embedding_norm: bool, final_norm: bool, eps: float):
        self.embedding_norm = nn.LayerNorm(self.hidden_size, eps=eps) if embedding_norm else nn.Identity()
        self.final_norm = nn.LayerNorm(self.hidden_size, eps=eps) if final_norm else nn.Identity()

    def _set_masking(self, mask_style: str, mask_stage: int, pixel_fill: str, depth: int):
        self.mask_style = choose("mask_style", mask_style, ("drop", "token", "add"))
        self.pixel_fill = choose("pixel_fill", pixel_fill, PIXEL_FILLS)
        self.mask_stage = mask_stage
        self.drops_tokens = mask_style == "drop" and hides_tokens(self.config)
        if not 0 <= mask_stage < depth or (mask_stage and mask_style == "drop"):
            raise ValueError(f"mask_stage {mask_stage} must be 0 with mask_style 'drop', else from 0 to {depth - 1}")

    def _add_embeddings(self, use_cls_token: bool, num_cls_tokens: int, num_registers: int, use_mask_token: bool):
        at_least(1, num_cls_tokens=num_cls_tokens)
        at_least(0, num_register_tokens=num_registers)
        self.num_cls_tokens = num_cls_tokens if use_cls_token else 0
        self.num_prefix_tokens = self.num_cls_tokens + num_registers
        dim, channels = self.hidden_size, self.config.num_channels
        self.patch_embedding = nn.Linear(math.prod(self.patch_size) * channels, dim)
        self.prefix_tokens = nn.Parameter(torch.zeros(self.num_prefix_tokens, dim)) if self.num_prefix_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(dim)) if use_mask_token and not self.drops_tokens else None
        self.base_grid = grid_size(pair(self.config.image_size), self.patch_size, "patch")

    def _add_positions(self, names: str | list[str], grid: Size | None, dim: int, depth: int, heads: int):
        self.position_grid = self.base_grid if grid is None else pair(grid)
        self.positions = {names} if isinstance(names, str) else set(names)
        for name in self.positions:
            choose("position_embedding", name, POSITIONS)
        self.traces_any_size = not self.positions & {
            "learned",
            "relative",
            "shared_relative",
        }  # tables that are resized
        if "sincos" in self.positions and dim % 4:
            raise ValueError(f"sincos positions need a hidden_size divisible by 4, got {dim}")
        if self.positions & set(ROTARY) and (dim // heads) % 4:
            raise ValueError(f"rotary positions need a head size divisible by 4, got {dim} / {heads} heads")
        base = self.position_grid
        self.learned_positions = LearnedPositions(base, dim) if "learned" in self.positions else None
        tables = depth if "relative" in self.positions else 0
        self.relative = nn.ModuleList(RelativePositionBias(base, heads) for _ in range(tables))
        shared = "shared_relative" in self.positions
        self.shared_relative = RelativePositionBias(base, heads) if shared else None
        self.sincos = FixedTables(partial(sincos_2d, base=base, dim=dim))
        normalized = "rotary_normalized" in self.positions
        make = partial(rotary_normalized_2d if normalized else partial(rotary_2d, base=base), head_dim=dim // heads)
        self.rotary = FixedTables(make)

    def init_parameters(self):
        """After the parts have drawn theirs."""
        kind = self.initialization
        std = self.config.initializer_range
        cut = std if kind == "trunc_normal" else 2.0  # torch's bound, far out
        for tokens in (self.prefix_tokens, self.mask_token):
            if tokens is not None:
                init.trunc_normal_(tokens, std=std, a=-cut, b=cut)
        if kind == "xavier":
            return
        for i, layer in enumerate(self.layers):
            linear = "trunc_normal" if kind == "trunc_normal" else "normal"
            depth = (2 * (i + 1)) ** -0.5 if kind == "trunc_normal" else 1.0
            for part in (layer.attention.qkv, layer.mlp.fc1):
                draw_linear(part, linear)
            for part in (layer.attention.proj, layer.mlp.fc2):
                draw_linear(part, linear, depth)
        if kind == "data2vec":
            draw_linear(self.patch_embedding, "xavier")
            draw_default_bias(self.patch_embedding)
            if self.prefix_tokens is not None:
                init.normal_(self.prefix_tokens)
        else:
            draw_linear(self.patch_embedding, "trunc_normal" if kind == "trunc_normal" else "torch")

    def blocks(self) -> list[list[nn.Module]]:
        return [[layer, *self.relative[i : i + 1]] for i, layer in enumerate(self.layers)]

    def modules_after_blocks(self) -> list[nn.Module]:
        return [self.final_norm] if self.shared_relative is None else [self.final_norm, self.shared_relative]

    def extra_parts(self) -> list[str]:
        """What this encoder has, or lacks, compared with the ViT of 2010.11929, as words for a message. LayerScale does
        not count: it can be multiplied into the layer before it."""
        layer = cast(ViTLayer, self.layers[0])
        parts = {
            "relative position bias": bool(self.positions & {"relative", "shared_relative"}),
            "rotary positions": bool(self.positions & set(ROTARY)),
            "register tokens": self.num_prefix_tokens > self.num_cls_tokens,
            "encoder without a class token": not self.has_cls_token,
            "normalised queries and keys (qk_norm)": layer.attention.q_norm is not None,
            "SwiGLU": layer.mlp.gated,
            f"activation {layer.mlp.kind}": layer.mlp.kind in ("gelu_tanh", "quick_gelu"),
            "norms behind the branches (block_norm post)": layer.post_norm,
            "norm before the first block (embedding_norm)": not isinstance(self.embedding_norm, nn.Identity),
            "encoder without a last norm (final_norm false)": isinstance(self.final_norm, nn.Identity),
        }
        return [name for name, present in parts.items() if present]

    def mask_grid(self, height: int, width: int) -> Grid:
        return grid_size((height, width), self.patch_size, "patch")

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        grid = self.mask_grid(*pixel_values.shape[2:])
        tokens, visible_index, hidden_index = self._embed(pixel_values, bool_masked_pos, grid)
        shared, rotary = self._attention_positions(grid, visible_index, tokens.device)
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i == self.mask_stage and i > 0:
                tokens = self._hide(tokens, bool_masked_pos, self.num_prefix_tokens)
            if output_hidden_states:
                hidden_states.append(tokens)
            bias = shared
            if len(self.relative):
                bias = self.relative[i](grid, self.num_prefix_tokens, visible_index)
                bias = bias if shared is None else bias + shared
            needs_weights = i == len(self.layers) - 1 if output_attentions == "last" else bool(output_attentions)
            tokens, weights = layer(tokens, bias, rotary, None, needs_weights)
            if needs_weights:
                attentions.append(weights)
        return EncoderOutput(
            tokens=tokens,
            visible_index=visible_index,
            hidden_index=hidden_index,
            hidden_states=(*hidden_states, tokens) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, pixel_values: Tensor, mask: Tensor | None, grid: Grid):
        """-> tokens with positions and prefix; where tokens are dropped, the places of the visible and the hidden."""
        visible_index = hidden_index = None
        if mask is not None:
            pixel_values = fill_hidden_pixels(pixel_values, mask, grid, self.pixel_fill)
        patches = patchify(pixel_values, grid)
        positions = self.token_positions(grid, patches.device)
        if mask is not None and self.drops_tokens:
            visible_index, hidden_index = split_mask(mask, self._num_hidden(mask, grid))
            patches = take_tokens(patches, visible_index)
            positions = positions if positions is None else take_tokens(positions, visible_index)
        tokens = self.patch_embedding(patches)
        if self.mask_stage == 0:
            tokens = self._hide(tokens, mask)
        if positions is not None:
            tokens = tokens + positions.to(tokens.dtype)
        if self.prefix_tokens is not None:
            prefix = self.prefix_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([prefix, tokens], dim=1)
        return self.embedding_norm(tokens), visible_index, hidden_index

    def _hide(self, tokens: Tensor, mask: Tensor | None, prefix: int = 0) -> Tensor:
        if mask is None or self.drops_tokens:
            return tokens
        if self.mask_token is None:
            raise ValueError(NO_MASK_TOKEN)
        hidden = F.pad(mask, (prefix, 0))[..., None]
        token = self.mask_token.to(tokens.dtype)
        return torch.where(hidden, tokens + token if self.mask_style == "add" else token, tokens)

    def token_positions(self, grid: Grid, device) -> Tensor | None:
        """Positions (1, rows * cols, dim) to add to the patches."""
        learned = None if self.learned_positions is None else self.learned_positions(grid)
        if "sincos" not in self.positions:
            return learned
        fixed = self.sincos(grid, device)[None]
        return fixed if learned is None else fixed + learned

    def _attention_positions(self, grid: Grid, visible_index: Tensor | None, device):
        """-> the shared relative bias and the rotary tables, None where there are none."""
        shared = rotary = None
        if self.shared_relative is not None:
            shared = self.shared_relative(grid, self.num_prefix_tokens, visible_index)
        if self.positions & set(ROTARY):
            rotary = self.rotary(grid, device)
            if visible_index is not None:
                rotary = tuple(table[visible_index][:, None] for table in rotary)
        return shared, rotary

    def stage_maps(self, encoded: EncoderOutput, height: int, width: int) -> tuple[Tensor, ...]:
        """Every block's patch tokens after the final norm, as DINOv2's backbone gives them."""
        assert encoded.hidden_states is not None
        grid = self.mask_grid(height, width)
        patches = (self.final_norm(tokens)[:, self.num_prefix_tokens :] for tokens in encoded.hidden_states)
        return tuple(tokens_to_map(tokens, grid) for tokens in patches)
