"""Any vision model of transformers as an encoder: to probe, fine-tune and analyse, and to pretrain where its forward
takes `bool_masked_pos`."""

import copy
import inspect
import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from .configuration_base import MIMConfigBase
from .encoder_base import NO_MASK_TOKEN, Encoder, EncoderOutput, Grid, grid_size, map_to_tokens, tokens_to_map
from .hiera import hiera_cell, in_reading_order
from .native_models import fill_native, native_blocks, native_config, native_model, patch_embedding
from .options import pair


# How transformers' models name their tokens without a patch, and their last norm over all tokens.
PREFIX_TOKENS = (
    *("cls_token", "class_token", "class_embedding", "cls_register_token", "distillation_token"),
    "register_tokens",
)
FINAL_NORMS = ("layernorm", "layer_norm", "norm", "post_layernorm", "rms_norm")


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


class NativeEncoder(Encoder):
    """Wraps a transformers vision model. Hidden tokens become the mask token of the wrapped model where its forward
    takes `bool_masked_pos`, else one of our own, put in their place right behind the patch embedding.

    Options:
        model_type: of transformers; and every field of that model's own config. `image_size` among them is the size
            that its positions are those of, where it is not that of the `MIMConfig`.
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
        self._check_inputs(model_type)
        self.has_mask_token = use_mask_token
        if isinstance(head := getattr(self.network, "head", None), nn.Module):
            head.requires_grad_(False)  # it pools, and its output is not used
        self._add_mask_token(config, model_type)
        self.map_cell: Grid | None = None  # pixels per position, of networks whose output is a map
        self.hidden_size = getattr(self.native, "hidden_size", None) or getattr(self.native, "hidden_sizes", [None])[-1]
        if not hasattr(self.native, "hidden_size") or not hasattr(self.native, "patch_size"):
            self._look_at_map(config)
        if self.hidden_size is None:
            raise ValueError(f"the transformers model {model_type!r} has no hidden_size: it cannot be wrapped")
        self._count_prefix_tokens()
        depth = getattr(self.native, "num_hidden_layers", None) or len(getattr(self.native, "depths", [1]))
        self._name_stages(self._stage_widths(depth))
        self.base_grid = self.token_grid(*pair(config.image_size))
        recorded = "attentions" in (getattr(self.network, "_can_record_outputs", None) or {})
        self.has_attentions = recorded or "output_attentions" in self.takes
        self._take_final_norm(final_norm_names)

    def _check_inputs(self, model_type: str):
        if "pixel_values" not in self.takes:
            raise ValueError(
                f"the transformers model {model_type!r} takes no images; those that do: "
                f"{', '.join(sorted(MODEL_FOR_IMAGE_MAPPING_NAMES))}"
            )

    def _look_at_map(self, config: MIMConfigBase):
        """Width and cells of a ConvNet's output, which its config does not say: those of a twin without memory."""
        size = pair(config.image_size)
        with torch.device("meta"), torch.no_grad():
            twin = native_model(config, copy.deepcopy(self.native)).eval()
            tokens = twin(torch.zeros(1, config.num_channels, *size)).last_hidden_state
        if tokens.ndim == 4:
            self.hidden_size = tokens.shape[1]
            down, right = (2 ** round(math.log2(length / cells)) for length, cells in zip(size, tokens.shape[2:]))
            self.map_cell = down, right

    def _add_mask_token(self, config: MIMConfigBase, model_type: str):
        """Our own, where one is asked for and the wrapped model has none."""
        self.mask_token: nn.Parameter | None = None
        self.hidden: Tensor | None = None  # the mask of the forward pass that runs
        self.std = config.initializer_range
        if not self.has_mask_token or "bool_masked_pos" in self.takes:
            return
        patch = getattr(self.native, "patch_size", None)
        embedding = None if patch is None else patch_embedding(self.network, config.num_channels, pair(patch))
        if embedding is None:
            raise ValueError(
                f"the transformers model {model_type!r} takes no bool_masked_pos and has no patch embedding behind "
                "which tokens could be hidden; pretrain with encoder 'vit', 'convnet' or 'hiera'"
            )
        self.mask_token = nn.Parameter(torch.zeros(embedding.out_channels))
        embedding.register_forward_hook(self._hide)

    def _hide(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        """(batch, dim, rows, cols) -> the same with the token in hidden places."""
        if self.hidden is None or self.mask_token is None:
            return embedded
        hidden = self.hidden.view(-1, 1, *embedded.shape[2:])
        return torch.where(hidden, self.mask_token.to(embedded.dtype)[:, None, None], embedded)

    def init_parameters(self):
        if self.mask_token is not None:
            init.trunc_normal_(self.mask_token, std=self.std)

    def _count_prefix_tokens(self):
        # A pooling head may have a query of this name (AIMv2).
        parameters = {name: p for name, p in self.network.named_parameters() if not name.startswith("head.")}
        names = {name.rsplit(".", 1)[-1]: p for name, p in parameters.items()}
        prefixes = [p.shape[-2] if p.ndim > 1 else 1 for name, p in names.items() if name in PREFIX_TOKENS]
        self.num_prefix_tokens = sum(prefixes)
        first = next((names[name] for name in PREFIX_TOKENS[:4] if name in names), None)
        self.num_cls_tokens = 0 if first is None else first.shape[-2] if first.ndim > 1 else 1

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
        fill_native(self.network, state)
        if self.taken_norm is not None:
            fill_native(self.final_norm, state, f"{self.taken_norm}.")

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
        if self.native.model_type == "hiera":
            raise ValueError("of a Hiera whole mask units are hidden, which encoder 'hiera' does and 'native' does not")
        patch = getattr(self.native, "patch_size", None)
        if patch is None:
            raise ValueError(f"the transformers model {self.native.model_type!r} has no patches that could be hidden")
        self.token_grid(height, width)
        return grid_size((height, width), pair(patch), "patch")

    def token_grid(self, height: int, width: int) -> Grid:
        if self.map_cell is not None:  # such networks pad
            return -(-height // self.map_cell[0]), -(-width // self.map_cell[1])
        if not hasattr(self.native, "patch_size"):
            return height // 32, width // 32
        if self.native.model_type == "hiera":
            return grid_size((height, width), hiera_cell(self.native), "last map's cell")
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
            if self.mask_token is None:
                extra["bool_masked_pos"] = bool_masked_pos
        trained = getattr(self.native, "image_size", None)
        if "interpolate_pos_encoding" in self.takes and trained and tuple(pixel_values.shape[2:]) != pair(trained):
            extra["interpolate_pos_encoding"] = True
        if "noise" in self.takes and self.native.model_type != "hiera":  # ViTMAE orders its patches by it
            count = math.prod(self.mask_grid(*pixel_values.shape[2:]))
            extra["noise"] = torch.arange(count, device=pixel_values.device).expand(len(pixel_values), -1)
        self.hidden = bool_masked_pos
        try:
            out, attentions = self._run(pixel_values, extra, output_attentions)
        finally:
            self.hidden = None
        tokens = out.last_hidden_state
        if self.native.model_type == "hiera":
            tokens = in_reading_order(tokens, self.native, self.token_grid(*pixel_values.shape[2:]))
        maps = (tokens,) if tokens.ndim == 4 else None
        return EncoderOutput(
            tokens=map_to_tokens(tokens) if maps else tokens,
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
