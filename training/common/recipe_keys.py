"""The names and types of a recipe's keys, and whether a value fits. Needs no torch: they are read from the source of
the classes, whose import takes seconds, so that a mistyped key is answered at once."""

import ast
import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import import_module

from hf_mim.modeling.options import Size, is_of, shorten, unknown_choice
from hf_mim.training.common.choices import check_choices
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.sharing import check_secrets
from hf_mim.training.common.source import fields_of_class


# section -> where the classes are whose fields are its keys: module and class, a later one over an earlier
SECTIONS = {
    "model": (("hf_mim.modeling.configuration_mim", "MIMConfig"),),
    "data": (("hf_mim.training.data.arguments", "DataArguments"),),
    "training": (
        ("transformers.training_args", "TrainingArguments"),
        ("hf_mim.training.trainer.arguments", "MIMTrainingArguments"),
    ),
    "finetune": (("hf_mim.training.trainer.finetune_arguments", "FinetuneArguments"),),
}
# Those of commands that have no recipe.
COMMAND_SECTIONS = {
    "probe": (
        ("hf_mim.training.commands.probe_setup", "ProbeArguments"),
        ("hf_mim.training.commands.dense", "DenseArguments"),
    ),
    "analyze": (("hf_mim.analysis.run", "AnalyzeArguments"),),
}
# They follow from the encoder, from this version of hf_mim, and from what a backbone is used for.
NOT_SET_BY_USERS: tuple[str, ...] = ("stage_names", "format_version", "feature_pyramid", "plugins")
NOT_SET_BY_USERS += ("value_range", "nodata", "eval_crop", "display_bands")  # keys of the section `data`
NOT_SET_BY_USERS += ("origin",)
# What annotations may name; a value of a type that is not here (an enumeration of transformers) is checked later.
NAMES = {"Any": typing.Any, "Literal": typing.Literal, "Size": Size, "None": None}
NAMES |= {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict)}
TITLES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "options"}


# Of the section `model`: where the encoder comes from, and what its first layer becomes for other channels.
START_KEYS = {"init_from": str | None, "init_channels": str | None}
KEEP_KEYS = {"keep": str | None, "keep_weight": float | None}  # what is to stay near that start; see `trainer/start.py`
MAX_STEPS = "training.max_steps"  # -1 is that of the epochs
MORE_THAN_ZERO = (
    "training.num_train_epochs",
    "training.per_device_train_batch_size",
    "training.per_device_eval_batch_size",
    "training.gradient_accumulation_steps",
    "training.save_steps",
    "training.eval_steps",
    "training.logging_steps",
    "probe.epochs",
    "probe.batch_size",
    "analyze.images",
)


# ---- names and types -----------------------------------------------------------------------------------------------
@cache
def keys_of(section: str) -> dict[str, typing.Any]:
    """{key: type} of a section; Any stands for a type that is not known without importing something."""
    keys: dict[str, typing.Any] = {}
    for module, name in (SECTIONS | COMMAND_SECTIONS)[section]:
        keys |= read_fields(module, name)
    if section == "model":
        keys = {key: kind for key, kind in keys.items() if key not in NOT_SET_BY_USERS} | START_KEYS | KEEP_KEYS
    return keys


def read_fields(module: str, name: str) -> dict[str, typing.Any]:
    """{field: type} of a dataclass of this project and its bases in it, or of one of transformers.

    Raises:
        LookupError: there is no such class in the module.
    """
    options = fields_of_class(module, name)
    return {key: read_type(option.annotation) for key, option in options.items() if option.annotation is not None}


def read_type(annotation: ast.expr) -> typing.Any:
    try:
        return eval(ast.unparse(annotation), {"__builtins__": {}}, NAMES)  # annotations of this code, nobody's input
    except (NameError, TypeError):
        return typing.Any


def imported_keys_of(section: str) -> dict[str, typing.Any]:
    """As of `keys_of`, with every type as it is: takes seconds."""
    types_of: dict[str, typing.Any] = {}
    for module, name in SECTIONS[section]:
        types_of |= fields_of(getattr(import_module(module), name))
    return {key: types_of[key] if kind is typing.Any else kind for key, kind in keys_of(section).items()}


def fields_of(arguments: type) -> dict[str, typing.Any]:
    """{name: type} of the fields of a dataclass that can be set."""
    return {field.name: field.type for field in dataclasses.fields(arguments) if field.init}


def is_text(kind: typing.Any) -> bool:
    """Whether nothing but text, or null, is of this type."""
    return kind is str or set(typing.get_args(kind)) == {str, types.NoneType}


# ---- values --------------------------------------------------------------------------------------------------------
def describe_type(kind: typing.Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [describe_type(part) for part in typing.get_args(kind)]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if kind is types.NoneType:
        return "null"
    return TITLES.get(list if origin is tuple else origin or kind, "")


def check_value(key: str, value: object, kind: typing.Any) -> None:
    """Checks one value against the type of its field.

    Raises:
        RecipeError: the value is of another type, or not among the choices of an enumeration.
    """
    for part in typing.get_args(kind) or (kind,):
        if isinstance(part, type) and issubclass(part, enum.Enum) and isinstance(value, str):
            choices = [member.value for member in part]
            if value not in choices:
                raise RecipeError(str(unknown_choice(key, value, choices)), key)
            return
    if isinstance(value, int | float) and (key in MORE_THAN_ZERO and not value > 0 or key == MAX_STEPS and value == 0):
        raise RecipeError(f"{key} must be more than 0, not {value}", key)
    if not is_of(value, kind):
        raise RecipeError(f"{key} must be {describe_type(kind)}, not {shorten(value)}", key)


def check_keys(
    recipe: Mapping[str, dict], file: str, sections: Collection[str], lookup: Callable[[str], dict[str, typing.Any]]
) -> None:
    """Checks the names of sections and keys and the types of values. The options of the model's parts are checked by
    `MIMConfig` and `MIMForPreTraining`, which know them.

    Args:
        file: that the recipe is read from, for the message; "" for overrides.
        sections: their names.
        lookup: gives {key: type} of a section.

    Raises:
        RecipeError: the first thing wrong, with the nearest valid name; or a value is a secret.
    """
    place = f" in {file}" if file else ""
    for section, values in recipe.items():
        if section not in sections:
            raise RecipeError(str(unknown_choice(f"section{place}", section, sections)), section)
        if not isinstance(values, dict):
            raise RecipeError(
                f"section {shorten(section)}{place} must hold keys and values, not {shorten(values)}", section
            )
        keys = lookup(section)
        for key, value in values.items():
            if key not in keys:
                hint = str(unknown_choice("key", key, keys)).partition(repr(key))[2]
                raise RecipeError(f"Unknown key {section}.{key}{place}{hint}", f"{section}.{key}")
            check_value(f"{section}.{key}", value, keys[key])
    check_choices(recipe)
    check_secrets(recipe)
