"""Where the names in a config become parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .decoders import DECODERS
from .encoder_base import Encoder
from .encoders import ENCODERS
from .masking import MASK_GENERATORS, hides_tokens
from .options import check_part, pair
from .poolers import POOLERS, Pooler
from .target_base import Target
from .targets import TARGETS


TABLES: dict[str, dict] = {
    "encoder": ENCODERS,
    "masking": MASK_GENERATORS,
    "decoder": DECODERS,
    "target": TARGETS,
    "pooler": POOLERS,
}
REGISTERED_BY: dict[object, str] = {}  # entries of the tables, and what is to be imported for them


def plugins_of(config: MIMConfigBase) -> list[str]:
    """The modules of other projects that the parts of a config come from. Of a part that is not loaded, what the config
    says already stays."""
    plugins, complete = [], True
    for kind, table in TABLES.items():
        inner = [options.get("name") for options in config.options(kind).values() if isinstance(options, dict)]
        for name in (getattr(config, kind), *inner):
            entry = table.get(name)
            complete &= entry is not None or name in inner
            module = REGISTERED_BY.get(entry, getattr(entry, "__module__", None))
            if isinstance(module, str) and not is_own(module):
                plugins.append(module)
    known = [] if complete else list(config.plugins or [])
    return list(dict.fromkeys([*known, *plugins]))


def is_own(module: str) -> bool:
    """Whether a module is of this project, or a script, which nobody can import."""
    return module.rpartition(".")[0] == __name__.rpartition(".")[0] or module in ("__main__", "builtins")


def make_encoder(config: MIMConfigBase, use_mask_token: bool = False) -> Encoder:
    """Raises:
    ValueError: the name or an option is unknown, or a value is bad; so do the other functions here.
    """
    check_part("encoder", ENCODERS, config.encoder, config.options("encoder"), config.plugins)
    encoder = ENCODERS[config.encoder](config, use_mask_token, **config.options("encoder"))
    encoder.hides_tokens = hides_tokens(config)
    return encoder


def make_pooler(config: MIMConfigBase, encoder: Encoder) -> Pooler:
    check_part("pooler", POOLERS, config.pooler, config.options("pooler"), config.plugins)
    return POOLERS[config.pooler](encoder, **config.options("pooler"))


def make_target(config: MIMConfigBase, encoder: Encoder) -> Target:
    check_part("target", TARGETS, config.target, config.options("target"), config.plugins)
    return TARGETS[config.target](config, encoder, **config.options("target"))


def make_decoder(config: MIMConfigBase, encoder: Encoder, target: Target) -> nn.Module:
    """One decoder, or one for each of the target's heads, side by side."""
    check_part("decoder", DECODERS, config.decoder, config.options("decoder"), config.plugins)
    options = config.options("decoder")
    return side_by_side([DECODERS[config.decoder](config, encoder, n, **options) for n in head_dims(target, "patches")])


def make_global_head(dim: int, target: Target) -> nn.Module | None:
    """The head of the target's output "global", where it has one: (batch, dim) -> (batch, outputs["global"])."""
    if "global" not in target.outputs:
        return None
    if target.global_head == "none":
        return nn.Identity()
    heads = [nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, n)) for n in head_dims(target, "global")]
    return side_by_side(heads)


def head_dims(target: Target, output: str) -> list[int]:
    return (target.head_dims or {}).get(output) or [target.outputs[output]]


class Heads(nn.Module):
    """Several heads of one input; their outputs (..., dim) follow each other."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, *inputs) -> Tensor:
        return torch.cat([head(*inputs) for head in self.heads], dim=-1)


def side_by_side(heads: Sequence[nn.Module]) -> nn.Module:
    """The head itself, where there is one: its weights then have the names that they always had."""
    return heads[0] if len(heads) == 1 else Heads(heads)


def check_encoder_and_pooler(config: MIMConfigBase) -> list[str]:
    """Builds both without memory, so that a config is found wrong where it is written. -> the stages' names."""
    with torch.device("meta"):
        encoder = make_encoder(config)
        make_pooler(config, encoder)
    encoder.token_grid(*pair(config.image_size))
    return encoder.stage_names
