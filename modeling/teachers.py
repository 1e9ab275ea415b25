"""Frozen teachers: vision models whose features are targets. They live outside the module tree, so that they are
neither trained nor saved nor wrapped for several GPUs, and are loaded on first use."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from .encoder_base import Encoder, EncoderOutput, Grid
from .options import pair, unknown_choice


MATCHES = ("input", "stage", "dilate", "interpolate")
# name, dilation -> the loaded model; two targets with one teacher share it.
LOADED = {}


class Teacher:
    """A frozen model that gives feature maps on the student's grid.

    Args:
        source: Hub id or local folder of any transformers vision model, or of a checkpoint of this project.
        layers: stages by index (-1 is the last) or name.
        match: how the maps come onto the student's grid: `input` enlarges the teacher's input; `stage` demands stages
            that have the grid already; `dilate` keeps the last stages fine (timm ConvNets only); `interpolate` resizes
            the maps bilinearly.
        input_size: side or (height, width) of the teacher's input in pixels for `stage`, `dilate` and `interpolate`;
            None: that of the student.
        image_mean, image_std: of the student's pixels; the teacher's own are read beside it.

    Raises:
        ValueError: the model cannot be loaded, has no patch tokens, lacks a layer or cannot match the grid.
    """

    def __init__(self, source: str, layers, match: str, input_size, image_mean, image_std):
        if match not in MATCHES:
            raise unknown_choice("match of the teacher's grid", match, MATCHES)
        self.source, self.layers, self.match, self.input_size = source, layers, match, input_size
        self.image_mean, self.image_std = image_mean, image_std
        self.last = (None, None)

    def feature_dims(self) -> list[int]:
        """The channels of each chosen layer."""
        encoder = self.model().encoder
        return [encoder.num_features[self._index(encoder, layer)] for layer in self.layers]

    def layer_names(self) -> list[str]:
        """The name of each chosen layer."""
        encoder = self.model().encoder
        return [encoder.stage_names[self._index(encoder, layer)] for layer in self.layers]

    def _index(self, encoder, layer: int | str) -> int:
        names = encoder.stage_names
        if isinstance(layer, str):
            if layer not in names:
                raise unknown_choice(f"layer of teacher {self.source}", layer, names)
            return names.index(layer)
        if not -len(names) <= layer < len(names):
            raise ValueError(f"teacher {self.source} has no layer {layer}; it has {len(names)}: {', '.join(names)}")
        return layer % len(names)

    def model(self, grid_stride: int | None = None):
        """The loaded model, in bfloat16 on a GPU."""
        dilation = grid_stride if self.match == "dilate" else None
        if (self.source, dilation) not in LOADED:
            LOADED[self.source, dilation] = load_teacher(self.source, dilation)
        return LOADED[self.source, dilation]

    @torch.no_grad()
    def maps(self, pixel_values: Tensor, grid: Grid) -> list[Tensor]:
        """Student's pixels (batch, channels, height, width) -> one (batch, dim, rows, cols) per layer, float32, on
        `grid`. The batch of the last call is not run again."""
        if pixel_values.is_inference():  # these do not count their changes
            return self._maps(pixel_values, grid)
        key = (id(pixel_values), pixel_values._version, grid)
        if self.last[0] != key:
            self.last = (key, self._maps(pixel_values, grid), pixel_values)  # kept, so that its id stays its own
        return self.last[1]

    def _maps(self, pixel_values: Tensor, grid: Grid) -> list[Tensor]:
        model = self.model(pixel_values.shape[2] // grid[0])
        dtype = torch.bfloat16 if pixel_values.is_cuda else torch.float32
        model.to(device=pixel_values.device, dtype=dtype)
        indices = [self._index(model.encoder, layer) for layer in self.layers]
        pixels = self._renormalise(pixel_values.float(), model.config)
        size = self._input_size(model, indices, pixel_values.shape[2:], grid)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        encoded = model.encoder(pixels.to(dtype), output_hidden_states=True)
        stages = model.encoder.stage_maps(encoded, *size)
        return [self._on_grid(stages[i].float(), grid, i) for i in indices]

    def _renormalise(self, pixel_values: Tensor, config) -> Tensor:
        wanted = config.num_channels
        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels = pixel_values * std + mean
        if pixels.shape[1] != wanted:
            if pixels.shape[1] != 1:
                raise ValueError(f"teacher {self.source} takes {wanted} channels, the student {pixels.shape[1]}")
            pixels = pixels.expand(-1, wanted, -1, -1)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        return (pixels - mean) / std

    def _input_size(self, model, indices: list[int], student: Grid, grid: Grid) -> Grid:
        if self.match != "input":
            size = self.input_size or student
            return (size, size) if isinstance(size, int) else tuple(size)
        strides = {stage_strides(model)[i] for i in indices}
        if len(strides) > 1:
            raise ValueError(
                f"teacher {self.source}: layers {self.layers} have strides {sorted(strides)}, and match 'input' brings "
                "one stride onto the grid; choose match 'interpolate'"
            )
        (stride,) = strides
        return tuple(tokens * step for tokens, step in zip(grid, stride))

    def _on_grid(self, stage: Tensor, grid: Grid, index: int) -> Tensor:
        if tuple(stage.shape[2:]) == grid:
            return stage
        if self.match == "interpolate":
            return F.interpolate(stage, size=grid, mode="bilinear", antialias=True, align_corners=False)
        raise ValueError(
            f"teacher {self.source}: layer {index} has a grid of {stage.shape[2]}x{stage.shape[3]}, the student one of "
            f"{grid[0]}x{grid[1]}; choose other layers, another input_size, or match 'interpolate' or 'input'"
        )


@torch.no_grad()
def stage_strides(model) -> list[Grid]:
    """Pixels per cell (down, right) of every stage's map, read off one empty image; remembered in the model."""
    if not hasattr(model, "teacher_strides"):
        height, width = pair(model.config.image_size)
        like = next(model.parameters())
        empty = torch.zeros(1, model.config.num_channels, height, width, device=like.device, dtype=like.dtype)
        stages = model.encoder.stage_maps(model.encoder(empty, output_hidden_states=True), height, width)
        model.teacher_strides = [(height // stage.shape[2], width // stage.shape[3]) for stage in stages]
    return model.teacher_strides


class TimmEncoder(Encoder):
    """A timm model as transformers wraps it, cut into its `feature_info`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.stage_names = [entry["module"] for entry in network.feature_info]
        self.num_features = [entry["num_chs"] for entry in network.feature_info]

    def forward(self, pixel_values, bool_masked_pos=None, output_hidden_states=False, output_attentions=False):
        maps = self.network.forward_intermediates(pixel_values, intermediates_only=True)
        return EncoderOutput(tokens=maps[-1], feature_maps=tuple(maps))


class TimmTeacher(nn.Module):
    """What `Teacher` needs of a model, around a timm model."""

    def __init__(self, wrapped):
        super().__init__()
        cfg = wrapped.config.pretrained_cfg
        self.encoder = TimmEncoder(wrapped.timm_model)
        self.config = SimpleNamespace(
            num_channels=cfg["input_size"][0],
            image_size=tuple(cfg["input_size"][1:]),
            image_mean=cfg["mean"],
            image_std=cfg["std"],
        )


def load_teacher(source: str, output_stride: int | None = None) -> nn.Module:
    """-> a frozen model with an `encoder` and a `config`.

    Raises:
        ValueError: it cannot be loaded as an image encoder, or has no dilation to set.
    """
    from .modeling_mim import MIMModel

    try:
        config = AutoConfig.from_pretrained(source)
        changes = _dilated(config, output_stride)
        if config.model_type == "mim":
            model = MIMModel.from_pretrained(source, add_pooling_layer=False, **changes)
        elif config.model_type == "timm_wrapper":
            model = TimmTeacher(AutoModel.from_pretrained(source))
        else:
            model = MIMModel.from_encoder(source)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot use {source!r} as a teacher: {reason}") from error
    return model.eval().requires_grad_(False)


def _dilated(config, output_stride: int | None) -> dict:
    if output_stride is None:
        return {}
    if getattr(config, "encoder_config", {}).get("model_type") != "timm":
        raise ValueError("match 'dilate' needs a timm ConvNet saved by this project; choose match 'input'")
    config.encoder_config = {**config.encoder_config, "output_stride": output_stride}
    return {"config": config}
