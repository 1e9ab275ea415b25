"""Checks of a run while it trains: pictures, online k-NN, and warnings that name the sign and the remedy."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import TrainerCallback

from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.training.data.base import ImageDataset
from hf_mim.training.data.batches import ImageBatch, MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits
from hf_mim.training.data.splits import draw_labelled, draw_subset
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.feature_statistics import (
    DEAD_SHARE,
    effective_rank,
    loss_of_the_mean,
    teacher_diversity,
)
from hf_mim.training.evaluation.readouts import NearestNeighbours
from hf_mim.training.plots import pictures
from hf_mim.training.trainer.trainer import MIMTrainer


KNN_TRAIN, KNN_TEST = 500, 250  # images of the online k-NN: they are decoded once and kept, as uint8
IMAGES = 64  # images of which the loss of predicting the mean is computed
BATCH = 50
COLLAPSED_RANK = 2.0  # features that vary in fewer directions tell few images apart
COLLAPSED_SPREAD = 1e-3  # of the features around their mean, as a share of its norm
PLATEAU, PATIENCE = 0.97, 0.2  # the loss over that of the mean, from that share of the training on


def is_due(state, every: float) -> bool:
    """Whether a check is due at the end of a step: every so many steps, or shares of the training below 1, and at its
    end."""
    steps = int(every) if every >= 1 else max(1, round(every * state.max_steps))
    return state.global_step % steps == 0 or state.global_step == state.max_steps


@contextmanager
def without_traces(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and without gradients; afterwards modes and random states are as before."""
    training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


class TrainingMonitor(TrainerCallback):
    """Every so often: a picture of reconstructions in `watch/`, online k-NN where there are labels, the effective rank
    of the features, the loss of predicting the mean and the target's own metrics (how its codes are used), logged as
    `watch_*`; and a warning of what is wrong, once.

    Nothing that training depends on changes: neither random states nor epochs nor modes. Between two checks it does not
    touch the device. Of several processes the first checks, with one whole model; the others send what they counted.

    Args:
        trainer: a `MIMTrainer` of a `MIMForPreTraining`.
        splits: what it trains on.
        folder: of the run.
        every: steps, or a share of the training below 1.
        warn: prints a warning.
    """

    def __init__(
        self, trainer: MIMTrainer, splits: Splits, folder: Path, every: float, warn: Callable[[str], None] = print
    ):
        self.trainer, self.splits, self.folder, self.every, self.warn = trainer, splits, folder, every, warn
        self.model = cast(MIMForPreTraining, trainer.bare_model)
        self.warned: set[str] = set()
        self.standing: dict[str, str] = {}  # warnings that hold at the last check
        self.mean_loss: float | None = None
        self.explained: float | None = None  # see `explained_share`: of the steps before the last check
        self.last = 0  # step of the last check
        self.checks = trainer.is_world_process_zero()

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.checks:
            return
        self.last = state.global_step
        config = self.model.config
        self.collate = MIMCollator(config, self.model.mask_grid(*pair(config.image_size)))
        self.batches = list(example_batches(self.splits))
        self.labelled = None
        if self.splits.test is not None:
            self.labelled = [
                fetch(d, n) for d, n in ((self.splits.train_eval, KNN_TRAIN), (self.splits.test, KNN_TEST))
            ]
        with without_traces(self.model):
            self._measure_target(self._inputs())

    def on_step_end(self, args, state, control, **kwargs):
        if not is_due(state, self.every):
            return
        self.model.target.reduce_metrics()
        if self.checks:
            should_log = control.should_log  # logging below clears it, and the loss is still to be logged
            with without_traces(self.model):
                self._check(state)
            control.should_log, self.last = should_log, state.global_step

    def _inputs(self) -> dict[str, Tensor]:
        # A copy of the generators: drawing a mask moves them, and every check is to hide the same patches.
        return {name: value.to(self.model.device) for name, value in self.collate(copy.deepcopy(self.batches)).items()}

    def _check(self, state) -> None:
        inputs, results = self._inputs(), {}
        if self.target_moves:
            self._measure_target(inputs)
        examples = {name: value[: pictures.EXAMPLES] for name, value in inputs.items()}
        shown = self.model.reconstruct(**examples, with_target=True)
        picture = pictures.draw_reconstructions(shown)
        (self.folder / "watch").mkdir(parents=True, exist_ok=True)
        path = self.folder / "watch" / f"step-{state.global_step:06}.png"
        picture.save(path)
        bf16 = bool(self.trainer.args.bf16)
        if self.labelled is None:
            features = frozen.extract_features(self.model.mim, inputs["pixel_values"].split(BATCH), bf16)["mean"]
        else:
            (train, train_labels), (test, labels) = ((self._features(b, bf16), y) for b, y in self.labelled)
            results["watch_knn"] = frozen.readout_accuracy(NearestNeighbours, train, train_labels, test, labels)
            features = test
        rank, spread = effective_rank(features)
        results |= {"watch_effective_rank": rank, "watch_spread": spread}
        if self.mean_loss is not None:
            results["watch_mean_loss"] = self.mean_loss
        results |= {f"watch_{name}": value for name, value in self.model.target.log_metrics().items()}
        self.standing = {}
        logged = [entry for entry in state.log_history if "loss" in entry and entry["step"] > self.last]
        losses = [entry["loss"] - entry.get("keep_loss", 0.0) for entry in logged]
        if losses and self.mean_loss:
            self.explained = results["watch_explained"] = 1 - float(np.mean(losses)) / self.mean_loss
        self._warn_of_codes(results)
        self._warn_of_collapse(state, rank, spread, features.shape[1], losses)
        self.trainer.log(results)
        show_picture(self.trainer, picture, path, state.global_step)

    def _features(self, batches: list[Tensor], bf16: bool) -> Tensor:
        plain = MIMCollator(self.model.config)
        pixels = (plain([batch])["pixel_values"] for batch in batches)
        return frozen.extract_features(self.model.mim, pixels, bf16)["mean"]

    @property
    def target_moves(self) -> bool:
        return bool(self.model.target.moving_state())

    def _measure_target(self, inputs: dict[str, Tensor]) -> None:
        self.mean_loss = loss_of_the_mean(self.model, **inputs)

    def _warn_of_collapse(self, state, rank: float, spread: float, dim: int, losses: list[float]) -> None:
        if rank < COLLAPSED_RANK or spread < COLLAPSED_SPREAD:
            what = f"effective rank {rank:.1f} of {dim}" if spread >= COLLAPSED_SPREAD else "all images have the same"
            remedy = "lower training.base_learning_rate or lengthen training.warmup_steps"
            if self.target_moves:
                remedy += ", or let the target move more slowly (decay in model.target_config)"
            self._warn_once("collapse", f"the features have collapsed at step {state.global_step} ({what}): {remedy}")
        late = state.global_step >= PATIENCE * state.max_steps
        if late and losses and self.mean_loss is not None and np.mean(losses) > PLATEAU * self.mean_loss:
            self._warn_once(
                "plateau",
                f"the loss, {np.mean(losses):.4g} at step {state.global_step}, is no better than always predicting the "
                f"mean ({self.mean_loss:.4g}): nothing is learned of the images yet. Raise training.base_learning_rate "
                "or train longer; if that does not help, lower model.masking_config.ratio and look at the pictures",
            )

    def _warn_of_codes(self, results: dict) -> None:
        dead = results.get("watch_dead_codes", 0)
        codes = self.model.target.outputs["patches"]
        if dead > DEAD_SHARE * codes:
            self._warn_once(
                "codes",
                f"{dead} of {codes} codes are never used: fit a codebook with fewer codes, or on more images, with "
                "hf-mim codebook",
            )

    def _warn_once(self, sign: str, text: str) -> None:
        self.standing[sign] = text
        if sign not in self.warned:
            self.warned.add(sign)
            self.warn(f"warning: {text}")


