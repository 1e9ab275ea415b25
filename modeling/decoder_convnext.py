"""The decoder of FCMAE: plain ConvNeXt V2 blocks on the map of the mask grid."""

import torch
from torch import Tensor, nn
from transformers import ConvNextV2Config
from transformers import initialization as init
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from .configuration_base import MIMConfigBase
from .decoder_base import Decoder
from .encoder_base import Encoder, map_to_tokens, tokens_to_map
from .initial_weights import draw_as
from .layers import PixelShuffleLinear
from .options import at_least


class ConvNeXtDecoder(Decoder):
    """A 1x1 projection, a learned token in the hidden places, ConvNeXt V2 blocks and a linear layer (FCMAE,
    2301.00808, section 3.1). The token is absent where the encoder has put one of its own there.

    Options:
        hidden_size, num_hidden_layers: width and number of the blocks.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        out_dim: int,
        *,
        hidden_size: int = 512,
        num_hidden_layers: int = 1,
    ):
        super().__init__(config, encoder)
        at_least(1, "the decoder's ", num_hidden_layers=num_hidden_layers)
        self.embed = PixelShuffleLinear(encoder.hidden_size, hidden_size, self.factor)
        needs_token = encoder.drops_tokens or encoder.mask_style == "sparse"
        self.mask_token = nn.Parameter(torch.zeros(hidden_size)) if needs_token else None
        block_config = ConvNextV2Config(hidden_act="gelu")
        self.layers = nn.ModuleList(ConvNextV2Layer(block_config, hidden_size) for _ in range(num_hidden_layers))
        self.head = nn.Linear(hidden_size, out_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                draw_as(module, "normal")

    def init_parameters(self):
        if self.mask_token is not None:
            init.normal_(self.mask_token, std=self.std)
        for layer in self.layers:
            init.zeros_(layer.grn.weight)
            init.zeros_(layer.grn.bias)

    def forward(self, encoded, bool_masked_pos, grid, scope):
        tokens = self.embed(encoded.tokens[:, self.num_prefix_tokens :], grid)
        features = tokens_to_map(self._with_tokens(tokens, bool_masked_pos, encoded.visible_index), grid)
        for layer in self.layers:
            features = layer(features)
        return self.head(map_to_tokens(features))

    def _with_tokens(self, tokens: Tensor, mask: Tensor, visible_index: Tensor | None) -> Tensor:
        """All tokens of the mask grid, the learned one in the hidden places."""
        if self.mask_token is None:
            return tokens
        token = self.mask_token.to(tokens.dtype)
        if visible_index is None:
            return torch.where(mask[..., None], token, tokens)
        index = visible_index[..., None].expand(-1, -1, tokens.shape[-1])
        return token.expand(*mask.shape, -1).scatter(1, index, tokens)
