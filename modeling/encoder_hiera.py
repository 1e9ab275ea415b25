"""Hiera as a masked encoder: the blocks are those of transformers, the masking is ours."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .encoder_base import (
    Encoder,
    EncoderOutput,
    Grid,
    fill_hidden_pixels,
    grid_size,
    map_to_tokens,
    split_mask,
    tokens_to_map,
)
from .hiera import to_raster, unroll, within_units
from .layers import resize_table, take_tokens
from .masking import hides_tokens
from .native_models import fill_native, native_config, native_model
from .options import OptionError, pair


class HieraEncoder(Encoder):
    """A Hiera (2306.00989) of transformers that encodes visible mask units only, as in its MAE: hidden pixels are zeros
    before the overlapping patch embedding, and the tokens of hidden units are dropped behind it. Masks, predictions and
    targets live on the grid of the last stage's tokens; a mask hides whole units, as `masking_config.unit` has to say.

    Options:
        final_norm: whether the tokens of the last stage pass a LayerNorm; the released encoder has one behind its
            pooling alone.
        every field of transformers' HieraConfig: `embed_dim`, `depths`, `num_heads`, `masked_unit_size`,
            `num_query_pool` and others.
    """

    export_formats = ("transformers",)
    has_attentions = False  # of all tokens

    def __init__(
        self, config: MIMConfigBase, use_mask_token: bool = False, /, *, final_norm: bool = False, **options: Any
    ):
        super().__init__()
        self.config = config
        self.native: Any = native_config(config, "hiera", options)
        self.network: Any = native_model(config, self.native)
        self.hidden_size = self.native.hidden_size
        if final_norm:
            self.final_norm = nn.LayerNorm(self.hidden_size, eps=self.native.layer_norm_eps)
        self.drops_tokens = hides_tokens(config)
        stride = pair(list(self.native.query_stride))
        depth, pools = len(self.native.depths) - 1, self.native.num_query_pool
        self.unrolled = [stride] * depth  # finest first: in what order the tokens of a unit lie
        cells = [math.prod(step[axis] for step in self.unrolled) for axis in (0, 1)]
        if list(self.native.masked_unit_size) != cells:
            raise OptionError(f"masked_unit_size must be {cells}, the query strides of all stages", "masked_unit_size")
        self.unit = self.unit_at(depth)
        self.unit_pixels = tuple(a * b for a, b in zip(cells, self.native.patch_stride))
        widths = [int(self.native.embed_dim * self.native.embed_dim_multiplier**i) for i in range(depth + 1)]
        self._name_stages([widths[0], *widths])
        first = self.native.patch_stride
        self.strides = [first[0] * stride[0] ** min(max(i - 1, 0), pools) for i in range(depth + 2)]
        self.base_grid = self.token_grid(*pair(config.image_size))
        if use_mask_token:
            self._check_unit(config)

    def _check_unit(self, config: MIMConfigBase):
        given = pair(config.options("masking").get("unit", 1))
        if any(length % side for length, side in zip(given, self.unit)):
            raise OptionError(
                f"Hiera hides whole mask units, of {self.unit[0]}x{self.unit[1]} tokens here: set "
                f"model.masking_config.unit to {list(self.unit)} or a multiple, not {given[0]}x{given[1]}",
                "unit",
                given,
            )

    def unit_at(self, stage: int) -> Grid:
        """Rows and columns of the tokens of a mask unit behind a stage, counted from 0."""
        rest = self.unrolled[min(stage, self.native.num_query_pool) :]
        return math.prod(step[0] for step in rest), math.prod(step[1] for step in rest)

    def blocks(self) -> list[list[nn.Module]]:
        return [[layer] for stage in self.network.encoder.stages for layer in stage.layers]

    def unit_grid(self, height: int, width: int) -> Grid:
        return grid_size((height, width), cast(Grid, self.unit_pixels), "mask unit")

    def mask_grid(self, height: int, width: int) -> Grid:
        rows, cols = self.unit_grid(height, width)
        return rows * self.unit[0], cols * self.unit[1]

    def load_native_state(self, state: dict[str, Tensor]) -> None:
        fill_native(self.network, state)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        """`hidden_states` are maps (batch, dim, rows, cols), of whole images only."""
        if output_attentions:
            raise ValueError("Hiera attends inside windows and pools its queries: it has no attentions of all tokens")
        size = pixel_values.shape[2], pixel_values.shape[3]
        units, grid = self.unit_grid(*size), self.mask_grid(*size)
        visible = visible_index = hidden_index = None
        if bool_masked_pos is not None:
            visible_index, hidden_index = split_mask(bool_masked_pos, self._num_hidden(bool_masked_pos, grid))
            hidden = self._hidden_units(bool_masked_pos, grid, units)
            pixel_values = fill_hidden_pixels(pixel_values, hidden, units, "zero")
            num_hidden = hidden_index.shape[1] // math.prod(self.unit)
            visible, _ = split_mask(hidden, num_hidden)
        tokens = self._embed(pixel_values, units, visible)
        states = [tokens]
        for stage in self.network.encoder.stages:
            tokens, _ = stage(tokens)
            states.append(tokens)
        maps = None
        if output_hidden_states and visible is None:
            stages = [0, *range(len(states) - 1)]
            maps = tuple(self._map(state, stage, units) for state, stage in zip(states, stages))
        return EncoderOutput(
            tokens=self._in_order(tokens, units, visible),
            visible_index=visible_index,
            hidden_index=hidden_index,
            feature_maps=maps,
            hidden_states=maps,
        )

    def _hidden_units(self, mask: Tensor, grid: Grid, units: Grid) -> Tensor:
        """A mask of tokens -> of units."""
        cells = mask.view(-1, units[0], self.unit[0], units[1], self.unit[1])
        hidden = cells[:, :, 0, :, 0]
        whole = (cells == hidden[:, :, None, :, None]).all()
        message = f"Hiera hides whole mask units of {self.unit[0]}x{self.unit[1]} tokens, no part of one"
        if mask.is_cuda or torch.compiler.is_compiling():  # neither waits for the GPU nor breaks the graph
            torch._assert_async(whole, message)
        elif not mask.is_meta and not whole:
            raise ValueError(message)
        return hidden.flatten(1)

    def _embed(self, pixel_values: Tensor, units: Grid, visible: Tensor | None) -> Tensor:
        """-> the tokens of visible units with positions, (batch, tokens, dim), in the order of `unroll`."""
        embedded = self.network.embeddings.patch_embeddings.projection(pixel_values)
        fine = (embedded.shape[2], embedded.shape[3])
        table = self.network.embeddings.position_embeddings[0]
        trained = pair(list(self.native.image_size))
        old = (trained[0] // self.native.patch_stride[0], trained[1] // self.native.patch_stride[1])
        table = table if fine == old else resize_table(table, old, fine)
        tokens = map_to_tokens(embedded) + table.to(embedded.dtype)
        return unroll(tokens, self.unrolled, units, visible)

    def _map(self, state: Tensor, stage: int, units: Grid) -> Tensor:
        rows, cols = self.unit_at(stage)
        tokens = to_raster(state, self.unrolled[min(stage, self.native.num_query_pool) :], units)
        return tokens_to_map(tokens, (units[0] * rows, units[1] * cols))

    def _in_order(self, tokens: Tensor, units: Grid, visible: Tensor | None) -> Tensor:
        """The last stage's tokens in reading order."""
        rest = self.unrolled[self.native.num_query_pool :]
        if visible is None:
            return to_raster(tokens, rest, units)
        tokens = within_units(tokens, rest)  # (batch, units, rows, cols, dim)
        rows = visible[..., None, None] // units[1] * self.unit[0] + self._steps(0, visible)[:, None]
        cols = visible[..., None, None] % units[1] * self.unit[1] + self._steps(1, visible)
        places = (rows * units[1] * self.unit[1] + cols).flatten(1)
        return take_tokens(tokens.flatten(1, 3), places.argsort(dim=1))

    def _steps(self, axis: int, like: Tensor) -> Tensor:
        return torch.arange(self.unit[axis], device=like.device)

    def stage_maps(self, encoded: EncoderOutput, height: int, width: int) -> tuple[Tensor, ...]:
        assert encoded.hidden_states is not None
        return encoded.hidden_states
