"""The contract of a decoder."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, EncoderOutput, Grid, divide
from .options import pair


class Decoder(nn.Module):
    """What the decoders share: the way from the encoder's tokens to the mask grid.

    needs_hidden_states: whether `encoded.hidden_states` are read.
    prediction_ratio: share of all tokens that a training step predicts, drawn among the hidden ones; None is all these.
    """

    needs_hidden_states: bool = False
    prediction_ratio: float | None = None

    def __init__(self, config: MIMConfigBase, encoder: Encoder):
        super().__init__()
        size = pair(config.image_size)
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.base_grid = encoder.target_grid(*size)
        coarse = encoder.token_grid(*size)
        self.factor = divide(self.base_grid, coarse)
        self.drops_tokens = encoder.drops_tokens
        self.std = config.initializer_range

    def _need_all_tokens(self, name: str):
        if self.drops_tokens:
            raise ValueError(
                f"decoder {name!r} needs every token, and mask_style 'drop' leaves the hidden ones out; "
                "choose mask_style 'token' or 'add', or another decoder, such as 'transformer'"
            )

    def forward(self, encoded: EncoderOutput, bool_masked_pos: Tensor, grid: Grid, scope: str) -> Tensor:
        raise NotImplementedError


def heads_of(decoder: nn.Module) -> list[Decoder]:
    """The decoder, or those that stand side by side in it; all have the same options."""
    return [module for module in decoder.modules() if isinstance(module, Decoder)]


def draw_predicted(decoder: nn.Module, encoded: EncoderOutput, hidden: Tensor) -> tuple[EncoderOutput, Tensor]:
    """What a training step predicts, where that is a part of the hidden tokens (batch, tokens), at random: -> what is
    encoded with the places of that part in raster order, and its mask."""
    ratio = next((head.prediction_ratio for head in heads_of(decoder)), None)
    if ratio is None or encoded.hidden_index is None:
        return encoded, hidden
    count = max(1, round(ratio * hidden.shape[1]))
    order = torch.rand(encoded.hidden_index.shape, device=hidden.device).argsort(dim=1)
    index = encoded.hidden_index.gather(1, order[:, :count].sort(dim=1).values)
    return replace(encoded, hidden_index=index), torch.zeros_like(hidden).scatter(1, index, True)
