"""Where the names in a config become parts."""

import torch
from torch import nn

from .configuration_base import MIMConfigBase
from .decoders import DECODERS, Decoder
from .encoder_base import Encoder
from .encoders import ENCODERS
from .options import check_part, pair
from .poolers import POOLERS, Pooler
from .target_base import Target
from .targets import TARGETS


def make_encoder(config: MIMConfigBase, use_mask_token: bool = False) -> Encoder:
    """Raises:
    ValueError: the name or an option is unknown, or a value is bad; so do the other functions here.
    """
    check_part("encoder", ENCODERS, config.encoder, config.options("encoder"))
    return ENCODERS[config.encoder](config, use_mask_token, **config.options("encoder"))


def make_pooler(config: MIMConfigBase, encoder: Encoder) -> Pooler:
    check_part("pooler", POOLERS, config.pooler, config.options("pooler"))
    return POOLERS[config.pooler](encoder, **config.options("pooler"))


def make_target(config: MIMConfigBase, encoder: Encoder) -> Target:
    check_part("target", TARGETS, config.target, config.options("target"))
    return TARGETS[config.target](config, encoder, **config.options("target"))


def make_decoder(config: MIMConfigBase, encoder: Encoder, out_dim: int) -> Decoder:
    check_part("decoder", DECODERS, config.decoder, config.options("decoder"))
    return DECODERS[config.decoder](config, encoder, out_dim, **config.options("decoder"))


def make_global_head(dim: int, target: Target) -> nn.Module | None:
    """The head of the target's output "global", where it has one: (batch, dim) -> (batch, outputs["global"])."""
    if "global" not in target.outputs:
        return None
    if target.global_head == "none":
        return nn.Identity()
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, target.outputs["global"]))


def check_encoder_and_pooler(config: MIMConfigBase) -> list[str]:
    """Builds both without memory, so that a config is found wrong where it is written. -> the stages' names."""
    with torch.device("meta"):
        encoder = make_encoder(config)
        make_pooler(config, encoder)
    encoder.token_grid(*pair(config.image_size))
    return encoder.stage_names
