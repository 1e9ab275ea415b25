"""What a config declares is bounded before anything is built or looped over: a file of one line can ask for years.
Needs neither torch nor transformers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .options import shorten


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


def check_declared(fields: Mapping[str, Any], tensors: int | None = None) -> None:
    """Checks the numbers of a config.

    Args:
        tensors: how many weights there are, which are more than layers; None where that is not known.

    Raises:
        ValueError: there are more, or they are larger, than any model has.
    """
    for path, value in walk(fields):
        key = path[-1] if path else ""
        limit = NUMBER
        if REPEATED.search(key):
            limit = LAYERS if tensors is None else tensors
        elif key == "masks_per_image":
            limit = MASKS
        elif key == "image_size":
            limit = SIDE
        elif SIZED.search(key):
            limit = SIZE
        if isinstance(value, int) and abs(value) > limit:
            name, there = ".".join(path), f", and the weights are {tensors} tensors" if limit == tensors else ""
            raise ValueError(f"the config says {name}={shorten(value)}{there}")


def walk(value: Any, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value of a nested config that holds no others, with the names that lead to it."""
    if not isinstance(value, Mapping | list):
        yield path, value
        return
    if len(value) > ITEMS or depth > DEEP:
        what = f"{len(value):,} entries" if len(value) > ITEMS else f"more than {DEEP} levels"
        raise ValueError(f"{'.'.join(path[:3]) or 'the config'} holds {what}, which no config does")
    items = value.items() if isinstance(value, Mapping) else ((path[-1] if path else "", entry) for entry in value)
    for name, entry in items:
        below = (*path, str(name)) if isinstance(value, Mapping) else path
        yield from walk(entry, below, depth + 1)
