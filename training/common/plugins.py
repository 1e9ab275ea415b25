"""Parts of one's own: modules that, when they are imported, add classes to `TARGETS`, `POOLERS` and the other dicts.

A recipe names them (`plugins: [my_module]`), or the command line (`--plugin my_module`), or an installed package by an
entry point of the group `hf_mim.plugins`. A checkpoint names them too, and is never a reason to import anything: it may
come from a stranger.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from hf_mim.training.common.errors import UserError


GROUP = "hf_mim.plugins"
LOADED: dict[str, str] = {}  # plug-ins by name as they were asked for, and the module of each


class PluginError(UserError):
    """A plug-in that is not there or cannot be imported.

    Attributes:
        plugin: its name.
    """

    def __init__(self, message: str, plugin: str = ""):
        super().__init__(message)
        self.plugin = plugin


def load_plugins(names: Iterable[str], source: str = "--plugin", folder: Path | None = None) -> None:
    """Imports plug-ins: modules that are installed or lie in the working directory, or files that end in `.py`.

    Args:
        source: where they are named, for the message.
        folder: that of the recipe which names them. They may lie there too, but in the folder of a checkpoint.

    Raises:
        PluginError: there is none of that name, or its import fails.
    """
    folders = [os.getcwd()]
    if folder is not None and not (folder / "config.json").exists():
        folders = list(dict.fromkeys([*folders, str(folder.resolve())]))
    for name in names:
        if name not in LOADED:
            LOADED[name] = register(partial(import_plugin, name, source, folders))


def import_plugin(name: str, source: str, folders: Sequence[str]) -> str:
    """-> the name of the module."""
    file = Path(name).expanduser()
    try:
        if file.suffix == ".py":
            return import_file(file)
        # At the end: what lies there hides nothing that is installed.
        sys.path.extend(folder for folder in folders if folder not in sys.path)
        return import_module(name).__name__
    except PluginError:
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError) and error.filename == str(file)
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            missing = True
        if missing:
            message = f"plug-in {name}, named by {source}, is neither installed nor in {' or '.join(folders)}"
            raise PluginError(f"{message}: install it, or run the command where it lies", name) from error
        reason = (str(error).splitlines() or [""])[0]
        message = f"plug-in {name}, named by {source}, cannot be imported: {type(error).__name__}: {reason}"
        raise PluginError(message, name) from error


def import_file(file: Path) -> str:
    """-> the name of the module. One that is imported already is not imported again.

    Raises:
        PluginError: there is another module of that name, which it would replace or could be taken for.
    """
    if not file.is_file():
        raise FileNotFoundError(2, "no such plug-in", str(file))
    name, place = file.stem, file.resolve()
    if (other := place_of(name)) is not None and other != place:
        message = f"plug-in {file} has the name of another module, {name} ({other}): rename it"
        raise PluginError(message, str(file))
    if name in sys.modules:
        return name
    spec = spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name


def place_of(name: str) -> Path | None:
    """The file of a module that is loaded or could be; that of a built-in one is no file but called so."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        return Path(getattr(loaded, "__file__", None) or name).resolve()
    spec = None if "." in name else find_spec(name)
    return None if spec is None else Path(spec.origin or name).resolve()


def register(load: Callable[[], str]) -> str:
    """Calls `load`, which imports a module and gives its name. It is remembered which parts came by it, so that a
    checkpoint can name it."""
    from hf_mim.modeling import parts

    before = {id(entry) for table in parts.TABLES.values() for entry in table.values()}
    module = load()
    for table in parts.TABLES.values():
        parts.REGISTERED_BY.update({entry: module for entry in table.values() if id(entry) not in before})
    return module


def load_installed() -> None:
    """Imports the plug-ins that installed packages announce. One that fails is left out, with a warning."""
    for entry in entry_points(group=GROUP):
        try:
            register(partial(load_entry, entry))
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            warnings.warn(f"the plug-in {entry.name} ({entry.value}) is left out: {reason}", stacklevel=2)


def load_entry(entry: EntryPoint) -> str:
    entry.load()
    return entry.module


def plugins_of(recipe: dict, source: str) -> list[str]:
    """Takes the plug-ins out of a recipe.

    Raises:
        PluginError: they are no list of names.
    """
    names = recipe.pop("plugins", None) or []
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise PluginError(f"plugins in {source} must be a list of modules, such as [my_module], not {names!r}")
    return list(names)
