"""Advice about a run as a whole: whether it is long enough to learn, and whether it has learned anything."""

import math
import traceback
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from hf_mim.training.common.errors import EvaluationError
from hf_mim.training.evaluation.twin import compare
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.throughput import seconds_per_step
from hf_mim.training.trainer.trainer import MIMTrainer


# Optimizer steps below which a run says that it is too short: of pretraining, and of fine-tuning.
SHORT, SHORT_FINETUNING = 100, 20


@dataclass
class Length:
    """How long a run is.

    Args:
        images: to train on; None of a stream.
        epochs: passes over them; None of a stream.
    """

    steps: int
    batch: int
    images: int | None = None
    epochs: float | None = None

    def __str__(self) -> str:
        line = f"{self.steps:,} step{'s' * (self.steps != 1)} of {self.batch:,} images"
        if self.images is None or self.epochs is None:
            return line
        epochs = f"{self.epochs:,.0f}" if self.epochs >= 100 else f"{self.epochs:.3g}"
        return f"{line}, {epochs} epoch{'s' * (epochs != '1')} of {self.images:,} images"


def length_of(dataset, arguments: MIMTrainingArguments, drop_last: bool | None = None) -> Length:
    """The steps and epochs that the Trainer will make of a data set; `drop_last` in place of that of the arguments."""
    batch = arguments.total_batch_size
    if not isinstance(dataset, Sized):
        return Length(arguments.max_steps, batch)
    drop_last = arguments.dataloader_drop_last if drop_last is None else drop_last
    batches = len(dataset) / (arguments.train_batch_size * arguments.world_size)
    batches = math.floor(batches) if drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    if arguments.max_steps > 0:
        return Length(arguments.max_steps, batch, len(dataset), arguments.max_steps / per_epoch)
    steps = math.ceil(arguments.num_train_epochs * per_epoch)
    return Length(steps, batch, len(dataset), float(arguments.num_train_epochs))


def warning_of_length(length: Length, least: int = SHORT) -> str | None:
    """None where there are `least` steps."""
    if length.steps >= least:
        return None
    steps = f"{length.steps} steps are" if length.steps != 1 else "1 step is"
    return (
        f"warning: {steps} too few to learn from: this run shows that everything works, and "
        "its results say nothing of the method. Raise training.num_train_epochs (or training.max_steps), or lower "
        "training.per_device_train_batch_size for more steps"
    )


def warning_of_twin(results: dict, length: Length) -> str | None:
    """What to say of an encoder that no readout finds better than the same one untrained; None otherwise.

    Args:
        results: of the evaluation, as in metrics.json.
    """
    trained, untrained = results["trained"], results["untrained"]
    images = results["evaluation"]["test_images"]
    verdicts = {name: compare(trained[name], untrained[name], images) for name in trained}
    if "better" in verdicts.values():
        return None
    worse = "worse" in verdicts.values()
    name = next(name for name, verdict in verdicts.items() if not worse or verdict == "worse")
    what = "is worse than" if worse else "cannot be told from"
    cause = f"{length.steps} steps are few: train longer" if length.steps < 10 * SHORT else "train longer"
    return (
        f"warning: the encoder {what} the untrained one ({name}: {trained[name]:.1f} against {untrained[name]:.1f} "
        f"percent of {images:,} images): {cause}, look at reconstructions.png, and see hf-mim doctor"
    )


def describe_duration(trainer: MIMTrainer, length: Length, size: tuple[int, int]) -> str | None:
    """About how long a run will take, without the loading of its data; None where that cannot be told.

    Args:
        size: (height, width) of its images.
    """
    config = trainer.bare_model.config
    channels = getattr(config, "backbone_config", config).num_channels
    seconds = seconds_per_step(trainer, (channels, *size))
    if seconds is None:
        return None
    return f"{describe_seconds(seconds * length.steps)} of computing, {seconds:.2g} s a step"


def failed_evaluation(error: Exception, folder: Path, location: str, again: str) -> tuple[dict, EvaluationError]:
    """Called for an evaluation that failed: what metrics.json says of it, and what to raise when that is written. The
    traceback goes into `evaluation_error.txt`.

    Args:
        folder: of the run; people find it at `location`.
        again: the command that evaluates again.
    """
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    text = "".join(traceback.format_exception(error))
    (folder / "evaluation_error.txt").write_text(text, encoding="utf-8")
    message = f"the model is trained and saved, but its evaluation failed ({reason}); evaluate again with: {again}"
    return {"evaluation_error": reason}, EvaluationError(message, location)


def describe_seconds(seconds: float) -> str:
    """Roughly: `about 40 seconds`, `about 12 minutes`, `about 5.5 hours`."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        count = seconds / length
        if count >= 1.5:
            return f"about {count:,.0f} {unit}" if count >= 10 else f"about {count:.2g} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 1.5 else "about a second"
