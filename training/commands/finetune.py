"""The command `finetune`: from an encoder and labelled images to a model that does a task."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from hf_mim.training import recipe as recipes
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.urls import is_url
from hf_mim.training.plots import pictures
from hf_mim.training.run import choose_folder, facts, find_checkpoint, remote_of, save_recipe, train_and_save
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer
from hf_mim.training.trainer.remote import RemoteRun
from hf_mim.training.trainer.trainer import MIMTrainingArguments


DEFAULTS = {"classification": "finetune_small", "segmentation": "segmentation_small"}  # recipes, by task


@dataclass
class FinetuneRun:
    """A run that is set up and has written nothing yet.

    Args:
        source: what is fine-tuned: a folder, a URL, or an id on the Hub.
        recipe: the resolved recipe, as it is saved.
        checkpoint: to resume from.
        remote: what copies it to a URL.
    """

    source: str
    recipe: dict
    options: FinetuneArguments
    data: DataArguments
    arguments: MIMTrainingArguments
    folder: Path
    console: Console
    paper: str = ""
    checkpoint: Path | None = None
    remote: RemoteRun | None = None


def finetune(source: str, name: str | None = None, overrides: list[str] = (), console: Console | None = None) -> Path:
    """Fine-tunes a model, evaluates it, and writes everything into one folder.

    Args:
        source: a checkpoint of this project or a vision model of transformers, a folder, a URL or an id on the Hub; or
            the folder or URL of a run to resume, with `training.resume=true`.
        name: of a recipe, or a file or run folder with one; None is the small one of the task, or that of the run to
            resume.
        overrides: `section.key=value`; `task=segmentation` is short for `finetune.task=segmentation`.
        console: where to print; None is the terminal.

    Returns:
        the folder.

    Raises:
        ValueError, OSError: something in the recipe, the model, the data or the folder is wrong; nothing was written.
        KeyboardInterrupt: after Ctrl-C, and a checkpoint.
        SystemExit: with code 143, after SIGTERM and a checkpoint.
    """
    source, recipe, paper = read_recipe(source, name, list(overrides))
    console = console or Console()
    if FinetuneArguments(**recipe["finetune"]).task == "segmentation":
        from hf_mim.training.commands.segmentation import finetune_segmentation

        return finetune_segmentation(source, recipe, console)
    from hf_mim.training.commands.classification import finetune_classification

    return finetune_classification(set_up(source, recipe, console, paper))


# ---- before --------------------------------------------------------------------------------------------------------
def read_recipe(source: str, name: str | None, overrides: list[str]) -> tuple[str, dict, str]:
    """-> what to fine-tune, the resolved recipe, which names it as `model.init_from`, and the recipe's paper.

    Raises:
        ValueError: as of `recipe.resolve`, or there is no run to resume.
    """
    overrides = [f"finetune.{word}" if word.startswith("task=") else word for word in overrides]
    changes = recipes.parse_overrides(overrides)
    resume, task = changes.get("training", {}).get("resume", False), changes.get("finetune", {}).get("task")
    folder = Path(source).expanduser()
    continues = resume and name is None
    if continues:
        if not is_url(source) and not (folder / "recipe.yaml").is_file():
            raise ValueError(
                f"which run to resume? {source} holds no recipe.yaml: hf-mim finetune FOLDER training.resume=true"
            )
        name = source
    name = name or DEFAULTS.get(task, DEFAULTS["classification"])
    recipe = recipes.resolve(name, overrides, "finetune")
    if continues:
        place, source = source, recipe["model"].get("init_from") or source
        recipe["training"].setdefault("output_dir", place)
    recipe["model"] = {"init_from": source, **{k: v for k, v in recipe["model"].items() if k != "init_from"}}
    return source, recipe, recipes.read_header(recipes.find(name)).get("paper", "")


def set_up(source: str, recipe: dict, console: Console, paper: str = "") -> FinetuneRun:
    """Checks what needs neither model nor data, chooses the output folder and seeds.

    Raises:
        ValueError: a value is wrong, or the folder holds another run.
    """
    options, data = FinetuneArguments(**recipe["finetune"]), DataArguments(**recipe["data"])
    if data.streaming:
        raise ValueError("fine-tuning needs data with a length: leave out data.streaming")
    if data.crop_on_device:
        raise ValueError("fine-tuning crops in the loader: leave out data.crop_on_device")
    arguments = training_arguments(recipe["training"])
    wanted = recipe["training"].get("output_dir")
    if arguments.resume and wanted is None:
        raise ValueError("which run to resume? hf-mim finetune FOLDER training.resume=true")
    for key in ("output_dir", "resume"):  # another run of the saved recipe must not write here
        recipe["training"].pop(key, None)
    if arguments.process_index > 0:
        console = Console(quiet=True)
    remote = remote_of(wanted, console)
    folder = choose_folder(wanted, f"finetune-{Path(source).name}", arguments.resume, remote)
    arguments.output_dir = str(folder)
    console.print(f"output folder: {remote.url if remote else folder}", highlight=False, soft_wrap=True)
    checkpoint = find_checkpoint(console, recipe, folder, remote) if arguments.resume else None
    set_seed(arguments.seed)
    return FinetuneRun(source, recipe, options, data, arguments, folder, console, paper, checkpoint, remote)


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


# ---- training ------------------------------------------------------------------------------------------------------
def train(run: FinetuneRun, trainer: FinetuneTrainer, save: Callable[[], None]) -> None:
    """Trains and draws the loss; calls `save` as `train_and_save` does."""
    if trainer.is_world_process_zero():
        save_recipe(run, f"hf-mim finetune {shlex.quote(run.source)}")

    def save_all():
        save()
        if trainer.is_world_process_zero() and any("loss" in entry for entry in trainer.state.log_history):
            pictures.draw_loss(trainer.state.log_history, run.folder / "loss.png")

    train_and_save(run, trainer, save_all, "finetune")


# ---- after ---------------------------------------------------------------------------------------------------------
def write_results(run: FinetuneRun, trainer: FinetuneTrainer, seconds: float, results: dict) -> None:
    """Writes metrics.json: the task's results, and what every run knows of itself."""
    known = {"task": run.options.task, "num_train_images": len(trainer.train_dataset)}
    results = results | known | facts(run, trainer, seconds)
    (run.folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
