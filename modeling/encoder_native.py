"""Any vision model of transformers as an encoder: to probe, fine-tune and analyse, and to pretrain where its forward
takes `bool_masked_pos`."""

import copy
import inspect
import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from .configuration_base import MIMConfigBase
from .encoder_base import NO_MASK_TOKEN, Encoder, EncoderOutput, Grid, grid_size, tokens_to_map
from .foreign import check_config, trusts_remote_code
from .options import pair, unknown_choice


# How transformers' models name their tokens without a patch, and their last norm over all tokens.
PREFIX_TOKENS = (
    *("cls_token", "class_token", "class_embedding", "cls_register_token", "distillation_token"),
    "register_tokens",
)
FINAL_NORMS = ("layernorm", "layer_norm", "norm", "post_layernorm", "rms_norm")
# What a saved config holds beside the architecture, or what MIMConfig says.
NOT_OPTIONS = {
    *("image_size", "num_channels", "model_type", "architectures", "transformers_version", "dtype", "_name_or_path"),
    *("id2label", "label2id", "out_features", "out_indices", "stage_names"),
}


def native_config(
    config: MIMConfigBase, model_type: str, options: dict, use_mask_token: bool = False
) -> PreTrainedConfig:
    """The wrapped model's config; `MIMConfig` says image size and channels.

    Raises:
        ValueError: the model type or an option is unknown.
    """
    check_config(options)
    if model_type not in CONFIG_MAPPING:
        raise unknown_choice("transformers model type", model_type, sorted(MODEL_FOR_IMAGE_MAPPING_NAMES))
    config_class = CONFIG_MAPPING[model_type]
    fields = {**config_class().to_dict(), **dict.fromkeys(config_class.__dataclass_fields__)}
    for option in options:
        if option not in fields and not option.startswith("_"):
            choices = sorted(name for name in fields if name not in PreTrainedConfig.__dataclass_fields__)
            raise unknown_choice(f"option of the transformers model {model_type!r}", option, choices)
    if "image_size" in fields:
        height, width = pair(config.image_size)
        square = height == width and isinstance(config_class().image_size, int)
        options = {**options, "image_size": height if square else [height, width]}
    if "num_channels" in fields:
        options = {**options, "num_channels": config.num_channels}
    if "mask_ratio" in fields:  # ViTMAE hides patches by itself, in evaluation too
        options = {**options, "mask_ratio": 0.0}
    if "use_mask_token" in fields:
        options = {**options, "use_mask_token": use_mask_token}
    return config_class(**options)


def native_model(config: MIMConfigBase, native: PreTrainedConfig, use_mask_token: bool = False) -> PreTrainedModel:
    """The bare model of a native config, without its pooling layer, with the attention of `config` where it has it.

    Raises:
        ValueError: it has no bare model.
    """
    if type(native) not in MODEL_MAPPING:
        raise ValueError(f"transformers has no bare model of type {native.model_type!r}")
    model_class: Any = MODEL_MAPPING[type(native)]
    supported = {"eager": True, "sdpa": model_class._supports_sdpa, "flex_attention": model_class._supports_flex_attn}
    if supported.get(config._attn_implementation, model_class._supports_flash_attn):
        native._attn_implementation = config._attn_implementation
    takes = inspect.signature(model_class).parameters
    options = {"add_pooling_layer": False, "use_mask_token": use_mask_token}
    return model_class(native, **{name: value for name, value in options.items() if name in takes})


