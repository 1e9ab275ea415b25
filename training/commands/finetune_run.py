"""A fine-tuning before it begins: what both tasks, classification and segmentation, share."""

import shlex
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from transformers.trainer_utils import SaveStrategy

from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.plots import charts
from hf_mim.training.run import TrainingRun, which_run
from hf_mim.training.trainer.adaptation_arguments import ADAPTATION
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer


@dataclass(kw_only=True)
class FinetuneRun(TrainingRun[FinetuneTrainer]):
    """A fine-tuning that is set up and has written nothing yet.

    Args:
        source: what is fine-tuned: a folder, a URL, or an id on the Hub.
        options: the section `finetune`.
    """

    source: str
    options: FinetuneArguments

    def train(self, trainer: FinetuneTrainer, save: Callable[[], None]) -> None:
        """Trains, saves the recipe before and the curve of the loss after."""
        if trainer.is_world_process_zero():
            self.save_recipe(f"hf-mim finetune {shlex.quote(self.source)}")

        def save_all() -> None:
            save()
            if trainer.is_world_process_zero() and any("loss" in entry for entry in trainer.state.log_history):
                charts.draw_loss(trainer.state.log_history, self.folder / "loss.png", self.arguments.figures)

        super().train(trainer, save_all)

    def save_model(self, trainer: FinetuneTrainer) -> None:
        """As of `TrainingRun`; the averaged weights where there is an average."""
        with trainer.averaged():
            super().save_model(trainer)

    def write_metrics(self, trainer: FinetuneTrainer, seconds: float, results: dict, bad: BadImageReport) -> None:
        """Writes metrics.json: the task's results, and what every run knows of itself. Prints which images were bad."""
        known = {"task": self.options.task, "num_train_images": len(cast(Sized, trainer.train_dataset))}
        known["bad_images"] = asdict(bad)
        if bad.count:
            self.console.log(str(bad))
        self.write_json("metrics.json", results | known | self.metadata(trainer, seconds))


def set_up(source: str, recipe: dict, console: Console | RunConsole | None = None, paper: str = "") -> FinetuneRun:
    """Checks what needs neither model nor data, chooses the output folder and seeds.

    Raises:
        RecipeError: a value is wrong.
        FolderError: the folder holds another run.
    """
    check_sections(recipe)
    options, data = FinetuneArguments(**recipe["finetune"]), DataArguments(**recipe["data"])
    if data.streaming:
        raise RecipeError("fine-tuning needs data with a length: set data.streaming=false", "data.streaming")
    if data.crop_on_device:
        raise RecipeError("fine-tuning crops in the loader: set data.crop_on_device=false", "data.crop_on_device")
    arguments = training_arguments(recipe["training"])
    output_dir = recipe["training"].get("output_dir")
    if arguments.resume and output_dir is None:
        raise which_run("finetune")
    run = FinetuneRun.start(
        recipe,
        arguments,
        output_dir,
        f"finetune-{Path(source).name}",
        console,
        command="finetune",
        data=data,
        paper=paper,
        source=source,
        options=options,
    )
    run.find_checkpoint()
    return run


def check_sections(recipe: dict) -> None:
    """Raises:
    RecipeError: an option of pretraining, which would do nothing here.
    """
    for name in ("keep", "keep_weight"):
        if recipe["model"].get(name) is not None:
            raise RecipeError(f"model.{name} is an option of pretraining: leave it out", f"model.{name}")
    for name in (*ADAPTATION, "freeze_layers"):
        if name in recipe["training"]:
            instead = f"set finetune.{name}" if name in ADAPTATION else "finetune.freeze freezes the whole encoder"
            raise RecipeError(f"training.{name} is an option of pretraining: {instead}", f"training.{name}")


def training_arguments(section: dict, metric: str | None = None) -> MIMTrainingArguments:
    """The section `training`, with an evaluation before every checkpoint and the best checkpoint kept by default.

    Args:
        metric: what says which is the best, in the words of `compute_metrics`; None leaves that to the task, which
            then sets `metric_for_best_model` before it makes its trainer.
    """
    section = {"output_dir": "outputs", "save_strategy": "epoch", "save_total_limit": 2, **section}
    saves = SaveStrategy(section["save_strategy"])
    section.setdefault("eval_strategy", saves.value if saves in (SaveStrategy.EPOCH, SaveStrategy.STEPS) else "epoch")
    if section["eval_strategy"] == "steps":
        section.setdefault("eval_steps", section.get("save_steps", 500))
    section.setdefault("load_best_model_at_end", saves != SaveStrategy.NO and section["eval_strategy"] != "no")
    section.setdefault("per_device_eval_batch_size", section.get("per_device_train_batch_size", 64))
    section.setdefault("greater_is_better", True)
    section.setdefault("metric_for_best_model", metric)
    if section["save_total_limit"] == 1:
        section["save_total_limit"] = 2  # the best and the last, which a stopped run goes on from, may be two
    return MIMTrainingArguments(**section)
