"""Writes a part, its test and a recipe from the templates beside this file."""

import re
from pathlib import Path

from hf_mim.modeling.options import OptionError, unknown_choice
from hf_mim.reference.options import PARTS
from hf_mim.training import recipe as recipes
from hf_mim.training.common.errors import FolderError
from hf_mim.training.common.source import entries_of


TEMPLATES = Path(__file__).parent
FIELDS = {"target": "target", "mask": "masking", "pooler": "pooler", "decoder": "decoder"}  # kind -> field of a config


def write_part(kind: str, name: str, folder: Path, force: bool = False) -> list[Path]:
    """Writes `<name>_<kind>.py`, `test_<name>_<kind>.py` and `<name>_<kind>.yaml`.

    Args:
        kind: target, mask, pooler or decoder.
        name: of the new part, as recipes will have it.
        folder: to write into; it is made.
        force: replace files that exist.

    Returns:
        the files.

    Raises:
        OptionError: an unknown kind, or a name that is taken or no name.
        FolderError: a file exists already.
    """
    if kind not in FIELDS:
        raise unknown_choice("kind of part", kind, FIELDS)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise OptionError(f"a part's name has small letters, digits and _, such as edge: not {name!r}", "name", name)
    if name in entries_of(*PARTS[FIELDS[kind]]):
        raise OptionError(f"{kind} {name!r} is one of hf_mim: choose another name", "name", name)
    module = f"{name}_{kind}"
    files = {folder / f"{module}.py": "", folder / f"test_{module}.py": "test_", folder / f"{module}.yaml": ""}
    if existing := [path for path in files if path.exists() and not force]:
        raise FolderError(f"{existing[0]} exists already: choose another name, or --force", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    words = {"NAME": name, "MODULE": module, "CLASS": "".join(word.title() for word in module.split("_"))}
    for path, prefix in files.items():
        if path.suffix == ".py":
            text = (TEMPLATES / f"{prefix}{kind}.txt").read_text(encoding="utf-8")
            path.write_text(re.sub("NAME|MODULE|CLASS", lambda match: words[match[0]], text), encoding="utf-8")
    write_recipe(list(files)[2], FIELDS[kind], name, module)
    return list(files)


def write_recipe(path: Path, field: str, name: str, module: str) -> None:
    """The recipe `quick` with the new part in place of its own, and the plug-in that has it."""
    recipe = recipes.read("quick")
    recipe["model"] = {**recipe["model"], field: name}
    recipe["model"].pop(f"{field}_config", None)
    comment = f"The recipe quick with the {field} {name}.\n\nCommand: hf-mim pretrain {path.name}"
    recipes.save({recipes.PLUGINS: [module], **recipe}, path, comment)
