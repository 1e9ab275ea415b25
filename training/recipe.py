"""Recipes: one YAML file per method, plus `section.key=value` overrides, checked before anything runs."""

import copy
import dataclasses
import enum
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from hf_mim.modeling.options import unknown_choice


RECIPES = Path(__file__).parent / "recipes"
PARTS = ("encoder", "masking", "decoder", "target", "pooler")
# What a recipe's header may say, each as `# Key: text`, continued on indented lines.
HEADER_KEYS = ("Paper", "Command", "Cost", "Result")


def _model_keys() -> dict:
    from hf_mim.modeling.configuration_base import MIMConfigBase

    own = {name: kind for name, kind in MIMConfigBase.__annotations__.items() if not name.startswith("_")}
    # These follow from the encoder, from this version of hf_mim, and from what a backbone is used for.
    for name in ("stage_names", "format_version", "feature_pyramid"):
        own.pop(name)
    return {**own, "init_from": str | None}


def keys_of(arguments: type) -> dict:
    """{name: type} of the fields of a dataclass that can be set."""
    return {field.name: field.type for field in dataclasses.fields(arguments) if field.init}


def _data_keys() -> dict:
    from hf_mim.training.data.arguments import DataArguments

    return keys_of(DataArguments)


def _training_keys() -> dict:
    from hf_mim.training.trainer.trainer import MIMTrainingArguments

    return keys_of(MIMTrainingArguments)


def _finetune_keys() -> dict:
    from hf_mim.training.trainer.finetune_arguments import FinetuneArguments

    return keys_of(FinetuneArguments)


# section -> a function that returns {key: type}; a function, because keys need torch and most of transformers, and a
# mistyped recipe is to be found before that is imported
SECTIONS = {"model": _model_keys, "data": _data_keys, "training": _training_keys, "finetune": _finetune_keys}
# Sections that not every recipe has: the command of that name is what runs a recipe that has it.
COMMANDS = ("finetune",)


# ---- YAML whose scalars mean what they look like -------------------------------------------------------------------
class Loader(yaml.SafeLoader):
    """SafeLoader of YAML 1.1, but `1e-4` is a number, and `no`, `on` and `1:30` are text."""


class Dumper(yaml.SafeDumper):
    """The inverse of `Loader`."""


SCALARS = {
    "tag:yaml.org,2002:null": (r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^[-+]?[0-9]+$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$",
        list("-+0123456789."),
    ),
}
for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in SCALARS.items():
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)
# The parent's constructor reads a leading zero as octal.
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str, where: str):
    """The value of a YAML text.

    Raises:
        ValueError: not YAML; the message names `where` and the line.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None


# ---- types ---------------------------------------------------------------------------------------------------------
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "options"}


def _describe(kind) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [_describe(part) for part in typing.get_args(kind)]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if kind is types.NoneType:
        return "null"
    return NAMES.get(list if origin is tuple else origin or kind, "")


def _fits(value, kind) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if kind is types.NoneType:
        return value is None
    if origin is typing.Literal:
        return value in inner
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):  # YAML has only lists
        return isinstance(value, list) and (not inner or all(_fits(item, inner[0]) for item in value))
    kind = origin or kind
    return isinstance(value, kind) if isinstance(kind, type) else True


def check_value(key: str, value, kind) -> None:
    """Checks one value against the type of its field.

    Raises:
        ValueError: the value is of another type, or not among the choices of an enumeration.
    """
    for part in typing.get_args(kind) or (kind,):
        if isinstance(part, type) and issubclass(part, enum.Enum) and isinstance(value, str):
            choices = [member.value for member in part]
            if value not in choices:
                raise unknown_choice(f"{key}", value, choices)
            return
    if not _fits(value, kind):
        raise ValueError(f"{key} must be {_describe(kind)}, not {value!r}")


def check_sections(recipe: dict, where: str, sections) -> None:
    """Raises:
    ValueError: an unknown section, or one that holds no keys.
    """
    for section, values in recipe.items():
        if section not in sections:
            raise unknown_choice(f"section in {where}", section, sections)
        if not isinstance(values, dict):
            raise ValueError(f"{where}: section {section!r} must hold keys and values, not {values!r}")


def check(recipe: dict, where: str, sections: dict | None = None) -> None:
    """Checks the names of sections and keys and the types of values. The options of the model's parts are checked by
    `MIMConfig` and `MIMForPreTraining`, which know them.

    Args:
        sections: {section: a function that returns {key: type}}; None is those of a recipe.

    Raises:
        ValueError: the first thing wrong, with the nearest valid name.
    """
    sections = SECTIONS if sections is None else sections
    check_sections(recipe, where, sections)
    for section, values in recipe.items():
        keys = sections[section]()
        for key, value in values.items():
            if key not in keys:
                raise unknown_choice(f"key in section {section!r} of {where}", key, keys)
            check_value(f"{section}.{key}", value, keys[key])


# ---- loading, overriding, saving -----------------------------------------------------------------------------------
def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package: name -> file; `quick`, which is the default, comes first."""
    paths = sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != "quick", path.stem))
    return {path.stem: path for path in paths}


def find(name: str) -> Path:
    """The file of a recipe: a name in `recipes/`, a YAML file, or the folder of a run; of a URL, a copy in the cache.

    Raises:
        ValueError, OSError: there is no such recipe or file, or it cannot be read.
    """
    if name in recipe_files():
        return recipe_files()[name]
    if "://" in name:
        from hf_mim.training.data.fetching import fetch_recipe

        return fetch_recipe(name)
    path = Path(name).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise ValueError(f"no recipe at {name}")
    raise unknown_choice("recipe", name, recipe_files())


