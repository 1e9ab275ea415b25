"""The contract of a target, and what targets share."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder_base import Encoder, Grid


# (predicted, target) -> the loss of every value, or of every token with a last axis of length 1.
Distance = Callable[[Tensor, Tensor], Tensor]
# Losses per value; the targets average them over a token's values.
DISTANCES: dict[str, Distance] = {
    "mse": lambda predicted, target: (predicted - target).square(),
    "l1": lambda predicted, target: (predicted - target).abs(),
    "smooth_l1": lambda predicted, target: F.smooth_l1_loss(predicted, target, reduction="none", beta=2.0),
}


STRETCH = (2.0, 98.0)  # percentiles of a channel that a picture of many bands shows as black and white
WHOLE_NOTE = "Nothing was hidden: every patch is learned."
VISIBLE_NOTE = "Only hidden patches are learned: what is predicted where a patch is visible means nothing."


class Target(nn.Module):
    """Made as `Target(config, encoder, **options)`.

    scope: "hidden" or "all", the tokens that the decoder is asked for.
    outputs: the dimension of each prediction: {"patches": dim}, and {"global": dim} where there is one.
    distance: an entry of `DISTANCES`, for the targets that keep the `loss` of this class.
    global_head: mlp, or none: what makes the "global" prediction of the class token.
    token_features: whether the targets are features of tokens, which can be averaged.
    needs_image_only: whether the targets follow from the image alone, without a teacher, a codebook or the student.
    head_dims: of each prediction, the channels of the heads that make it, for targets that want several: {"patches":
        [dim, dim]}, which sum to `outputs`.
    image_note: what a person who looks at `to_image` and `comparison` must know.
    """

    scope: str = "hidden"
    outputs: dict[str, int]
    distance: Distance
    global_head: str = "mlp"
    token_features: bool = True
    needs_image_only: bool = False
    head_dims: dict[str, list[int]] | None = None
    image_note: str = VISIBLE_NOTE

    def options_to_save(self) -> dict:
        """What belongs into `target_config`, so that the model can be built where its teacher is not at hand."""
        return {}

    def images_to_fit(self) -> int:
        """How many training images the target wants to see, by `fit`, before the first step; 0: none."""
        return 0

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Estimates what the target must know of the training images, which is saved with the model. `batches` are of
        `pixel_values` (batch, channels, height, width)."""

    def bind(self, encoder: Encoder) -> None:
        """Shows the target the student's encoder; called before each loss, for targets that follow the student."""

    def update(self, step: int) -> None:
        """Follows the student after optimizer step `step` (from 1); `MIMTrainer` calls it."""

    def log_metrics(self) -> dict[str, float]:
        """Metrics of the training targets since the last call, by name."""
        return {}

    def reduce_metrics(self) -> None:
        """Sums what `log_metrics` counts over all processes into the first. Every process calls it, at one step."""

    def moving_state(self) -> dict[str, Tensor]:
        """What a resumed run needs of a target that moves. It goes into the Trainer's checkpoints, not to the Hub."""
        return {}

    def load_moving_state(self, state: dict[str, Tensor]) -> None:
        """Takes `moving_state` back."""

    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The unmasked images (batch, channels, height, width) -> {"patches": (batch, rows * cols, dim)}, without
        gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no method targets(pixel_values, grid)")

    def loss(
        self,
        predictions: dict[str, Tensor],
        targets: dict[str, Tensor],
        bool_masked_pos: Tensor,
        grid: Grid,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-> a scalar. `predictions["patches"]` is (batch, K, dim), K = the hidden tokens or all;
        `bool_masked_pos` (batch, rows * cols); `generator` for targets that draw something.

        Unless a target says otherwise: `self.distance`, averaged over each token's values and over the hidden tokens.
        """
        predicted = predictions["patches"].float()
        target, weight = hidden_values(targets["patches"].float(), bool_masked_pos, predicted.shape[1])
        return mean_over_hidden(self.distance(predicted, target).mean(dim=-1), weight)

    def to_image(
        self, values: Tensor, pixel_values: Tensor, grid: Grid, bool_masked_pos: Tensor | None = None
    ) -> Tensor:
        """What a person should be shown of values (batch, rows * cols, dim): (batch, 1 or 3, height, width) in [0, 1],
        of the images' size or a whole multiple of it.

        With a mask, nothing of the hidden pixels may be used.
        """
        raise NotImplementedError

    def comparison(
        self, predicted: Tensor, target: Tensor, pixel_values: Tensor, grid: Grid, bool_masked_pos: Tensor
    ) -> dict[str, Tensor]:
        """Where the target's own values (`target`, of `targets`) are at hand: pictures like those of `to_image` to be
        shown beside the prediction, by caption. "target" is what the prediction should look like, where that is not
        the image itself; "prediction" replaces `to_image` of the prediction where both are drawn by one scale.
        """
        return {"target": self.to_image(target, pixel_values, grid)}


# The targets that a config can name: filled in targets.py, which is above those that wrap another one.
TARGETS: dict[str, type[Target]] = {}


def hidden_values(values: Tensor, bool_masked_pos: Tensor, num_predicted: int) -> tuple[Tensor, Tensor | None]:
    """Brings values (batch, tokens, dim) beside predictions of `num_predicted` tokens.

    -> the hidden tokens' values and None, where only they are predicted; else all values and the weight of each token
    (batch, tokens), 1 for a hidden one. No counting, so that a GPU need not be waited for.
    """
    if num_predicted == values.shape[1]:
        return values, bool_masked_pos.to(values.dtype)
    index = bool_masked_pos.byte().argsort(dim=1, stable=True)[:, -num_predicted:]
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])), None


def mean_over_hidden(per_token: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of (batch, K) losses over the hidden tokens of the whole batch; 0 where none is hidden."""
    if weight is None:
        return per_token.mean()
    return (per_token * weight).sum() / weight.sum().clamp(min=1)


def feature_colours(values: Tensor, grid: Grid, size: Grid, like: Tensor | None = None) -> Tensor:
    """Features (batch, tokens, dim) -> (batch, 3, height, width) in [0, 1]: their first three principal components
    over the whole batch, each stretched over its range, every token a rectangle. Components and ranges are those of
    `like`, other features of the same dimension, where they are given."""
    like = (values if like is None else like).flatten(0, 1)
    mean = like.mean(dim=0)
    flat = like - mean
    # The signs of principal components are arbitrary: the largest weight of each is made positive.
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = F.pad((directions * largest.sign()).T, (0, 3 - len(directions)))
    shares, others = flat @ directions, (values - mean) @ directions
    low, high = shares.amin(dim=0), shares.amax(dim=0)
    colours = ((others - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return token_colours(colours, grid, size)


def token_colours(colours: Tensor, grid: Grid, size: Grid) -> Tensor:
    """(batch, tokens, 3) -> (batch, 3, height, width), every token a rectangle."""
    return F.interpolate(colours.transpose(1, 2).unflatten(2, grid), size=size)


def code_colours(index: Tensor, count: int, grid: Grid, size: Grid) -> Tensor:
    """Numbers (batch, tokens) below `count` -> (batch, 3, height, width): each number has a colour of its own."""
    palette = torch.rand(count, 3, generator=torch.Generator().manual_seed(0)).to(index.device)
    return token_colours(palette[index], grid, size)


def displayable(
    pixel_values: Tensor,
    image_mean: list[float],
    image_std: list[float],
    bands: Sequence[int] | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """Normalised (batch, channels, height, width) -> (batch, 1 or 3, height, width) in [0, 1].

    Args:
        bands: which channels to show, one or three; None is the first three, of two the first.
        reference: images of more than three channels are stretched, per channel, from the `STRETCH` percentiles of
            these normalised images, (batch, channels, rows, cols), to 0 and 1; None takes the images themselves.
    """
    many = pixel_values.shape[1] > 3
    bands = list(bands) if bands else [0, 1, 2] if pixel_values.shape[1] >= 3 else [0]
    mean, std = (torch.tensor(values, device=pixel_values.device) for values in (image_mean, image_std))
    mean, std = mean[bands, None, None], std[bands, None, None]
    shown = pixel_values[:, bands].float() * std + mean
    if many:
        basis = shown if reference is None else reference[:, bands].float() * std + mean
        values = basis.transpose(0, 1).flatten(1)
        values = values[:, :: max(1, values.shape[1] // 2**20)]  # quantile takes so many at most
        low, high = torch.quantile(values, values.new_tensor(STRETCH) / 100, dim=1)[..., None, None]
        shown = (shown - low) / (high - low).clamp(min=1e-6)
    return shown.clamp(0, 1)