def load_native(name_or_path: str) -> tuple[dict, dict[str, Tensor]]:
    """-> the fields of a `MIMConfig` that wraps this pretrained model, and the weights of the model.

    Of a model of images and text (CLIP, SigLIP, AIMv2) it is the image half, and its weights bring the projection into
    the space of the text, `visual_projection.weight`, where there is one. Where an image processor is saved beside it,
    the normalisation is that processor's.
    """
    check_config(PreTrainedConfig.get_config_dict(name_or_path)[0])
    network = AutoModel.from_pretrained(name_or_path, trust_remote_code=trusts_remote_code())
    projection = getattr(network, "visual_projection", None)
    network = getattr(network, "vision_model", network)
    native = network.config
    if not hasattr(native, "num_channels"):
        raise ValueError(f"{name_or_path} is a {native.model_type!r} model, which takes no images")
    defaults = type(native)().to_dict()
    changed = {name: value for name, value in native.to_dict().items() if defaults.get(name, ...) != value}
    options = {name: value for name, value in changed.items() if name not in NOT_OPTIONS}
    fields = {"encoder": "native", "encoder_config": {"model_type": native.model_type, **options}}
    fields |= {name: getattr(native, name) for name in ("image_size", "num_channels") if hasattr(native, name)}
    fields |= native_statistics(name_or_path, native)
    state = network.state_dict()
    return fields, state if projection is None else {**state, "visual_projection.weight": projection.weight.detach()}


