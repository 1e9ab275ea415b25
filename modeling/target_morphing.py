"""Morphed tokens as targets (DTM, 2401.00254): wraps any target of token features."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose, image_size
from .layers import take_tokens
from .morphing import Groups, draw_schedule, even_schedule, match_tokens
from .options import OptionError, check_part
from .target_base import TARGETS, Target, code_colours, feature_colours
from .target_teacher import FEATURE_DISTANCES, normalise_features


class TokenMorphingTarget(Target):
    """Predictions and targets are averaged over groups of similar target tokens before they are compared
    (DTM, 2401.00254).

    The loss is over all tokens, hidden or not: (1 / N) sum over groups of size x distance of the two means, the mean
    of `num_draws` independent draws of schedule and groups.

    Options:
        features: the target that is wrapped: {"name": ..., and its options}.
        loss: mse, l1, smooth_l1 (beta 2, as the released code by default) or cosine; which of them the paper's results
            used is unverified.
        num_draws: 2 in the released code.
        max_iterations: 14 in the released code; the number of iterations is drawn up to it.
        num_merged, num_iterations: fix what is otherwise drawn (an ablation of the paper: worse than drawn).
        halves, means, matching: see `match_tokens`.
        group_weights: size, as above, or uniform: the plain mean over groups (unverified).
        norm: none, layer for a LayerNorm without parameters of the morphed targets, or unbiased, as layer but with the
            unbiased variance (the released code's option).
    """

    scope = "all"
    image_note = (
        "Every token is learned, hidden or not, as the mean of its group. Here half of the tokens are merged; under "
        "'groups' each group has a colour of its own, elsewhere that of its mean: the first three principal components."
    )

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        features: dict | None = None,
        loss: str = "smooth_l1",
        num_draws: int = 2,
        max_iterations: int = 14,
        num_merged: int | None = None,
        num_iterations: int | None = None,
        halves: str = "random",
        means: str = "size",
        matching: str = "similar",
        group_weights: str = "size",
        norm: str = "none",
    ):
        super().__init__()
        self.wrapped = wrap_features("token_morphing", config, encoder, features)
        self.outputs = {"patches": self.wrapped.outputs["patches"]}
        self.distance = FEATURE_DISTANCES[choose("loss of target 'token_morphing'", loss, FEATURE_DISTANCES)]
        self.num_draws, self.max_iterations = num_draws, max_iterations
        if (num_merged is None) != (num_iterations is None):
            raise ValueError("num_merged and num_iterations fix the schedule together: set both or neither")
        self.fixed = None if num_merged is None or num_iterations is None else (num_merged, num_iterations)
        self.how = {
            "halves": choose("halves", halves, ("random", "alternating")),
            "means": choose("means", means, ("size", "iterated")),
            "matching": choose("matching", matching, ("similar", "random")),
        }
        self.group_weights = choose("group_weights", group_weights, ("size", "uniform"))
        self.norm = choose("norm", norm, ("none", "layer", "unbiased"))
        self.features = dict(features or {})

    def options_to_save(self) -> dict:
        return {"features": {**self.features, **self.wrapped.options_to_save()}}

    def images_to_fit(self) -> int:
        return self.wrapped.images_to_fit()

    def fit(self, batches: Iterable[Tensor]) -> None:
        self.wrapped.fit(batches)

    def bind(self, encoder: Encoder) -> None:
        self.wrapped.bind(encoder)

    def update(self, step: int) -> None:
        self.wrapped.update(step)

    def moving_state(self) -> dict:
        return self.wrapped.moving_state()

    def load_moving_state(self, state: dict) -> None:
        self.wrapped.load_moving_state(state)

    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"patches": self.wrapped.targets(pixel_values, grid)["patches"]}

    def morph(self, values: Tensor, generator: torch.Generator | None = None) -> Groups:
        """One draw of groups for values (batch, tokens, dim)."""
        tokens = values.shape[1]
        if self.fixed:
            schedule = even_schedule(tokens, *self.fixed)
        else:
            schedule = draw_schedule(tokens, self.max_iterations, generator)
        return match_tokens(values, schedule, generator=generator, **self.how)

    @torch.compiler.disable(reason="each step draws other sizes of groups, and would be compiled again")
    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        predicted, target = predictions["patches"].float(), targets["patches"].float()
        losses = []
        for _ in range(self.num_draws):
            groups = self.morph(target, generator)
            morphed = normalise_features(groups.means(target), self.norm)
            per_group = self.distance(groups.means(predicted), morphed).mean(dim=-1)
            weight = groups.size if self.group_weights == "size" else torch.ones_like(groups.size)
            losses.append((per_group * weight).sum() / weight.sum())
        return torch.stack(losses).mean()

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        groups, tokens = shown_groups(values), values.float()
        means = take_tokens(groups.means(tokens), groups.index)
        return feature_colours(means, grid, image_size(pixel_values))

    def comparison(self, predicted, target, pixel_values, grid, bool_masked_pos) -> dict[str, Tensor]:
        """The target's groups, and the means of target and prediction over them."""
        size, groups = image_size(pixel_values), shown_groups(target)
        means, predicted = (take_tokens(groups.means(tokens.float()), groups.index) for tokens in (target, predicted))
        return {
            "groups": code_colours(groups.index, groups.count, grid, size),
            "target": feature_colours(means, grid, size),
            "prediction": feature_colours(predicted, grid, size, like=means),
        }


def shown_groups(values: Tensor) -> Groups:
    """What a picture shows of (batch, tokens, dim): half of the tokens merged, always in the same way."""
    schedule = even_schedule(values.shape[1], values.shape[1] // 2, 7)
    return match_tokens(values, schedule, generator=torch.Generator().manual_seed(0))


def wrap_features(kind: str, config: MIMConfigBase, encoder: Encoder, features: dict | None) -> Target:
    """The target that a wrapping target `kind` is made around.

    Raises:
        ValueError: none or an unknown one is named, or it is not one of token features, or of several teachers.
    """
    options = dict(features or {})
    name = options.pop("name", None)
    if name is None:
        raise ValueError(
            f"target {kind!r} needs target_config.features: {{name: teacher_feature, teacher: ...}}, or {{name: hog}}"
        )
    check_part("target", TARGETS, name, options, config.plugins)
    wrapped = TARGETS[name](config, encoder, **options)
    if not wrapped.token_features:
        raise ValueError(f"target {kind!r} needs token features, which target {name!r} does not have")
    if wrapped.head_dims is not None:  # whose weights are of losses, and the wrapped target's is not asked for
        raise OptionError(f"target {kind!r} takes one teacher: set features.name=teacher_feature", "features", name)
    return wrapped
