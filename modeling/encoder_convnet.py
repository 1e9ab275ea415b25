"""ConvNets as masked encoders: the blocks are those of transformers and timm, the masking is ours."""

from typing import Any, cast

import torch
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
    output_of_maps,
)
from .encoder_timm import TimmWeights, find_timm, timm_errors
from .native_models import native_config, native_model
from .options import pair, shorten
from .sparse import SparseMask, make_sparse


MODEL_TYPES = ("resnet", "convnext", "convnextv2", "timm")


class ConvNetEncoder(Encoder):
    """A ConvNet in which a learned token is put into the map that enters a stage (A2MIM, 2205.13943, section 4).

    Options:
        model_type: resnet, convnext, convnextv2 (transformers' models; further options are their configs' fields), or
            timm with `model_name` (further options go to `timm.create_model`, `output_stride` among them).
        mask_style: what hidden cells become: `token` the learned token, `add` their own features plus the token;
            `sparse` computes on visible positions only (SparK).
        mask_stage: the stage, counted from 0, before which the token acts; its input is the mask grid. With `sparse`
            the mask grid is that of the last stage.
        mask_after_downsampling: whether the token acts behind the downsampling with which that stage begins, in its
            width and on its grid (A2MIM for ConvNeXt); ConvNeXts of transformers only.
        mask_token_std: of the token's first values (0 in the released A2MIM for ConvNeXt); None is the config's
            `initializer_range`.
        final_norm: whether the last norm of a ConvNeXt of transformers acts at every position of the last map, before
            the decoder and the pooling (A2MIM), and not after the pooling.
        mask_scale_init_value: with `add`, hidden cells keep their features times a learned factor per channel that
            starts here (1e-6 in the released A2MIM configs for ConvNets); None keeps them as they are.
        pixel_fill: what hidden pixels are replaced by before the network: none, mean (A2MIM) or zero.
    """

    has_attentions = False
    traces_any_size = True
    strides: list[int]

    def __init__(
        self,
        config: MIMConfigBase,
        use_mask_token: bool = False,
        *,
        model_type: str = "resnet",
        mask_style: str = "add",
        mask_stage: int = 3,
        mask_after_downsampling: bool = False,
        mask_token_std: float | None = None,
        mask_scale_init_value: float | None = 1e-6,
        final_norm: bool = False,
        pixel_fill: str = "mean",
        **options,
    ):
        super().__init__()
        self.mask_style = choose("mask_style", mask_style, ("add", "token", "sparse"))
        self.pixel_fill = choose("pixel_fill", pixel_fill, PIXEL_FILLS)
        self.std = config.initializer_range if mask_token_std is None else mask_token_std
        is_timm = choose("model_type", model_type, MODEL_TYPES) == "timm"
        self.export_formats = ("timm", "onnx") if is_timm else ("transformers", "timm", "onnx")
        build = timm_stages if is_timm else native_stages
        self.network, self.strides, self.num_features = build(config, model_type, options)
        self.norm_eps = getattr(getattr(self.network, "layernorm", None), "eps", None)
        if self.norm_eps is not None:
            # It acts after pooling: see `pooled_norm`.
            self.final_norm = cast(nn.Module, self.network.layernorm) if final_norm else self.final_norm
            self.network.layernorm = nn.Identity()
        self._check_options(mask_stage, mask_after_downsampling=mask_after_downsampling, final_norm=final_norm)
        self.norm_eps = None if final_norm else self.norm_eps
        self.mask_stage, self.mask_after_downsampling = mask_stage, mask_after_downsampling
        self.mask_level = len(self.strides) - 1 if mask_style == "sparse" else mask_stage + mask_after_downsampling
        self.hidden_size = self.num_features[-1]
        self._name_stages(self.num_features)
        self.base_grid = self.token_grid(*pair(config.image_size))
        self.sparse_mask = SparseMask()
        if mask_style == "sparse":
            make_sparse(self.network, self.sparse_mask)
        self._add_mask_token(use_mask_token, mask_scale_init_value)

    def _check_options(self, mask_stage: int, **convnext_only: bool):
        depth = len(self.strides) - 1
        if self.mask_style != "sparse" and not 0 <= mask_stage < depth:
            raise ValueError(f"mask_stage {mask_stage} must be from 0 to {depth - 1}, the stages of this network")
        for name, value in convnext_only.items():
            if value and (self.norm_eps is None or self.mask_style == "sparse"):
                raise ValueError(f"{name} needs model_type convnext or convnextv2 and a mask_style that is not sparse")

    def _add_mask_token(self, use_mask_token: bool, scale: float | None):
        width = self.num_features[self.mask_level]
        has_token = use_mask_token and self.mask_style != "sparse"
        self.mask_token = nn.Parameter(torch.zeros(width)) if has_token else None
        scaled = use_mask_token and self.mask_style == "add" and scale is not None
        self.initial_scale = float(scale or 0)
        self.mask_scale = nn.Parameter(torch.full((width,), self.initial_scale)) if scaled else None

    def init_parameters(self):
        if self.mask_token is not None:
            init.trunc_normal_(self.mask_token, std=self.std) if self.std > 0 else init.zeros_(self.mask_token)
        if self.mask_scale is not None:
            init.constant_(self.mask_scale, self.initial_scale)

    def blocks(self) -> list[list[nn.Module]]:
        return [[stage] for stage in split_network(self.network)[1]]

    def pooled_norm(self) -> nn.Module:
        return nn.Identity() if self.norm_eps is None else nn.LayerNorm(self.hidden_size, eps=self.norm_eps)

    def mask_grid(self, height: int, width: int) -> Grid:
        stride = self.strides[self.mask_level]
        self.token_grid(height, width)
        return grid_size((height, width), (stride, stride), "stride at the masked stage")

    def token_grid(self, height: int, width: int) -> Grid:
        return grid_size((height, width), (self.strides[-1], self.strides[-1]), "last stage's stride")

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        if output_attentions:
            raise ValueError("a ConvNet has no attentions to return")
        if bool_masked_pos is not None:
            grid = self.mask_grid(*pixel_values.shape[2:])
            if self.mask_style == "sparse":
                self.sparse_mask.visible = ~bool_masked_pos.view(-1, 1, *grid)
            else:
                pixel_values = fill_hidden_pixels(pixel_values, bool_masked_pos, grid, self.pixel_fill)
        try:
            maps = self._run(pixel_values, bool_masked_pos)
        finally:
            self.sparse_mask.visible = None
        return output_of_maps(maps, output_hidden_states)

    def _run(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> list[Tensor]:
        """-> the maps of the stem and of every stage."""
        stem, stages = split_network(self.network)
        maps = [stem(pixel_values)]
        for i, stage in enumerate(stages):
            features, layers = maps[-1], [stage]
            if i == self.mask_stage and bool_masked_pos is not None and self.mask_style != "sparse":
                if self.mask_after_downsampling:
                    features, layers = run(stage.downsampling_layer, features), stage.layers
                features = self._hide(features, bool_masked_pos)
            maps.append(run(layers, features))
        return maps

    def _hide(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(NO_MASK_TOKEN)
        hidden = mask.view(-1, 1, *features.shape[2:])
        token = self.mask_token.to(features.dtype)[:, None, None]
        if self.mask_style == "add":
            kept = features if self.mask_scale is None else features * self.mask_scale.to(features.dtype)[:, None, None]
            token = kept + token
        return torch.where(hidden, token, features)


def run(layers: Any, features: Tensor) -> Tensor:
    for layer in layers:
        features = layer(features)
    return features


def native_stages(config: MIMConfigBase, model_type: str, options: dict) -> tuple[nn.Module, list[int], list[int]]:
    """-> transformers' model, and the stride and width of the stem's and of each stage's map."""
    native = native_config(config, model_type, options)
    network = native_model(config, native)
    if model_type == "resnet":
        first = 8 if native.downsample_in_first_stage else 4
        strides = [4] + [first * 2**i for i in range(len(native.depths))]
        return network, strides, [native.embedding_size, *native.hidden_sizes]
    strides = [native.patch_size * 2**i for i in range(len(native.depths))]
    return network, [strides[0], *strides], [native.hidden_sizes[0], *native.hidden_sizes]


class TimmStages(TimmWeights):
    """A timm network cut into a stem and its stages. Its weights keep timm's own initialisation."""

    def __init__(self, config: MIMConfigBase, model_name: str, options: dict):
        super().__init__()
        self.arguments = (config, model_name, options)
        network = timm_network(model_name, config.num_channels, options)
        self.widths, self.strides = network.feature_info.channels(), network.feature_info.reduction()
        ends = set(network.return_layers)
        if len(ends) == 4:  # a network whose stem makes no map of its own, such as ConvNeXt: it ends where stages begin
            modules = list(network)
            ends.add(modules[modules.index(network.feature_info.module_name(0).replace(".", "_")) - 1])
            self.widths, self.strides = [self.widths[0], *self.widths], [self.strides[0], *self.strides]
        self.parts, part = nn.ModuleList(), nn.Sequential()
        for name, module in network.items():
            part.add_module(name, module)
            if name in ends:
                self.parts.append(part)
                part = nn.Sequential()
        self.keep_weights()


def timm_network(name: str, num_channels: int, options: dict) -> Any:
    """A timm model that returns the maps of its stages, with random weights.

    Raises:
        ValueError: timm is absent, the name or an option is unknown, or the model has no stages.
    """
    timm = find_timm(name, options, "res*")
    uncut = timm.models.efficientnet.EfficientNetFeatures, timm.models.mobilenetv3.MobileNetV3Features
    with timm_errors(f"timm's {name!r} cannot be made with the options {shorten(options)}"):
        network = timm.create_model(name, features_only=True, in_chans=num_channels, **options)
        if isinstance(network, uncut):  # EfficientNets and their kin are cut on request
            options = {"feature_cfg": {"flatten_sequential": True, "feature_cls": "list"}, **options}
            network = timm.create_model(name, features_only=True, in_chans=num_channels, **options)
    if not isinstance(network, timm.models.FeatureListNet):
        raise ValueError(f"timm's {name!r} cannot be cut into stages; choose a plain ConvNet, say resnet18")
    return network


def timm_stages(config: MIMConfigBase, model_type: str, options: dict) -> tuple[nn.Module, list[int], list[int]]:
    """-> the timm network, and the stride and width of the stem's and of each stage's map."""
    options = dict(options)
    network = TimmStages(config, options.pop("model_name", "resnet18"), options)
    return network, network.strides, network.widths


def split_network(network: Any) -> tuple[nn.Module, list[Any]]:
    """-> the stem and the stages, each a module from map to map."""
    if isinstance(network, TimmStages):
        return network.parts[0], list(network.parts[1:])
    stem = network.embedder if hasattr(network, "embedder") else network.embeddings
    return stem, list(network.encoder.stages)
