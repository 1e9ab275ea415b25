"""Reading files that others wrote: without running what they hold, and without losing a key."""

import argparse
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_mim.modeling.options import shorten, shorten_text

from .unpickling import unpickle


SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".safetensors")
# What official files put their weights under, the first that is there; `teacher` is DINO's, the better one of its two.
CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "teacher", "student")
LARGEST = 2**20  # a side of a tensor without values


class Weights:
    """Tensors under other names, which remembers what each was called and what became of it.

    Args:
        tensors: by the names of the file.
        rename: from such a name to the one to ask for.
    """

    def __init__(self, tensors: dict[str, Tensor], rename=lambda name: name):
        self.tensors = {rename(name): value for name, value in tensors.items()}
        self.sources = {rename(name): name for name in tensors}
        if len(self.tensors) != len(tensors):
            raise ValueError("two keys of the file mean the same weight")
        self.used: list[str] = []
        self.left: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        """The tensor of a name, which counts as used from now on.

        Raises:
            ValueError: there is none.
        """
        if name not in self.tensors:
            raise ValueError(f"the file lacks {name}, which its other keys call for")
        self.used.append(self.sources[name])
        return self.tensors.pop(name)

    def maybe(self, name: str) -> Tensor | None:
        return self.take(name) if name in self.tensors else None

    def count(self, pattern: str) -> int:
        """One more than the largest number that `pattern` catches in a name; 0 where there is none.

        Raises:
            ValueError: it is larger than the number of weights: nothing may be looped over so often.
        """
        numbers = [match[1] for name in self.tensors if (match := re.match(pattern, name))]
        if too_large := [number for number in numbers if len(number) > 9 or int(number) >= len(self.sources)]:
            raise ValueError(f"a name of the file counts to {shorten_text(too_large[0])}, and it holds fewer weights")
        return max((int(number) + 1 for number in numbers), default=0)

    def leave(self, pattern: str, reason: str) -> None:
        """Says why what is left of the names that match the pattern is not used."""
        for name in [name for name in self.tensors if re.match(pattern, name)]:
            self.left[self.sources[name]] = reason
            del self.tensors[name]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict, list[str]]:
    """-> the weights of a file, what else it says about the training (`vars` of an `argparse.Namespace`), and notes.

    Raises:
        ValueError: it is no such file, holds no weights, or another type than tensors and plain values, which is named.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name} is no checkpoint file; the kinds read are {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
            check_sizes(weights)
            return weights, {}, []
        except SafetensorError as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from error
    content, foreign = unpickle(path)
    weights, notes = unwrap(content)
    if foreign:
        notes.append(f"passed over, as types that are not known here: {', '.join(foreign)}")
    arguments = content.get("args") if isinstance(content, dict) else None
    return weights, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}, notes


def unwrap(content) -> tuple[dict[str, Tensor], list[str]]:
    """-> the tensors of a checkpoint by name, without what it wraps them in, and what was passed over.

    Raises:
        ValueError: there are none.
    """
    notes = []
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        entry = next((name for name in CONTAINERS if isinstance(content.get(name), dict)), None)
        if entry is None:
            raise ValueError("the file holds no weights: no tensors, and none of the entries " + ", ".join(CONTAINERS))
        others = sorted(str(name) for name in content if name != entry)
        notes.append(f"weights from the entry {entry!r}" + (f"; not read: {', '.join(others)}" if others else ""))
        content = content[entry]
    if not isinstance(content, dict):
        raise ValueError(f"the file holds no weights but a {type(content).__name__}")
    plain = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
    if plain:
        notes.append(f"no tensors: {', '.join(plain)}")
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    check_sizes(weights)
    while all(name.startswith("module.") for name in weights):  # DistributedDataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, notes


def check_sizes(weights: dict[str, Tensor]) -> None:
    """Raises:
    ValueError: a tensor claims to be larger than what the file holds of it: one value can be repeated without end.
    """
    for name, value in weights.items():
        stored = value.untyped_storage().nbytes() // value.element_size() if value.layout == torch.strided else 0
        if value.numel() > stored or (not value.numel() and max(value.shape) > LARGEST):
            shape = shorten(tuple(value.shape))
            raise ValueError(f"{shorten_text(name)} is {shape} and holds {stored:,} values: the file is damaged")


def size_of(text: str | None) -> int | list[int] | None:
    """`224` or `192x320` as numbers.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"a size is written as 224 or, height first, as 192x320, not {text!r}")
    return int(sides[0]) if len(sides) == 1 else [int(side) for side in sides]
