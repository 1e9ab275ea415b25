"""Whose data a command works on: the user's choice, else that of the run whose model it is given."""

from collections.abc import Sequence
from pathlib import Path

from hf_mim.training import recipe as recipes
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import FolderError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.urls import is_url


SHIPPED = "Fashion-MNIST subset (shipped)"  # the data where nobody names any
SCENES = "scenes composed from the shipped images"  # and those with masks
# How a run changes its training images, and how many it scored: that is the business of each command.
NOT_TAKEN = ("crop_scale", "horizontal_flip", "color_jitter", "crop_on_device", "shuffle_buffer", "max_eval_images")
IDENTITY = ("dataset", "subset", "split")  # two sections that differ in one of them are of different data


def own_data(sources: Sequence[str], chosen: dict, console: RunConsole, shipped: str = SHIPPED) -> dict:
    """The section `data` of the runs that models come from, without augmentation; prints which data that is.

    Args:
        sources: models: folders, URLs or ids on the Hub.
        chosen: what the user says of the section `data`. With a data set of its own it stands alone: columns, splits
            and limits of other data do not apply.
        shipped: what to call the data where nobody says any.

    Returns:
        {} where the user chooses, or no source is the folder of a run.

    Raises:
        RecipeError: the runs had different data.
    """
    if "dataset" in chosen:
        console.log(f"data: {chosen['dataset'] or shipped}")
        return {}
    sections = {}
    for source in sources:
        if (recipe := recipe_of(source)) is not None:
            sections[f"{source.rstrip('/')}/recipe.yaml"] = recipes.read(recipe).get("data") or {}
    remedy = "data.dataset=... chooses other data"
    if not sections:
        console.log(f"data: {shipped}; {remedy}")
        return {}
    (first, section), *others = sections.items()
    for name, other in others:
        if any(section.get(key) != other.get(key) for key in IDENTITY):
            names = [entry.get("dataset") or shipped for entry in (section, other)]
            message = f"the data of {first} ({names[0]}) and of {name} ({names[1]}) differ: choose by data.dataset=..."
            raise RecipeError(message, "data.dataset")
    console.log(f"data: {section.get('dataset') or shipped}, as in {first}; {remedy}")
    return {key: value for key, value in section.items() if key not in NOT_TAKEN}


def chosen_data(overrides: Sequence[str]) -> dict:
    """What overrides say of the section `data`."""
    return recipes.parse_overrides(overrides).get("data", {})


def recipe_of(source: str) -> str | None:
    """Where the recipe of the run lies that wrote a model, or one of its checkpoints; None of other models."""
    if is_url(source):
        try:
            return str(recipes.find(source))
        except RecipeError:
            return None
    folder = Path(source).expanduser()
    places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((str(place / "recipe.yaml") for place in places if (place / "recipe.yaml").is_file()), None)


def check_outside(output: str, dataset: str | None) -> None:
    """Raises:
    FolderError: the output folder lies in the folder of the data, which would grow by the run's pictures.
    """
    if dataset is None:
        return
    if is_url(dataset) or is_url(output):
        inside = f"{output.rstrip('/')}/".startswith(f"{dataset.rstrip('/')}/")
    else:
        folder = Path(dataset).expanduser()
        inside = folder.is_dir() and Path(output).resolve().is_relative_to(folder.resolve())
    if inside:
        message = f"the output folder {output} lies in the data folder {dataset}: choose another output_dir"
        raise FolderError(message, output)


def dataset_title(data: DataArguments, shipped: str = SHIPPED) -> str:
    """What a data set is called."""
    return data.dataset or shipped
