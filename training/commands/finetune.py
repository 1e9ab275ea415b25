"""The command `finetune`: from an encoder and labelled images to a model that does a task."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hf_mim.training import recipe as recipes
from hf_mim.training.commands.classification import finetune_classification
from hf_mim.training.commands.finetune_run import set_up
from hf_mim.training.commands.segmentation import finetune_segmentation
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.data.urls import is_url
from hf_mim.training.own_data import SCENES, SHIPPED, own_data
from hf_mim.training.run import which_run
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments


DEFAULTS = {"classification": "finetune_small", "segmentation": "segmentation_small"}  # recipes, by task


def finetune(
    source: str,
    name: str | None = None,
    overrides: Sequence[str] = (),
    console: Console | RunConsole | None = None,
    preview: bool = False,
) -> Path:
    """Fine-tunes a model, evaluates it, and writes everything into one folder.

    Args:
        source: a checkpoint of this project or a vision model of transformers, a folder, a URL or an id on the Hub; or
            the folder or URL of a run to resume, with `training.resume=true`.
        name: of a recipe, or a file or run folder with one; None is the small one of the task, or that of the run to
            resume.
        overrides: `section.key=value`; `task=segmentation` is short for `finetune.task=segmentation`.
        console: where to print; None is the terminal.
        preview: print what would run, how long and with how much memory, and write nothing.

    Returns:
        the folder.

    Raises:
        ValueError, OSError: something in the recipe, the model, the data or the folder is wrong; nothing was written.
        KeyboardInterrupt: after Ctrl-C, and a checkpoint.
        SystemExit: with code 143, after SIGTERM and a checkpoint.
    """
    quiet = os.environ.get("RANK", "0") != "0"  # of another process than the first
    source, recipe, paper = read_recipe(source, name, list(overrides), RunConsole(console, quiet))
    if FinetuneArguments(**recipe["finetune"]).task == "segmentation":
        return finetune_segmentation(source, recipe, console, paper, preview)
    return finetune_classification(set_up(source, recipe, console, paper), preview)


def read_recipe(source: str, name: str | None, overrides: list[str], console: RunConsole) -> tuple[str, dict, str]:
    """-> what to fine-tune, the resolved recipe, which names it as `model.init_from`, and the recipe's paper. Its data,
    where nobody chooses any, are those of the run that `source` is of.

    Raises:
        RecipeError: as of `recipe.resolve`, or there is no run to resume.
    """
    overrides = recipes.expand_task(overrides, "finetune")
    changes = recipes.parse_overrides(overrides)
    resume, task = changes.get("training", {}).get("resume", False), changes.get("finetune", {}).get("task")
    continues = resume and name is None
    if continues:
        if not is_url(source) and not (Path(source).expanduser() / "recipe.yaml").is_file():
            raise RecipeError(f"{source} holds no recipe.yaml: {which_run('finetune')}", "training.resume")
        name = source
    name = name or DEFAULTS.get(str(task), DEFAULTS["classification"])
    recipe = recipes.resolve(name, overrides, "finetune")
    if continues:
        folder, source = source, recipe["model"].get("init_from") or source
        recipe["training"].setdefault("output_dir", folder)
    else:
        shipped = SCENES if recipe["finetune"].get("task") == "segmentation" else SHIPPED
        recipe["data"] = own_data([source], recipe["data"], console, shipped) | recipe["data"]
    recipe["model"] = {"init_from": source, **{k: v for k, v in recipe["model"].items() if k != "init_from"}}
    return source, recipe, recipes.read_header(recipes.find(name)).get("paper", "")
