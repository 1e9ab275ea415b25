"""The features of several frozen teachers at once: one student learns from all of them (RADIO, 2312.06709)."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration_base import MIMConfigBase
from .encoder_base import Encoder, Grid
from .options import OptionError, check_part, shorten
from .target_teacher import FeatureTarget, TeacherFeatureTarget, fit_together


ENTRY = {"teacher_feature": TeacherFeatureTarget}  # what an entry of `teachers` is


class TeacherFeaturesTarget(FeatureTarget):
    """The token features of several frozen teachers, each standardised by itself and predicted by a head of its own
    (RADIO, 2312.06709; PHI-S, 2410.01680).

    The loss is the mean over the teachers of theirs, weighted. A teacher's grid is brought onto the student's as its
    `match` says: by the size of its input, or interpolated.

    Options:
        teachers: a list of teachers: each a name as `teacher` of target `teacher_feature`, or {teacher: name, weight:
            1.0, and further options of that target}, which win over the following.
        layers, match, input_size, norm, loss, global_weight, statistics_images: of all teachers, as of target
            `teacher_feature`.
        weights: of the teachers, in their order; None: 1 each, or what the entries say.
        feature_dims: the channels of each teacher's layers; filled in with the first model that is built.
    """

    def __init__(
        self,
        config: MIMConfigBase,
        encoder: Encoder,
        *,
        teachers: list[str | dict[str, Any]] | None = None,
        layers: list[int | str] | tuple[int | str, ...] = (-1,),
        match: str = "input",
        input_size: int | list[int] | None = None,
        norm: str = "phi_s",
        loss: str = "mse",
        global_weight: float = 0.0,
        statistics_images: int = 1024,
        weights: list[float] | None = None,
        feature_dims: list[list[int]] | None = None,
    ):
        super().__init__()
        entries = [dict(entry) if isinstance(entry, dict) else {"teacher": entry} for entry in teachers or ()]
        self.weights = teacher_weights(entries, weights)
        shared: dict[str, Any] = {
            "layers": list(layers),
            "match": match,
            "input_size": input_size,
            "norm": norm,
            "loss": loss,
        }
        shared |= {"global_weight": global_weight, "statistics_images": statistics_images}
        dims: list = feature_dims or [None] * len(entries)
        if len(dims) != len(entries):
            raise OptionError(f"feature_dims are of {len(dims)} teachers, and there are {len(entries)}", "feature_dims")
        self.parts = nn.ModuleList(
            make_part(config, encoder, {**shared, **entry, "feature_dims": dim}) for entry, dim in zip(entries, dims)
        )
        self._set_outputs()
        self.losses: Tensor | None = None  # (teachers + 1,): sums over the steps since `log_metrics`, and their number

    def _set_outputs(self):
        self.block_dims = [dim for part in self._parts for dim in part.block_dims]
        heads = {"patches": [part.outputs["patches"] for part in self._parts]}
        self.global_dims = [part.outputs.get("global", 0) for part in self._parts]
        if any(self.global_dims):
            heads["global"] = [dim for dim in self.global_dims if dim]
        self.head_dims = heads
        self.outputs = {name: sum(dims) for name, dims in heads.items()}

    @property
    def _parts(self) -> Sequence[TeacherFeatureTarget]:
        return cast(Sequence[TeacherFeatureTarget], self.parts)

    @property
    def teachers(self) -> list:
        """The `Teacher`s."""
        return [part.teacher for part in self._parts]

    def options_to_save(self) -> dict:
        return {"feature_dims": [part.feature_dims for part in self._parts]}

    def images_to_fit(self) -> int:
        return max(part.images_to_fit() for part in self._parts)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Estimates the statistics of each teacher's features that has none yet."""
        fit_together([part for part in self._parts if part.images_to_fit()], batches)

    @torch.no_grad()
    def targets(self, pixel_values: Tensor, grid: Grid) -> dict[str, Tensor]:
        parts = [part.targets(pixel_values, grid) for part in self._parts]
        return {name: torch.cat([part[name] for part in parts if name in part], dim=-1) for name in self.outputs}

    def loss(self, predictions, targets, bool_masked_pos, grid, generator=None) -> Tensor:
        pairs = zip(self._divide(predictions), self._divide(targets))
        losses = [part.loss(*pair, bool_masked_pos, grid) for part, pair in zip(self._parts, pairs)]
        if self.training:
            self._count(torch.stack(losses).detach())
        return torch.stack([weight * loss for weight, loss in zip(self.weights, losses)]).sum() / sum(self.weights)

    def _count(self, losses: Tensor) -> None:
        """losses (teachers,)"""
        step = torch.cat([losses, losses.new_ones(1)]).float()
        self.losses = step if self.losses is None else self.losses.to(step.device) + step  # waits for no GPU

    @torch.no_grad()
    def reduce_metrics(self) -> None:
        if self.losses is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        torch.distributed.reduce(self.losses, 0)
        if torch.distributed.get_rank() > 0:
            self.losses = None

    def log_metrics(self) -> dict[str, float]:
        """The mean loss of each teacher's head in training, numbered from 1."""
        if self.losses is None:
            return {}
        *sums, steps = self.losses.tolist()
        self.losses = None
        return {f"teacher_{i}_loss": total / steps for i, total in enumerate(sums, 1)}

    def _divide(self, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Predictions or targets of all teachers -> of each."""
        assert self.head_dims is not None
        parts = [{"patches": block} for block in values["patches"].split(self.head_dims["patches"], dim=-1)]
        if "global" in values:
            for part, block in zip(parts, values["global"].split(self.global_dims, dim=-1)):
                part["global"] = block
        return parts


def make_part(config: MIMConfigBase, encoder: Encoder, options: dict[str, Any]) -> TeacherFeatureTarget:
    """The target of one teacher."""
    options.pop("weight", None)
    check_part("target", ENTRY, "teacher_feature", options)
    return TeacherFeatureTarget(config, encoder, **options)


def teacher_weights(entries: list[dict[str, Any]], weights: list[float] | None) -> list[float]:
    """The weight of each teacher.

    Raises:
        OptionError: there is no teacher, one has no name or is named twice with the same options, or the weights are
            given twice, are not as many, are negative or all zero.
    """
    if not entries:
        message = "target 'teacher_features' needs target_config.teachers, a list of Hub ids or local folders"
        raise OptionError(message, "teachers", None)
    for i, entry in enumerate(entries):
        if not isinstance(entry.get("teacher"), str):
            raise OptionError(f"teachers[{i}] has no name: {shorten(entry)}; say teacher: NAME", "teachers", entry)
        if any({**entry, "weight": 0} == {**other, "weight": 0} for other in entries[:i]):
            raise OptionError(f"teacher {entry['teacher']} is there twice: give it a weight instead", "teachers", entry)
    if weights is not None and any("weight" in entry for entry in entries):
        message = "weights are given by the teachers' entries and by `weights`: leave one of them out"
        raise OptionError(message, "weights", weights)
    given = [entry.get("weight", 1.0) for entry in entries] if weights is None else list(weights)
    if len(given) != len(entries):
        raise OptionError(f"{len(given)} weights are given for {len(entries)} teachers", "weights", weights)
    for weight in given:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise OptionError(f"a teacher's weight must be a number of at least 0, got {shorten(weight)}", "weights")
    if not sum(given) > 0:
        raise OptionError("all teachers have weight 0: there is nothing to learn", "weights", weights)
    return [float(weight) for weight in given]
