"""Whether the name of a checkpoint is a path at which nothing lies. Needs no torch, and asks nobody."""

import difflib
from pathlib import Path

from hf_mim.training.common.errors import CheckpointError


OUTPUTS = "outputs"  # the folder of all runs, unless people say where to write


def check_path(source: str, local: bool = False) -> None:
    """Refuses at once what cannot be loaded: the Hub would be asked for it for the better part of a minute.

    Args:
        source: a folder, a URL, or an id on the Hub.
        local: only a folder will do.

    Raises:
        CheckpointError: it is written as a path, or its parent folder exists, and there is nothing there.
    """
    path = Path(source).expanduser()
    if "://" in source or path.exists():
        return
    written_as_path = (
        source.startswith((".", "/", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or path.parts[:1] == (OUTPUTS,)
    )
    if written_as_path or local:
        raise missing(source, path)
    if "/" in source and path.parent.is_dir() and not is_cached(source):
        raise missing(source, path, f"; a model of that name on the Hub is hf://{source}")


def missing(source: str, path: Path, hint: str = "") -> CheckpointError:
    """The error for a folder that is not there, with the nearest one that is."""
    parent, reason = path.parent, "there is no such folder"
    if not parent.is_dir():
        reason += f", nor a folder {parent}"
    else:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        if near := difflib.get_close_matches(path.name, names, n=1):
            reason += f"; did you mean {source.rstrip('/').removesuffix(path.name)}{near[0]}?"
    return CheckpointError(f"no checkpoint at {source}: {reason}{hint}", source)


def is_cached(source: str) -> bool:
    """Whether the config of a model on the Hub lies in the cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    except ValueError:  # no id
        return False
