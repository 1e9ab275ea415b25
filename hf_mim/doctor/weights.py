"""What `doctor` sees in the files of a checkpoint: values that are not finite, empty position tables, no training."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file


STATES = {"ok": "green", "fault": "bold red", "unclear": "yellow", "note": "yellow", "skipped": "dim"}
ABSOLUTE = re.compile(r"(learned_positions\.table|pos(ition)?_?embed(ding)?s?(\.weight)?)$")
RELATIVE = re.compile(r"relative(\.\d+)?\.table$|relative_position_bias_table$")


@dataclass
class Check:
    """name: what was looked at. state: one of `STATES`. seen: in words and numbers. remedy: what to do, of a fault, or
    where it is unclear whether there is one."""

    name: str
    state: str
    seen: str
    remedy: str = ""


@dataclass
class Looked:
    """What one pass over the weights has found.

    not_finite: name -> how many values. tables, relative: name -> (shape, "zero", "constant" or "fine") of positions.
    norms: of every 1-dimensional weight, whether it is all ones (or zeros, as some ConvNets begin).
    """

    tensors: int
    not_finite: dict[str, int]
    tables: dict[str, tuple[tuple[int, ...], str]]
    relative: dict[str, tuple[tuple[int, ...], str]]
    norms: list[bool]
    has_decoder: bool


def read_weights(source: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint's files, one at a time: a model's class may leave some out, or fill them in.

    Raises:
        ValueError: there are no files of weights.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = file_of(source, index)
        if path is not None:
            names = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
            break
    else:
        names = ["model.safetensors"] if file_of(source, "model.safetensors") else ["pytorch_model.bin"]
    for name in names:
        path = file_of(source, name)
        if path is None:
            raise ValueError(f"{source} has no file {name}")
        if name.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True).items()


def file_of(source: str, name: str) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def look_at_weights(weights: Iterator[tuple[str, Tensor]]) -> Looked:
    looked = Looked(0, {}, {}, {}, [], False)
    for name, value in weights:
        looked.tensors += 1
        looked.has_decoder |= name.startswith("decoder.")
        if not value.is_floating_point():
            continue
        if bad := int((~torch.isfinite(value)).sum()):
            looked.not_finite[name] = bad
        for pattern, found in ((ABSOLUTE, looked.tables), (RELATIVE, looked.relative)):
            if value.ndim > 1 and pattern.search(name):
                found[name] = (tuple(value.shape), state_of_table(value))
        if value.ndim == 1 and name.endswith("weight"):
            looked.norms.append(bool((value == 1).all() or (value == 0).all()))
    return looked


def state_of_table(table: Tensor) -> str:
    """Of positions (..., positions, dim): zero, constant (the class token's row aside) or fine."""
    rows = table.flatten(0, -2)
    if not rows.any():
        return "zero"
    return "constant" if len(rows) > 2 and bool((rows[1:] == rows[1]).all()) else "fine"


def check_finite(looked: Looked) -> Check:
    if not looked.not_finite:
        return Check("weights", "ok", f"all values of {looked.tensors} tensors are finite")
    name, count = next(iter(looked.not_finite.items()))
    return Check(
        "weights",
        "fault",
        f"{sum(looked.not_finite.values()):,} values in {len(looked.not_finite)} of {looked.tensors} tensors are not "
        f"finite, the first {count:,} in {name}",
        "the run has diverged: go back to an earlier checkpoint, and train on with a lower learning rate, a longer "
        "warm-up or without half precision",
    )


def check_positions(looked: Looked) -> list[Check]:
    bad = {name: found for name, found in looked.tables.items() if found[1] != "fine"}
    trained = bool(looked.norms) and not all(looked.norms)
    if trained and looked.relative and all(state == "zero" for _, state in looked.relative.values()):
        bad |= looked.relative
    if not bad:
        count = len(looked.tables) + len(looked.relative)
        stored = (
            f"{count} stored table{'s' * (count > 1)}, none of them empty"
            if count
            else "no stored tables: computed, or none"
        )
        return [Check("positions", "ok", stored)]
    words = {"zero": "all zero", "constant": "the same for every position"}
    seen = "; ".join(f"{name} {shape} is {words[state]}" for name, (shape, state) in list(bad.items())[:4])
    more = f"; and {len(bad) - 4} more" if len(bad) > 4 else ""
    remedy = (
        "the model cannot tell where a patch lies. Fill the tables before training and train again, or load weights "
        "that have them. A model built from its config may start so: transformers' ViTMAEForPreTraining does, in "
        "encoder and decoder, and keeps them frozen; give it sin-cos tables first"
    )
    return [Check("positions", "fault", seen + more, remedy)]
