"""The contract of an encoder, and what hiding tokens means."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .masking import num_hidden_tokens
from .options import Grid, unknown_choice


MASK_PARAMETERS = ("mask_token", "mask_scale")  # what says that a token is hidden: absent where none is
PIXEL_FILLS = ("none", "mean", "zero")
NO_MASK_TOKEN = "this model was made without its mask token and cannot hide tokens; load it with use_mask_token=True"


def is_mask_parameter(name: str) -> bool:
    """Whether a parameter of this full name belongs to pretraining and not to the features."""
    return name.rpartition(".")[2] in MASK_PARAMETERS


@dataclass
class EncoderOutput:
    """What an encoder returns and a decoder reads.

    tokens: (batch, prefix + rows * cols, dim); (batch, prefix + visible, dim) where hidden tokens are dropped.
    visible_index: (batch, visible), the place of each visible token in its image, in raster order; only with `drop`.
    hidden_index: (batch, hidden), the same for the hidden tokens.
    feature_maps: one (batch, channels, height, width) per stage, the stem first; ConvNets only.
    hidden_states: the tokens entering the first block and leaving each; on request.
    attentions: one (batch, heads, length, length) per block; on request.
    """

    tokens: Tensor
    visible_index: Tensor | None = None
    hidden_index: Tensor | None = None
    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    """An image encoder that can hide tokens. `forward` returns the tokens before `final_norm`; the model applies it.

    Subclasses are made as `Encoder(config, use_mask_token, **options)`. Without the mask token (inference) there is
    no unused parameter; masks are then an error in the styles that need one.
    """

    config: MIMConfigBase
    hidden_size: int
    num_prefix_tokens: int = 0
    num_cls_tokens: int = 0  # they come first
    has_attentions: bool = True
    base_grid: Grid  # of the output tokens at the config's image size
    mask_style: str | None = None  # what hiding means, where it is an option
    drops_tokens: bool = False
    hides_tokens: bool = True  # False with masking `none`
    stage_names: list[str]
    num_features: list[int]  # channels of every stage
    strides: list[int] | None = None  # pixels per position of each stage's map; None where all are of one stride
    # For export: the formats that hf_mim.conversion can write, and whether the traced network takes images of any size.
    # Tracing follows one path: a table that is resized only where the size differs is then never or always resized.
    export_formats: tuple[str, ...] = ("onnx",)
    traces_any_size: bool = False

    def __init__(self):
        super().__init__()
        self.final_norm: nn.Module = nn.Identity()
        self.frozen: list[nn.Module] = []  # stay in eval mode

    def _name_stages(self, widths: list[int]):
        """The stem and numbered stages, of these channels."""
        self.num_features = widths
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, len(widths))]

    def freeze(self, parameters: Iterable[nn.Parameter] | None = None):
        """No gradients for these parameters, by default all, until the encoder is loaded again. Modules that have no
        others stay in eval mode whatever the mode of the model around: their drop path and batch norms too."""
        for parameter in self.parameters() if parameters is None else parameters:
            parameter.requires_grad_(False)
        self.frozen = frozen_modules(self)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen if mode else ():
            module.eval()
        return self

    def mask_grid(self, height: int, width: int) -> Grid:
        """The grid of tokens that can be hidden."""
        raise NotImplementedError

    def token_grid(self, height: int, width: int) -> Grid:
        """The grid of the encoder's output tokens: `mask_grid`, or coarser."""
        return self.mask_grid(height, width)

    def target_grid(self, height: int, width: int) -> Grid:
        """The grid that predictions and targets live on: that of the mask; where nothing is hidden, of the output."""
        return self.mask_grid(height, width) if self.hides_tokens else self.token_grid(height, width)

    def state_grid(self, num_tokens: int, height: int, width: int) -> Grid:
        """The grid of a hidden state of `num_tokens` tokens without the prefix."""
        return self.token_grid(height, width)

    @property
    def has_cls_token(self) -> bool:
        return self.num_cls_tokens > 0

    def class_token(self, tokens: Tensor) -> Tensor:
        """Encoded tokens -> the class token (batch, dim), of several their mean."""
        return tokens[:, : max(1, self.num_cls_tokens)].mean(dim=1)

    def global_token(self, tokens: Tensor, bool_masked_pos: Tensor) -> Tensor:
        """Encoded tokens -> the class token (batch, dim), or without one the mean of the visible tokens."""
        if self.has_cls_token:
            return self.class_token(tokens)
        patches = tokens[:, self.num_prefix_tokens :]
        if patches.shape[1] != bool_masked_pos.shape[1]:  # hidden ones were dropped, or a coarser map has mixed them in
            return patches.mean(dim=1)
        visible = (~bool_masked_pos)[..., None].to(patches.dtype)
        return (patches * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)

    def blocks(self) -> list[list[nn.Module]]:
        """The modules of every block of a transformer or stage of a ConvNet, first to last, for layer-wise learning
        rates and adapters; empty where blocks cannot be told apart."""
        return []

    def modules_after_blocks(self) -> list[nn.Module]:
        """What counts as part of the head in layer-wise learning rates, wherever it is defined."""
        return [self.final_norm]

    def check_final_norm(self, applied: bool) -> None:
        """Raises:
        ValueError: tokens before the last norm are asked for, and there are none to be had.
        """

    def _num_hidden(self, mask: Tensor, grid: Grid) -> int:
        """How many tokens are hidden in every image; dropping needs the same number everywhere."""
        if mask.is_meta:
            return num_hidden_tokens(self.config, grid)
        if torch.compiler.is_compiling() or (mask.is_cuda and self.training):
            # Asking the mask would break the graph or wait for the GPU: the configured ratio says it.
            expected = num_hidden_tokens(self.config, grid)
            torch._assert_async(
                (mask.sum(1) == expected).all(), f"not {expected} hidden tokens, as masking_config says"
            )
            return expected
        counts = mask.sum(1).tolist()
        if len(set(counts)) > 1 or counts[0] in (0, mask.shape[1]):
            remedy = "; mask_style 'token' in place of 'drop' takes any mask" if self.mask_style == "drop" else ""
            raise ValueError(
                "dropping tokens needs the same number of hidden ones in every image, and a hidden and a visible one, "
                f"got {sorted(set(counts))} hidden of {mask.shape[1]}{remedy}"
            )
        return counts[0]

    def load_native_state(self, state: dict[str, Tensor]) -> None:
        """Loads the weights of the wrapped model of transformers, where one is wrapped."""
        raise ValueError(f"{type(self).__name__} wraps no model of transformers: choose encoder 'native'")

    def pooled_norm(self) -> nn.Module:
        """A norm that the architecture applies after pooling (ConvNeXt), freshly made; part of the pooler."""
        return nn.Identity()

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
    ) -> EncoderOutput:
        """`output_attentions` may be "last": `attentions` then has that of the last block alone, the others staying
        with the fused implementation."""
        raise NotImplementedError

    def stage_maps(self, encoded: EncoderOutput, height: int, width: int) -> tuple[Tensor, ...]:
        """One feature map (batch, channels, rows, cols) for every name in `stage_names`."""
        assert encoded.feature_maps is not None
        return encoded.feature_maps


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The outermost modules with parameters of which none has a gradient."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [frozen for child in module.children() for frozen in frozen_modules(child)]


