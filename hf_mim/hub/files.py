"""The files of a checkpoint's folder that are published, and what of them may be."""

import json
from pathlib import Path

from hf_mim.modeling.loading import INDEX, WHOLE, shard_names
from hf_mim.modeling.options import shorten
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import checkpoint_errors
from hf_mim.training.common.checkpoint_path import check_path
from hf_mim.training.common.errors import CheckpointError
from hf_mim.training.common.sharing import file_inside, shareable
from hf_mim.training.recipe import PLUGINS


RESULTS = ("metrics.json", "probe.json")
PICTURES = {
    "reconstructions.png": "test images: original, masked, prediction, prediction with the visible patches",
    "attention.png": "where the poolers look: test images, and the weights of their patches",
    "loss.png": "the training loss",
    "forgetting.png": "what became of the encoder that training started from",
    "probe.png": "accuracy behind each pooler",
    "segmentation.png": "test images, their masks and the predicted ones",
    "confusion.png": "which classes are taken for which",
}


def read_json(path: Path | None) -> dict:
    """The object in a file; {} without the file, or where it holds something else.

    Raises:
        CheckpointError: it is not valid JSON.
    """
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON", str(path)) from None
    return content if isinstance(content, dict) else {}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> dict:
    """{section: {key: value}} of recipe.yaml without what must not leave this machine, {} without one."""
    path = file_inside(folder, "recipe.yaml")
    recipe = recipes.parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path else None
    kept = {name: values for name, values in (recipe or {}).items() if isinstance(values, dict) or name == PLUGINS}
    return shareable(kept)


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors of a checkpoint that loading reads: {name: file}.

    Raises:
        CheckpointError: there are none, or the index names something that is no file of this folder.
        FolderError: one is a symbolic link out of the folder.
    """
    check_path(str(folder), local=True)
    if file_inside(folder, "config.json") is None:
        raise CheckpointError(f"no checkpoint at {folder}: there is no config.json", str(folder))
    whole, index = file_inside(folder, WHOLE), file_inside(folder, INDEX)
    if whole is not None:
        return {WHOLE: whole}
    if index is None:
        pickles = next((path.name for path in folder.glob("*.bin")), None)
        reason = f"{pickles} is a pickle, which is neither read nor published" if pickles else "there are no weights"
        raise CheckpointError(f"no {WHOLE} in {folder}: {reason}", str(folder))
    weights = {INDEX: index}
    with checkpoint_errors(str(folder)):
        names = shard_names(str(index))
    for name in names:
        path = file_inside(folder, name) if Path(name).name == name and name.endswith(".safetensors") else None
        if path is None:
            raise CheckpointError(
                f"{index} names {shorten(name)}, which is no safetensors file of this folder", str(folder)
            )
        weights[name] = path
    return weights
