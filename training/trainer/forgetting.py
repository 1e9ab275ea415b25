"""Whether an encoder that is trained further forgets: what its features are worth, and how like they still are to those
that it started with, on images held out of the run and on others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.training.common.device import on_device
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits, load_splits
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.cka import linear_cka
from hf_mim.training.evaluation.metrics import FORGETTING, READOUTS
from hf_mim.training.plots.charts import draw_forgetting
from hf_mim.training.trainer.monitor import example_batches, is_due, without_traces
from hf_mim.training.trainer.trainer import MIMTrainer


TRAIN, TEST = 1000, 500  # images, at most, that readouts are fitted to, and that they and CKA are measured on
FALLEN = 3.0  # deviations of chance by which an accuracy has fallen: a false alarm in a thousand checks
UNLIKE = 0.5  # of the way in CKA from the start to the untrained encoder that features may go
LEAST = 0.05  # by which CKA must have fallen, where an untrained encoder's is hardly lower
PREFIX = "forgetting"  # of the keys in the log
# What holds the start, and whether a run has it.
REMEDIES = {
    "keep near the start (model.keep=features)": lambda trainer: trainer.distance is not None,
    "train additions alone (training.lora=true)": lambda trainer: trainer.args.lora,
    "train early blocks less (training.layer_decay=0.75, or training.freeze_layers)": lambda trainer: (
        trainer.args.layer_decay < 1 or trainer.args.freeze_layers
    ),
}


@dataclass
class Measurement:
    """What was measured of an encoder on some images.

    Args:
        features: mean of the patch tokens, (images, dim).
        right: whether each image is classified right, bool (images,), by readout; {} without labels.
    """

    features: Tensor
    right: dict[str, Tensor]

    def scores(self, start: "Measurement") -> dict[str, float]:
        """{"knn", "linear": percent, "cka": to the start}."""
        accuracies = {name: 100 * right.double().mean().item() for name, right in self.right.items()}
        return {**accuracies, "cka": linear_cka(start.features, self.features)}


@dataclass
class WatchedImages:
    """Images on which forgetting is watched.

    Args:
        name: in the keys of the log.
        title: for people.
        test: a data set of images, or batches of `pixel_values`.
        labelled: the data set that readouts are fitted to and the one that they are tested on, each with its labels as
            of `frozen.subset`; None without labels.
        is_own: whether they are of the run's own data, whose features are meant to change.
    """

    name: str
    title: str
    test: Any
    labelled: tuple[tuple, tuple] | None
    is_own: bool

    def measure(self, model: MIMModel, bf16: bool) -> Measurement:
        """Encodes them; the model is left in eval mode."""
        features = self._features(model, self.test, bf16)
        if self.labelled is None:
            return Measurement(features, {})
        train, test = self.labelled
        fitted = self._features(model, train[0], bf16)
        labels, test_labels = frozen.labels_of(train), frozen.labels_of(test)
        predicted = {name: metric.compute(fitted, labels)(features).argmax(1) for name, metric in READOUTS.items()}
        return Measurement(features, {name: classes == test_labels for name, classes in predicted.items()})

    @staticmethod
    def _features(model: MIMModel, images: Any, bf16: bool) -> Tensor:
        pixels: Iterable = images if isinstance(images, list) else frozen.pixel_loader(images, model.config)
        return frozen.extract_features(model, pixels, bf16)["mean"].clone()  # no tensor of inference mode

    def __len__(self) -> int:
        return sum(map(len, self.test)) if isinstance(self.test, list) else len(self.test)


def watched_images(splits: Splits, config: MIMConfig) -> list[WatchedImages]:
    """Those of a run: held out of its own data, and of the data that `data.forgetting_dataset` names, by default the
    images that ship with the package.

    Raises:
        ValueError, OSError: that data set cannot be used.
    """
    own = splits.data
    images = [choose_images("own", own.dataset or "the shipped images", splits, config, True)]
    if own.dataset is not None or own.forgetting_dataset is not None:
        other = load_splits(DataArguments(dataset=own.forgetting_dataset), config)
        name = "shipped" if own.forgetting_dataset is None else "other"
        images.append(choose_images(name, own.forgetting_dataset or "the shipped images", other, config, False))
    return images


def choose_images(name: str, data: str, splits: Splits, config: MIMConfig, is_own: bool) -> WatchedImages:
    if splits.test is not None:
        most = TEST if splits.data.max_eval_images is None else min(TEST, splits.data.max_eval_images)
        train, test = frozen.subset(splits.train_eval, TRAIN), frozen.subset(splits.test, most)
        return WatchedImages(name, f"{data}, {splits.note}", test[0], (train, test), is_own)
    title = f"{data}, training images ({splits.note})" if is_own else f"{data} ({splits.note})"
    if isinstance(splits.train, MIMDataset):
        whole = splits.train.without_augmentation()
        chosen = torch.utils.data.Subset(whole, draw_subset(len(whole), TEST).tolist())
        return WatchedImages(name, title, chosen, None, is_own)
    batches = [MIMCollator(config)([batch])["pixel_values"] for batch in example_batches(splits)]
    return WatchedImages(name, title, batches, None, is_own)


class ForgettingMonitor(TrainerCallback):
    """Before training and at every check of `TrainingMonitor`: k-NN, linear probe and CKA to the start, logged as
    `forgetting_*`, drawn as `forgetting.png`; and a warning, once, where they have fallen. Training does not notice.

    The start is measured when this is made: before a checkpoint is loaded.

    Args:
        trainer: a `MIMTrainer` of a `MIMForPreTraining` that has the weights of the start.
        images: as of `watched_images`.
        folder, every, warn: as of `TrainingMonitor`.

    Attributes:
        standing: warnings that hold at the last check.
    """

    def __init__(
        self,
        trainer: MIMTrainer,
        images: list[WatchedImages],
        folder: Path,
        every: float,
        warn: Callable[[str], None] = print,
    ):
        self.trainer, self.images, self.folder, self.every, self.warn = trainer, images, folder, every, warn
        self.model = cast(MIMForPreTraining, trainer.bare_model)
        self.warned: set[str] = set()
        self.standing: dict[str, str] = {}
        with without_traces(self.model):
            self.start = [self._measure(watched) for watched in images]
            torch.manual_seed(0)
            twin = on_device(MIMModel(self.model.config, add_pooling_layer=False), self.model.device)
            twins = [watched.measure(twin, bool(trainer.args.bf16)) for watched in images]
        self.untrained = [linear_cka(start.features, twin.features) for start, twin in zip(self.start, twins)]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log({watched.name: start.scores(start) for watched, start in zip(self.images, self.start)})

    def on_step_end(self, args, state, control, **kwargs):
        if not is_due(state, self.every):
            return
        should_log = control.should_log
        with without_traces(self.model):
            now = [self._measure(watched) for watched in self.images]
        scores = [measured.scores(start) for measured, start in zip(now, self.start)]
        self.standing = {}
        for i, watched in enumerate(self.images):
            self._warn_of_accuracy(watched, self.start[i], now[i], state.global_step)
            self._warn_of_unlikeness(watched, scores[i]["cka"], self.untrained[i], state.global_step)
        self._log({watched.name: values for watched, values in zip(self.images, scores)})
        draw_forgetting(curves(state.log_history, self.images), self.folder / "forgetting.png", args.figures)
        control.should_log = should_log

    def summary(self, history: list[dict]) -> dict[str, dict]:
        """{name: {"data", "images", "before": scores, "after": scores, "cka_untrained"}}, for metrics.json.

        Args:
            history: the Trainer's log, of the parts of the run before a resume too.
        """
        summary = {}
        for watched, untrained in zip(self.images, self.untrained):
            points = scores_over_steps(history, watched.name)
            if points:
                ends = [{name: round(value, 4) for name, value in points[i][1].items()} for i in (0, -1)]
                known = {"data": watched.title, "images": len(watched), "before": ends[0], "after": ends[1]}
                summary[watched.name] = {**known, "cka_untrained": round(untrained, 4)}
        return summary

    def _measure(self, watched: WatchedImages) -> Measurement:
        return watched.measure(self.model.mim, bool(self.trainer.args.bf16))

    def _log(self, scores: dict[str, dict[str, float]]) -> None:
        named = {f"{PREFIX}_{name}_{key}": value for name, values in scores.items() for key, value in values.items()}
        self.trainer.log(named)

    # ---- warnings --------------------------------------------------------------------------------------------------
    def _warn_of_accuracy(self, watched: WatchedImages, start: Measurement, now: Measurement, step: int) -> None:
        for name, right in now.right.items():
            if deviations_fallen(start.right[name], right) > FALLEN:
                before, after = (100 * part.double().mean().item() for part in (start.right[name], right))
                fall = f"{READOUTS[name].title} on {watched.title} has fallen from {before:.1f} to {after:.1f} percent"
                self._warn_once(f"{watched.name} {name}", f"the encoder forgets: at step {step}, {fall}")

    def _warn_of_unlikeness(self, watched: WatchedImages, cka: float, untrained: float, step: int) -> None:
        if watched.is_own and watched.labelled is not None:
            return  # they are meant to change, and accuracies say whether for the better
        if 1 - cka > max(LEAST, UNLIKE * (1 - untrained)):
            state = f"the features on {watched.title} have a CKA of {cka:.2f} to the start"
            self._warn_once(
                f"{watched.name} cka",
                f"the encoder forgets: at step {step}, {state}, where an untrained encoder has {untrained:.2f}",
            )

    def _warn_once(self, sign: str, text: str) -> None:
        others = [remedy for remedy, has_it in REMEDIES.items() if not has_it(self.trainer)]
        if self.trainer.distance is not None:
            others.append("raise model.keep_weight")
        self.standing[sign] = f"{text}. Lower training.base_learning_rate, {', or '.join(others)}; see docs/adapting.md"
        if sign not in self.warned:
            self.warned.add(sign)
            self.warn(f"warning: {self.standing[sign]}")


def deviations_fallen(before: Tensor, after: Tensor) -> float:
    """By how many deviations of chance fewer images are classified right, of those whose classification changed
    (McNemar, 1947); below 0 where there are more.

    Args:
        before, after: whether each image is classified right, bool (images,).
    """
    lost, gained = (before & ~after).sum().item(), (after & ~before).sum().item()
    return (lost - gained) / max(1.0, lost + gained) ** 0.5


def scores_over_steps(history: list[dict], name: str) -> list[tuple[int, dict[str, float]]]:
    """(step, scores) of every check of these images in the Trainer's log."""
    start = f"{PREFIX}_{name}_"
    points = [
        (entry["step"], {k.removeprefix(start): v for k, v in entry.items() if k.startswith(start)})
        for entry in history
    ]
    return [(step, scores) for step, scores in points if scores]


def curves(history: list[dict], images: list[WatchedImages]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{title of the images: {title of the score: [(step, value)]}}."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for watched in images:
        points = scores_over_steps(history, watched.name)
        panels[watched.title] = {
            metric.title: [(step, scores[name]) for step, scores in points if name in scores]
            for name, metric in FORGETTING.items()
        }
    return panels
