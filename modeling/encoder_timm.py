"""Any model of timm as an encoder, whole: transformers and hybrids too, which cannot be cut into stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_base import MIMConfigBase
from .encoder_base import (
    PIXEL_FILLS,
    Encoder,
    EncoderOutput,
    Grid,
    choose,
    fill_hidden_pixels,
    grid_size,
    image_size,
    output_of_maps,
)
from .foreign import refuse_loading
from .options import pair, shorten, shorten_text, unknown_choice


def run_timm(network: Any, pixel_values: Tensor) -> list[Tensor]:
    """The maps (batch, channels, rows, cols) of a timm model, one for each entry of its `feature_info`; behind the last
    norm, where the model can apply it to them."""
    try:
        return network.forward_intermediates(pixel_values, norm=True, output_fmt="NCHW", intermediates_only=True)
    except AssertionError:  # how timm says that it cannot
        return network.forward_intermediates(pixel_values, output_fmt="NCHW", intermediates_only=True)


def find_timm(name: object, options: dict, otherwise: str) -> Any:
    """The package timm, to make a model of this name with options that come from a config.

    Args:
        otherwise: a pattern of names to choose from, where none is like this one.

    Raises:
        ValueError: timm is absent or does not know the name, or an option would make it load a file or is ours to set.
    """
    try:
        import timm  # slow to import, and only its own models need it
    except ImportError:
        raise ValueError("models of timm need its package: pip install timm") from None
    if not isinstance(name, str) or not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*") if isinstance(name, str) else []
        raise unknown_choice("timm model", cast(str, name), (near or timm.list_models(otherwise))[:8])
    refuse_loading(options)
    if taken := options.keys() & {"in_chans", "num_classes", "features_only"}:
        raise ValueError(f"{sorted(taken)} cannot be options of a timm encoder: num_channels and the encoder set them")
    return timm


@contextmanager
def timm_errors(failure: str) -> Iterator[None]:
    """Within, what timm raises about options and sizes becomes one ValueError, `failure` and the reason."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, LookupError, ArithmeticError) as error:
        kind = "" if isinstance(error, TypeError | ValueError | RuntimeError) else type(error).__name__ + " "
        raise ValueError(f"{failure}: {shorten_text(kind + str(error)).strip()}") from error


def make_timm(name: str, config: MIMConfigBase, options: dict) -> Any:
    """A timm model without its classifier, with random weights, for the images of `config`.

    Raises:
        ValueError: timm is absent, the name or an option is unknown, or the model gives no maps.
    """
    timm = find_timm(name, options, "vit*")
    size = pair(config.image_size)
    fields = {"in_chans": config.num_channels, "num_classes": 0}
    with timm_errors(f"timm's {name!r} cannot be made for images of {size} with the options {shorten(options)}"):
        try:
            network = timm.create_model(name, img_size=size, **fields, **options)
        except TypeError:  # it does not depend on the size
            network = timm.create_model(name, **fields, **options)
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"timm's {name!r} gives no maps of its stages, and cannot be an encoder")
    return network


class TimmWeights(nn.Module):
    """A network of timm that keeps timm's own initial values.

    Attributes:
        arguments: that make another one like it.
    """

    arguments: tuple

    def keep_weights(self) -> None:
        """To be called when the network is made."""
        self.lacks_weights = any(parameter.is_meta for parameter in self.parameters())
        for child in self.children():
            for module in child.modules():
                module.init_parameters = self.init_parameters  # type: ignore[assignment]

    def init_parameters(self):
        """Where `from_pretrained` has built the network without memory, fills what the checkpoint lacks from a new
        network, all at once. (Each module asks: those without weights are never called.)"""
        if self.lacks_weights:
            self.lacks_weights = False
            own = dict(self.named_parameters()) | dict(self.named_buffers())
            fresh = type(self)(*self.arguments)
            for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
                init.copy_(own[name], value)


class TimmNetwork(TimmWeights):
    """A whole timm model, and the shapes of its maps at the config's image size."""

    def __init__(self, config: MIMConfigBase, name: str, options: dict):
        super().__init__()
        self.arguments = (config, name, options)
        self.model = make_timm(name, config, options)
        device = next(self.model.parameters()).device
        empty = torch.zeros(1, config.num_channels, *pair(config.image_size), device=device)
        self.shapes = self._look(empty, name)
        self.keep_weights()

    @torch.no_grad()
    def _look(self, empty: Tensor, name: str) -> list[tuple[int, ...]]:
        """(channels, rows, cols) of every map of an empty image.

        Raises:
            ValueError: the network cannot take images of this size.
        """
        training, (height, width) = self.model.training, image_size(empty)
        try:
            with timm_errors(f"timm's {name!r} cannot take images of {height}x{width} pixels"):
                return [tuple(stage.shape[1:]) for stage in run_timm(self.model.eval(), empty)]
        finally:
            self.model.train(training)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        return run_timm(self.model, pixel_values)


class TimmEncoder(Encoder):
    """A model of timm, as its `forward_intermediates` gives it: the tokens are the positions of its last map, without
    class tokens. It is meant for whole images (masking `none`): it has no mask token, so that hidden patches can only
    be filled. ConvNets that `convnet` can cut into stages are better off there.

    Options:
        model_name: of timm; further options go to `timm.create_model`.
        pixel_fill: what hidden patches, positions of the last map, are filled with: mean (the image's own mean colour)
            or zero.
    """

    has_attentions = False
    export_formats = ("timm", "onnx")

    def __init__(
        self,
        config: MIMConfigBase,
        use_mask_token: bool = False,
        *,
        model_name: str = "vit_tiny_patch16_224",
        pixel_fill: str = "mean",
        **options,
    ):
        super().__init__()
        self.pixel_fill = choose("pixel_fill of encoder 'timm'", pixel_fill, PIXEL_FILLS[1:])
        self.network = TimmNetwork(config, model_name, options)
        size, shapes = pair(config.image_size), self.network.shapes
        self.cell = pair(self.network.model.feature_info[-1]["reduction"])
        self.num_features = [shape[0] for shape in shapes]
        self.hidden_size = self.num_features[-1]
        self.stage_names = [f"stage{i}" for i in range(1, len(shapes) + 1)]
        self.base_grid = self.token_grid(*size)
        if shapes[-1][1:] != self.base_grid:
            rows, cols = shapes[-1][1:]
            raise ValueError(f"timm's {model_name!r} makes {rows}x{cols} tokens of {size[0]}x{size[1]} pixels")

    def check_final_norm(self, applied: bool) -> None:
        if not applied:
            raise ValueError("apply_final_norm=false: encoder 'timm' gives tokens behind the model's last norm only")

    def mask_grid(self, height: int, width: int) -> Grid:
        return grid_size((height, width), self.cell, "last map's cell")

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        if output_attentions:
            raise ValueError("encoder 'timm' returns no attentions")
        grid = self.mask_grid(*image_size(pixel_values))
        if bool_masked_pos is not None:
            pixel_values = fill_hidden_pixels(pixel_values, bool_masked_pos, grid, self.pixel_fill)
        maps = self.network(pixel_values)
        if image_size(maps[-1]) != grid:
            raise ValueError(f"the timm model makes a map of {image_size(maps[-1])} of images that should give {grid}")
        return output_of_maps(maps, output_hidden_states)
