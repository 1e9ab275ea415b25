"""The contract of a decoder."""

from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, EncoderOutput, Grid, divide
from .options import pair


class Decoder(nn.Module):
    """What the decoders share: the way from the encoder's tokens to the mask grid."""

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