def grid_size(size: Grid, cell: Grid, what: str) -> Grid:
    """How many cells fill an image of `size` pixels.

    Raises:
        ValueError: the image is no multiple of the cell; the message says what would be.
    """
    if any(length < step or length % step for length, step in zip(size, cell)):
        near = [max(step, round(length / step) * step) for length, step in zip(size, cell)]
        raise ValueError(
            f"image size {size[0]}x{size[1]} is not divisible by the {what} {cell[0]}x{cell[1]}; "
            f"{near[0]}x{near[1]} would be"
        )
    return size[0] // cell[0], size[1] // cell[1]


def image_size(images: Tensor) -> Grid:
    """(batch, channels, height, width) -> height and width."""
    return images.shape[2], images.shape[3]


def divide(size: Grid, steps: Grid) -> Grid:
    """Rows and columns of cells of `steps` pixels in `size` pixels, rounded down."""
    return size[0] // steps[0], size[1] // steps[1]


def select_states(
    states: tuple[Tensor, ...] | None, selection: bool | int | Sequence[int] | None
) -> tuple[Tensor | None, ...] | None:
    """What `output_hidden_states` asks for: all states, or those of the given indices with None for the others, as in
    transformers; indices out of range select nothing."""
    if states is None or selection is None or isinstance(selection, bool):
        return states
    indices = {selection} if isinstance(selection, int) else set(selection)
    return tuple(state if {i, i - len(states)} & indices else None for i, state in enumerate(states))


