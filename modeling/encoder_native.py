"""Any vision model of transformers as an encoder: to probe, fine-tune and analyse, and to pretrain where its forward
takes `bool_masked_pos`."""

import inspect
import math

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from .configuration_mim import pair, unknown
from .encoder_base import Encoder, EncoderOutput, Grid, cells, tokens_to_map


# How transformers' models name their tokens without a patch, and their last norm over all tokens.
PREFIX_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token", "register_tokens")
FINAL_NORMS = ("layernorm", "layer_norm", "norm")


def native_config(config, model_type: str, options: dict):
    """The wrapped model's config; `MIMConfig` says image size and channels.

    Raises:
        ValueError: the model type or an option is unknown.
    """
    if model_type not in CONFIG_MAPPING:
        raise unknown("transformers model type", model_type, list(CONFIG_MAPPING.keys()))
    config_class = CONFIG_MAPPING[model_type]
    fields = {**config_class().to_dict(), **dict.fromkeys(config_class.__dataclass_fields__)}
    for option in options:
        if option not in fields and not option.startswith("_"):
            raise unknown(f"option of the transformers model {model_type!r}", option, sorted(fields))
    if "image_size" in fields:
        height, width = pair(config.image_size)
        options = {**options, "image_size": height if height == width else [height, width]}
    if "num_channels" in fields:
        options = {**options, "num_channels": config.num_channels}
    return config_class(**options)


def native_model(config, native, use_mask_token: bool = False) -> nn.Module:
    """The bare model of a native config, without its pooling layer, with the attention of `config` where it has it.

    Raises:
        ValueError: it has no bare model.
    """
    if type(native) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no bare model of type {native.model_type!r}")
    model_class = MODEL_MAPPING[type(native)]
    has = {"eager": True, "sdpa": model_class._supports_sdpa, "flex_attention": model_class._supports_flex_attn}
    if has.get(config._attn_implementation, model_class._supports_flash_attn):
        native._attn_implementation = config._attn_implementation
    takes = inspect.signature(model_class).parameters
    wanted = {"add_pooling_layer": False, "use_mask_token": use_mask_token}
    return model_class(native, **{name: value for name, value in wanted.items() if name in takes})


class NativeEncoder(Encoder):
    """Wraps a transformers vision model.

    Options: `model_type`, and every field of that model's own config.
    """

    def __init__(self, config, use_mask_token: bool = False, *, model_type: str = "vit", **options):
        super().__init__()
        native = native_config(config, model_type, options)
        self.network = native_model(config, native, use_mask_token)
        self.native = native
        self.takes = set(inspect.signature(self.network.forward).parameters)
        self.hidden_size = getattr(native, "hidden_size", None) or native.hidden_sizes[-1]
        names = {name.rsplit(".", 1)[-1]: p for name, p in self.network.named_parameters()}
        prefixes = [p.shape[-2] if p.ndim > 1 else 1 for name, p in names.items() if name in PREFIX_TOKENS]
        self.num_prefix_tokens = sum(prefixes)
        self.has_cls_token = any(name in names for name in PREFIX_TOKENS[:3])
        depth = getattr(native, "num_hidden_layers", None) or len(getattr(native, "depths", [1]))
        self.stage_names = ["stem"] + [f"stage{i + 1}" for i in range(depth)]
        self.num_features = self._stage_widths(depth)
        # Taken out of the wrapped model, so that a pooler can see the tokens before it.
        for name in FINAL_NORMS:
            if isinstance(getattr(self.network, name, None), nn.LayerNorm) and not hasattr(native, "hidden_sizes"):
                self.final_norm = getattr(self.network, name)
                setattr(self.network, name, nn.Identity())

    def _stage_widths(self, depth: int) -> list[int]:
        if hasattr(self.native, "hidden_sizes"):
            return [self.native.hidden_sizes[0], *self.native.hidden_sizes]
        if hasattr(self.native, "embed_dim") and hasattr(self.native, "depths"):
            # A Swin stage hands over the map that it has already merged, the last one excepted.
            widths = [self.native.embed_dim * 2**i for i in range(depth)]
            return [*widths, widths[-1]]
        return [self.hidden_size] * (depth + 1)

    def mask_grid(self, height: int, width: int) -> Grid:
        patch = getattr(self.native, "patch_size", None)
        if patch is None:
            raise ValueError(f"the transformers model {self.native.model_type!r} has no patches that could be hidden")
        return cells((height, width), pair(patch), "patch")

    def token_grid(self, height: int, width: int) -> Grid:
        if not hasattr(self.native, "patch_size"):
            return height // 32, width // 32
        merges = len(self.native.depths) - 1 if hasattr(self.native, "depths") else 0
        patch = tuple(length * 2**merges for length in pair(self.native.patch_size))
        return cells((height, width), patch, "last map's cell")

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        extra = {"output_hidden_states": output_hidden_states} if output_hidden_states else {}
        if bool_masked_pos is not None:
            if "bool_masked_pos" not in self.takes:
                raise ValueError(
                    f"the transformers model {self.native.model_type!r} takes no bool_masked_pos and cannot hide "
                    "tokens; pretrain with encoder 'vit' or 'convnet'"
                )
            extra["bool_masked_pos"] = bool_masked_pos
        if output_attentions:
            extra["output_attentions"] = True
        trained = getattr(self.native, "image_size", None)
        if "interpolate_pos_encoding" in self.takes and trained and tuple(pixel_values.shape[2:]) != pair(trained):
            extra["interpolate_pos_encoding"] = True
        out = self.network(pixel_values, **extra)
        tokens = out.last_hidden_state
        maps = (tokens,) if tokens.ndim == 4 else None
        return EncoderOutput(
            tokens=tokens.flatten(2).transpose(1, 2) if maps else tokens,
            feature_maps=maps,
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=out.attentions if output_attentions else None,
        )

    def stage_maps(self, encoded: EncoderOutput, height: int, width: int) -> tuple[Tensor, ...]:
        maps = []
        for state in encoded.hidden_states:
            if state.ndim == 3:
                state = state[:, self.num_prefix_tokens :]
                rows = round(math.sqrt(state.shape[1] * height / width))
                state = tokens_to_map(state, (rows, state.shape[1] // rows))
            maps.append(state)
        return tuple(maps)
