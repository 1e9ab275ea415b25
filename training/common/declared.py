"""What a config declares is bounded before anything is built or looped over: a file of one line can ask for years."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_mim.modeling.options import shorten
from hf_mim.training.common.errors import CheckpointError


FILE = 32 * 2**20  # bytes of a config.json
ITEMS = 2**17  # of a list or a dict, labels among them; ImageNet-22k has 21,841 classes
NUMBER = 2**31
SIZE = 2**20  # of what is allocated
SIDE = 2**14  # pixels of an image
LAYERS = 4096  # where the weights cannot be counted
MASKS = 1024  # of an image
DEEP = 32  # levels of nesting
REPEATED = re.compile(r"(layers?|depths?|blocks|stages)$")
SIZED = re.compile(r"(size|sizes|dim|dims|width|channels|heads|labels|tokens)$|^(num|n)_")


def check_file(path: Path, source: str) -> None:
    """Raises:
    CheckpointError: a config.json is so large that it cannot be one.
    """
    if path.is_file() and path.stat().st_size > FILE:
        raise CheckpointError(f"{path} holds {path.stat().st_size:,} bytes, too many for a config", source)


def check_declared(fields: Mapping[str, Any], source: str, location: str) -> None:
    """Checks the numbers of a config, and those of layers against the weights beside it.

    Raises:
        CheckpointError: there are more, or they are larger, than any model has.
    """
    layers = count_tensors(Path(location))
    for path, value in walk(fields, source):
        key = path[-1] if path else ""
        limit = NUMBER
        if REPEATED.search(key):
            limit = LAYERS if layers is None else layers
        elif key == "masks_per_image":
            limit = MASKS
        elif key == "image_size":
            limit = SIDE
        elif SIZED.search(key):
            limit = SIZE
        if isinstance(value, int) and abs(value) > limit:
            name, there = ".".join(path), f", and its weights are {layers} tensors" if limit == layers else ""
            raise CheckpointError(f"{source} is damaged: its config says {name}={shorten(value)}{there}", source)


def walk(value: Any, source: str, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value of a nested config that holds no others, with the names that lead to it."""
    if not isinstance(value, Mapping | list):
        yield path, value
        return
    if len(value) > ITEMS or depth > DEEP:
        what = f"{len(value):,} entries" if len(value) > ITEMS else f"more than {DEEP} levels"
        raise CheckpointError(f"{source} is damaged: {'.'.join(path[:3]) or 'its config'} holds {what}", source)
    items = value.items() if isinstance(value, Mapping) else ((path[-1] if path else "", entry) for entry in value)
    for name, entry in items:
        below = (*path, str(name)) if isinstance(value, Mapping) else path
        yield from walk(entry, source, below, depth + 1)


def count_tensors(folder: Path) -> int | None:
    """How many tensors the safetensors of a folder hold; None where there are none that can be read."""
    try:
        if (index := folder / "model.safetensors.index.json").is_file():
            return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if (file := folder / "model.safetensors").is_file():
            with safe_open(file, "pt") as opened:
                return len(opened.keys())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        pass  # said when they are loaded
    return None