def read(name: str) -> dict:
    """A recipe as {section: {key: value}}, unchecked."""
    path = find(name)
    recipe = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: a recipe must hold sections ({', '.join(SECTIONS)})")
    return {section: {} if values is None else values for section, values in recipe.items()}


def parse_overrides(overrides: list[str]) -> dict:
    """`["model.masking_config.ratio=0.6"]` as `{"model": {"masking_config": {"ratio": 0.6}}}`.

    Raises:
        ValueError: an override without section, key or `=`, or two that contradict each other.
    """
    tree = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise ValueError(f"an override looks like section.key=value, not {override!r}")
        inner = tree
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{override!r}: {name} already has the value {inner!r}")
        inner[names[-1]] = parse_yaml(text, override)
    return tree


def expand_task(overrides: Sequence[str], section: str) -> list[str]:
    """`task=dense`, which is short for `probe.task=dense`, in full."""
    return [f"{section}.{word}" if word.startswith("task=") else word for word in overrides]


def read_sections(overrides: list[str], **classes: type) -> tuple:
    """The overrides of a command that has no recipe, as one dataclass for each section: `data=DataArguments`.

    Raises:
        ValueError: an unknown section or key, or a value of another type or out of range.
    """
    found = parse_overrides(overrides)
    check(found, "the overrides", {name: lambda kind=kind: keys_of(kind) for name, kind in classes.items()})
    return tuple(kind(**found.get(name, {})) for name, kind in classes.items())


def merge(base: dict, changes: dict) -> dict:
    """`base` with `changes`, dicts within dicts merged; neither is modified."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def command_of(recipe: dict) -> str:
    """The command that runs a recipe."""
    return next((command for command in COMMANDS if command in recipe), "pretrain")


def check_command(name: str, recipe: dict, command: str) -> None:
    """Raises:
    ValueError: the recipe is one of another command.
    """
    own = command_of(recipe)
    if own != command:
        model = "" if own == "pretrain" else " MODEL"
        others = [other for other in recipe_files() if command_of(read(other)) == command]
        raise ValueError(
            f"{name} is no recipe of {command}: hf-mim {own}{model} {name} runs it. Those of {command}: "
            f"{', '.join(others)}"
        )


def read_words(name: str, overrides: list[str], command: str | None = None) -> tuple[dict, dict]:
    """A recipe and its overrides, both as {section: {key: value}}; without torch. `resolve` checks keys and values.

    Raises:
        ValueError: an unknown recipe or section, one of another command, or an override that is none.
    """
    recipe, changes = read(name), parse_overrides(list(overrides))
    if command is not None:
        check_command(name, recipe, command)
        for other in set(COMMANDS) & set(changes) - {command}:
            raise ValueError(f"hf-mim {command} has no section {other!r}: hf-mim {other} MODEL has")
    check_sections(recipe, find(name).name, SECTIONS)
    check_sections(changes, "the overrides", SECTIONS)
    return recipe, changes


def resolve(name: str, overrides: list[str] = (), command: str | None = None) -> dict:
    """A recipe with overrides applied, checked: {"model": {...}, "data": {...}, "training": {...}}, and the section of
    the command that runs it if that is not `pretrain`.

    Where an override names another encoder, mask generator, decoder, target or pooler, the recipe's options of that
    part no longer apply and are dropped; so are mean and std with another number of channels. With `model.init_from`
    the architecture comes from the checkpoint, so that of a recipe without `init_from` is dropped too: only what was
    asked for beside `init_from` changes it.

    Args:
        command: the one that is about to run it; None does not ask.

    Raises:
        ValueError: an unknown recipe, section or key (the nearest valid one is named), a value of another type, or a
            recipe or a section of another command.
    """
    from hf_mim.modeling.configuration_mim import MIMConfig

    recipe, changes = read_words(name, overrides, command)
    check(recipe, find(name).name)
    check(changes, "the overrides")
    model, new = recipe.setdefault("model", {}), changes.get("model", {})
    if new.get("init_from") and not model.get("init_from"):
        model.clear()
    for part in PARTS:
        if part in new and new[part] != model.get(part, MIMConfig.__dataclass_fields__[part].default):
            model.pop(f"{part}_config", None)
    if "num_channels" in new:  # mean and std are per channel
        for name in ("image_mean", "image_std"):
            model.pop(name, None)
    merged = merge(recipe, changes)
    return {name: merged.get(name, {}) for name in SECTIONS if name not in COMMANDS or name in merged}


def save(recipe: dict, path: Path, comment: str) -> None:
    """Writes a resolved recipe, with `comment` (one or more lines) as its header."""
    header = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    body = yaml.dump(recipe, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    path.write_text(header + body, encoding="utf-8")


def read_header(path: Path) -> dict[str, str]:
    """The header comment of a recipe: {"title", "paper", "command", "cost", "result"}, as far as it says so."""
    header, current = {"title": ""}, "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        key, colon, rest = text.partition(":")
        if colon and key in HEADER_KEYS:
            current, text = key.lower(), rest.strip()
        elif not text:
            current = ""  # a blank line ends an entry; remarks may follow
        if current:
            header[current] = f"{header.get(current, '')} {text}".strip()
    return header


def list_recipes() -> list[dict[str, str]]:
    """What every shipped recipe says of itself: its name, the command that runs it, and `read_header`."""
    return [
        {"name": name, "runs": command_of(read(name)), **read_header(path)} for name, path in recipe_files().items()
    ]