class TeacherMonitor(TrainerCallback):
    """At the start of a run with a teacher: how different its tokens are within an image (Img2Vec), logged and printed.

    Attributes:
        diversity: as of `teacher_diversity`; None before.
    """

    def __init__(self, trainer: MIMTrainer, splits: Splits, log: Callable[[str], None] = print):
        self.trainer, self.splits, self.log = trainer, splits, log
        self.diversity: list[dict] | None = None
        self.model = cast(MIMForPreTraining, trainer.bare_model)

    def on_train_begin(self, args, state, control, **kwargs):
        batches = list(example_batches(self.splits))
        if not batches:
            return
        pixel_values = MIMCollator(self.model.config)(batches)["pixel_values"].to(self.model.device)
        self.diversity = teacher_diversity(self.model, pixel_values)
        for row in self.diversity:
            rows, cols = row["grid"]
            self.log(
                f"teacher {row['teacher']}, {row['layer']}: token diversity {row['raw']:.3f}, centred "
                f"{row['centred']:.3f}, on {rows}x{cols} tokens of {len(pixel_values)} images ({row['match']})"
            )
        sources = list(dict.fromkeys(row["teacher"] for row in self.diversity))
        for row in self.diversity:
            number = f"{sources.index(row['teacher']) + 1}_" if len(sources) > 1 else ""
            names = {f"teacher_{number}diversity": "raw", f"teacher_{number}diversity_centred": "centred"}
            self.trainer.log({f"{name}_{row['layer']}": row[key] for name, key in names.items()})


# ---- what is measured ----------------------------------------------------------------------------------------------
def example_batches(splits: Splits) -> Iterator[ImageBatch]:
    """Up to `IMAGES` images, whole; those that the picture shows come first."""
    dataset: ImageDataset = splits.train.without_augmentation() if splits.test is None else splits.test
    if isinstance(dataset, StreamedImages):
        yield from itertools.islice(dataset, IMAGES)
    if not isinstance(dataset, MIMDataset):
        return
    shown = pictures.examples(dataset)
    others = [i for i in draw_subset(len(dataset), IMAGES).tolist() if i not in shown]
    for indices in (shown, others[: IMAGES - len(shown)]):
        if indices:
            yield from dataset.__getitems__(indices)


def fetch(dataset: MIMDataset, count: int) -> tuple[list, Tensor]:
    """Batches of at most `count` images, always the same, and their labels (images,)."""
    assert dataset.labels is not None
    indices = draw_labelled(dataset.labels.numpy(), count).tolist()
    batches = [dataset.__getitems__(indices[i : i + BATCH])[0] for i in range(0, len(indices), BATCH)]
    return batches, dataset.true_labels(indices)


def show_picture(trainer: MIMTrainer, picture: Image, path: Path, step: int) -> None:
    """Hands a picture to TensorBoard and Trackio, if the run reports there."""
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "tb_writer", None) is not None:
            callback.tb_writer.add_image("reconstructions", np.asarray(picture), step, dataformats="HWC")
        if getattr(callback, "_trackio", None) is not None:
            callback._trackio.log({"reconstructions": callback._trackio.Image(str(path))}, step=step)