def choose(name: str, value: str, choices: Iterable[str]) -> str:
    """`value`, if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise unknown_choice(name, value, choices)
    return value


def to_grey(pixel_values: Tensor, num_channels: int) -> Tensor:
    """Three channels given to a model of one, (batch, 3, height, width) -> (batch, 1, height, width); anything else as
    it is. The pipelines of transformers make every image RGB. The weights are those of PIL's `convert("L")`; equal
    channels, a grey image made RGB, give exactly that channel, and normalising before or after is the same."""
    if num_channels != 1 or pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        return pixel_values
    red, green, blue = pixel_values.split(1, dim=1)
    return red + 0.587 * (green - red) + 0.114 * (blue - red)


def fill_hidden_pixels(pixel_values: Tensor, bool_masked_pos: Tensor, grid: Grid, fill: str) -> Tensor:
    """Replaces the hidden pixels of (batch, channels, height, width) by zero or by the image's own mean colour, taken
    over all its pixels (A2MIM, 2205.13943, section 4.1, and its released code). Visible pixels are unchanged."""
    if fill == "none":
        return pixel_values
    hidden = bool_masked_pos.view(-1, 1, *grid)
    for axis, length in ((2, pixel_values.shape[2]), (3, pixel_values.shape[3])):
        hidden = hidden.repeat_interleave(length // hidden.shape[axis], dim=axis)
    colour = pixel_values.mean(dim=(2, 3), keepdim=True) if fill == "mean" else pixel_values.new_zeros(1)
    return torch.where(hidden, colour, pixel_values)


def split_mask(bool_masked_pos: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """(batch, tokens) -> the places of the visible and of the hidden tokens, each in raster order."""
    order = bool_masked_pos.byte().argsort(dim=1, stable=True)
    num_visible = bool_masked_pos.shape[1] - num_hidden
    return order[:, :num_visible], order[:, num_visible:]


def patchify(pixel_values: Tensor, grid: Grid) -> Tensor:
    """(batch, channels, height, width) -> (batch, rows * cols, values): row, column, channel inside a patch."""
    batch, channels, height, width = pixel_values.shape
    patches = pixel_values.view(batch, channels, grid[0], height // grid[0], grid[1], width // grid[1])
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], -1)


def unpatchify(patches: Tensor, grid: Grid, height: int, width: int) -> Tensor:
    """The inverse of `patchify`."""
    batch = patches.shape[0]
    patches = patches.view(batch, *grid, height // grid[0], width // grid[1], -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def map_to_tokens(features: Tensor) -> Tensor:
    """(batch, dim, rows, cols) -> (batch, rows * cols, dim)"""
    return features.flatten(2).transpose(1, 2)


def output_of_maps(maps: Sequence[Tensor], output_hidden_states: bool) -> EncoderOutput:
    """What an encoder returns whose stages give maps: its tokens are the positions of the last."""
    maps = tuple(maps)
    return EncoderOutput(
        tokens=map_to_tokens(maps[-1]), feature_maps=maps, hidden_states=maps if output_hidden_states else None
    )


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(batch, rows * cols, dim) -> (batch, dim, rows, cols)"""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