def native_statistics(name_or_path: str, native: PreTrainedConfig) -> dict[str, list[float]]:
    """The normalisation that a model's images want, as fields of a `MIMConfig`; {} where nothing says it. RADIO
    normalises its images itself: they come as they are."""
    if native.model_type == "radio":
        return {"image_mean": [0.0] * native.num_channels, "image_std": [1.0] * native.num_channels}
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trusts_remote_code())
        return {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # no processor, or one that does not normalise: MIMConfig's defaults


def infer_grid(tokens: int, height: float, width: float) -> Grid:
    """How many rows and columns the `tokens` equal cells of a picture make: of all factors the pair that is nearest to
    the picture's shape. It is the right one whether cells at the border are cut off, as in ViT, or padded, as in Swin.
    """
    pairs = ((rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0)
    return min(pairs, key=lambda grid: abs(math.log(grid[0] * width / (grid[1] * height))))


def eager_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config whose modules compute attention by the eager implementation, which returns its weights."""
    if config._attn_implementation == "eager":
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return config


@contextmanager
def eager_attention(modules: list[Any]):
    """For a while, these modules compute attention by the eager implementation, whatever that of their model is."""
    configs = [module.config for module in modules]
    try:
        for module in modules:
            module.config = eager_config(module.config)
        yield
    finally:
        for module, config in zip(modules, configs):
            module.config = config


def native_blocks(network: nn.Module) -> list[list[nn.Module]]:
    """Of a model of transformers: the outermost list of modules of one class; blocks of stages, where stages are made
    of a list `blocks` (Swin), whose other parts, such as the merging of patches, count as their last block."""
    queue: list[nn.Module] = [network]
    while queue:
        module = queue.pop(0)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(inner) for inner in module}) == 1:
            break
        queue += list(module.children())
    else:
        return []
    blocks: list[list[nn.Module]] = []
    for stage in module:
        inner = getattr(stage, "blocks", None)
        if not isinstance(inner, nn.ModuleList) or len(inner) == 0:
            blocks.append([stage])
            continue
        blocks += [[block] for block in inner]
        blocks[-1] += [part for name, part in stage.named_children() if name != "blocks"]
    return blocks


class NativeEncoder(Encoder):
    """Wraps a transformers vision model.

    Options:
        model_type: of transformers; and every field of that model's own config.
        final_norm_names: what the wrapped model may call the last norm over its tokens.
    """

    export_formats = ("transformers", "onnx")

    # Positional only: some of the wrapped configs have a field `use_mask_token` of their own.
    def __init__(
        self,
        config: MIMConfigBase,
        use_mask_token: bool = False,
        /,
        *,
        model_type: str = "vit",
        final_norm_names: list[str] | tuple[str, ...] = FINAL_NORMS,
        **options,
    ):
        super().__init__()
        # Any: which attributes it has depends on the wrapped model.
        self.native: Any = native_config(config, model_type, options, use_mask_token)
        self.network = native_model(config, self.native, use_mask_token)
        self.takes = set(inspect.signature(self.network.forward).parameters)
        self._check_inputs(model_type, use_mask_token)
        self.has_mask_token = use_mask_token
        self.hidden_size = getattr(self.native, "hidden_size", None) or getattr(self.native, "hidden_sizes", [None])[-1]
        if self.hidden_size is None:
            raise ValueError(f"the transformers model {model_type!r} has no hidden_size: it cannot be wrapped")
        self._count_prefix_tokens()
        depth = getattr(self.native, "num_hidden_layers", None) or len(getattr(self.native, "depths", [1]))
        self._name_stages(self._stage_widths(depth))
        self.base_grid = self.token_grid(*pair(config.image_size))
        self.has_attentions = self.last_attention() is not None or "output_attentions" in self.takes
        self._take_final_norm(final_norm_names)

    def _check_inputs(self, model_type: str, use_mask_token: bool):
        if "pixel_values" not in self.takes:
            raise ValueError(
                f"the transformers model {model_type!r} takes no images; those that do: "
                f"{', '.join(sorted(MODEL_FOR_IMAGE_MAPPING_NAMES))}"
            )
        if use_mask_token and "bool_masked_pos" not in self.takes:
            raise ValueError(
                f"the transformers model {model_type!r} takes no bool_masked_pos and cannot hide tokens; "
                "pretrain with encoder 'vit' or 'convnet'"
            )

    def _count_prefix_tokens(self):
        # A pooling head may have a query of this name (AIMv2).
        parameters = {name: p for name, p in self.network.named_parameters() if not name.startswith("head.")}
        names = {name.rsplit(".", 1)[-1]: p for name, p in parameters.items()}
        prefixes = [p.shape[-2] if p.ndim > 1 else 1 for name, p in names.items() if name in PREFIX_TOKENS]
        self.num_prefix_tokens = sum(prefixes)
        self.has_cls_token = any(name in names for name in PREFIX_TOKENS[:4])

    def _take_final_norm(self, names: list[str] | tuple[str, ...]):
        """Takes the last norm out of the wrapped model, so that a pooler can see the tokens before it. CLIP's, which
        the wrapped model applies to its class token alone, acts on all tokens, as before CLIP's projection."""
        self.taken_norm: str | None = None
        for name in names:
            norm: Any = getattr(self.network, name, None)
            is_norm = isinstance(norm, nn.LayerNorm) or "RMSNorm" in type(norm).__name__
            if is_norm and not hasattr(self.native, "hidden_sizes"):
                self.final_norm = norm
                setattr(self.network, name, nn.Identity())
                self.taken_norm = name

    def check_final_norm(self, applied: bool) -> None:
        if not applied and self.taken_norm is None:
            raise ValueError(
                f"apply_final_norm=false: the transformers model {self.native.model_type!r} has no last norm over its "
                "tokens that could be left out"
            )

    def blocks(self) -> list[list[nn.Module]]:
        return native_blocks(self.network)

    def load_native_state(self, state: dict[str, Tensor]) -> None:
        """Loads the weights of the wrapped model, as `load_native` returns them; its pooling layer is left out."""
        wrapped = self.network.state_dict()
        missing = [name for name in wrapped if name not in state and "mask_token" not in name]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing[:5])}")
        self.network.load_state_dict({name: state.get(name, value) for name, value in wrapped.items()})
        if self.taken_norm is not None:
            names = self.final_norm.state_dict()
            self.final_norm.load_state_dict({name: state[f"{self.taken_norm}.{name}"] for name in names})

    def last_attention(self) -> Any | None:
        """The last block's attention, a module that returns (output, weights); None where it is not marked."""
        recorded = (getattr(self.network, "_can_record_outputs", None) or {}).get("attentions")
        if not isinstance(recorded, type):
            return None
        modules = [module for module in self.network.modules() if isinstance(module, recorded)]
        return next((module for module in reversed(modules) if hasattr(module, "config")), None)

    def _stage_widths(self, depth: int) -> list[int]:
        if hasattr(self.native, "embed_dim") and hasattr(self.native, "depths"):
            # A Swin stage hands over the map that it has already merged, the last one excepted.
            widths = [self.native.embed_dim * 2**i for i in range(depth)]
            return [*widths, widths[-1]]
        if hasattr(self.native, "hidden_sizes"):
            widths = list(self.native.hidden_sizes)
            return [getattr(self.native, "embedding_size", widths[0]), *widths]
        return [self.hidden_size] * (depth + 1)

    def mask_grid(self, height: int, width: int) -> Grid:
        patch = getattr(self.native, "patch_size", None)
        if patch is None:
            raise ValueError(f"the transformers model {self.native.model_type!r} has no patches that could be hidden")
        self.token_grid(height, width)
        return grid_size((height, width), pair(patch), "patch")

    def token_grid(self, height: int, width: int) -> Grid:
        if not hasattr(self.native, "patch_size"):
            return height // 32, width // 32
        merges = len(self.native.depths) - 1 if hasattr(self.native, "depths") else 0
        down, right = pair(self.native.patch_size)
        return grid_size((height, width), (down * 2**merges, right * 2**merges), "last map's cell")

    def state_grid(self, num_tokens: int, height: int, width: int) -> Grid:
        down, right = pair(getattr(self.native, "patch_size", 1))
        return infer_grid(num_tokens, height / down, width / right)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        extra: dict[str, Any] = {"output_hidden_states": True} if output_hidden_states else {}
        if bool_masked_pos is not None:
            if not self.has_mask_token:
                raise ValueError(NO_MASK_TOKEN)
            extra["bool_masked_pos"] = bool_masked_pos
        trained = getattr(self.native, "image_size", None)
        if "interpolate_pos_encoding" in self.takes and trained and tuple(pixel_values.shape[2:]) != pair(trained):
            extra["interpolate_pos_encoding"] = True
        if "noise" in self.takes:  # ViTMAE orders its patches by it
            tokens = math.prod(self.mask_grid(*pixel_values.shape[2:]))
            extra["noise"] = torch.arange(tokens, device=pixel_values.device).expand(len(pixel_values), -1)
        out, attentions = self._run(pixel_values, extra, output_attentions)
        tokens = out.last_hidden_state
        maps = (tokens,) if tokens.ndim == 4 else None
        return EncoderOutput(
            tokens=tokens.flatten(2).transpose(1, 2) if maps else tokens,
            feature_maps=maps,
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=attentions,
        )

    def _run(self, pixel_values: Tensor, options: dict, output_attentions: bool | str):
        """-> the wrapped model's output, and its attentions as asked for, or None."""
        if not output_attentions:
            return self.network(pixel_values, **options), None
        last, weights = self.last_attention(), []
        if output_attentions == "last" and last is not None:
            # For good: gradient checkpointing runs the block again in the backward pass.
            last.config = eager_config(last.config)
            hook = last.register_forward_hook(lambda module, inputs, output: weights.append(output[1]))
            try:
                return self.network(pixel_values, **options), tuple(weights)
            finally:
                hook.remove()
        with eager_attention([module for module in self.network.modules() if hasattr(module, "config")]):
            out = self.network(pixel_values, **options, output_attentions=True)
        attentions = getattr(out, "attentions", None) or (None,)
        if any(weights is None for weights in attentions):
            raise ValueError(
                f"the transformers model {self.native.model_type!r} returns no attentions as it was built; if it can, "
                "it does with attn_implementation='eager'"
            )
        return out, attentions if output_attentions is True else attentions[-1:]

    def stage_maps(self, encoded: EncoderOutput, height: int, width: int) -> tuple[Tensor, ...]:
        """As of `ViTEncoder`, after the final norm where it has the width of every stage."""
        assert encoded.hidden_states is not None
        maps, one_width = [], len(set(self.num_features)) == 1
        for state in encoded.hidden_states:
            state = self.final_norm(state) if one_width else state
            if state.ndim == 3:
                state = state[:, self.num_prefix_tokens :]
                state = tokens_to_map(state, self.state_grid(state.shape[1], height, width))
            maps.append(state)
        widths = [stage.shape[1] for stage in maps]
        if widths != self.num_features:
            raise ValueError(
                f"the transformers model {self.native.model_type!r} cannot be a backbone here: its stages were "
                f"expected to have {self.num_features} channels and have {widths}"
            )
        return tuple(maps)
