"""Every key of a recipe and every option of a part, with type, default and meaning."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.common.recipe_keys import COMMAND_SECTIONS, SECTIONS, describe_type, keys_of, read_type
from hf_mim.training.common.source import (
    Option,
    entries_of,
    fields_of_class,
    find_definition,
    keywords_of_part,
    summary,
)


# kind of part -> where the dict is that names its entries
PARTS = {
    "encoder": ("hf_mim.modeling.encoders", "ENCODERS"),
    "masking": ("hf_mim.modeling.masking", "MASK_GENERATORS"),
    "decoder": ("hf_mim.modeling.decoders", "DECODERS"),
    "target": ("hf_mim.modeling.targets", "TARGETS"),
    "pooler": ("hf_mim.modeling.poolers", "POOLERS"),
}
SECTION_SUMMARIES = {
    "model": "the five parts of a model, image size and channels",
    "data": "where images come from and how they become pixels",
    "training": "the fields of the Trainer's TrainingArguments, and this project's own",
    "finetune": "fine-tuning, for hf-mim finetune",
    "probe": "evaluation of a frozen encoder, for hf-mim probe",
    "analyze": "measurements, for hf-mim analyze",
}
# Those keys of the section `model` that are no field of `MIMConfig`.
START_MEANINGS = {
    "init_from": "a checkpoint whose config and weights the model starts from, in place of new ones",
    "init_channels": "what the first layer of `init_from` becomes for other channels: repeat, average or new",
    "keep": "what is to stay near the start in further training: weights or features",
    "keep_weight": "of the distance to the start, beside the loss; by default 0.01 for weights, 1 for features",
}


@dataclass(frozen=True)
class Group:
    """A section of a recipe, or a part with its options.

    Attributes:
        name: `data`, or `target.hog`.
        prefix: what stands before a key on the command line: `data.`, or `model.target_config.`.
        choose: what chooses the part on the command line; "" for a section.
        summary: one line.
        options: by name.
        further: what other options there may be; "" where there are none.
    """

    name: str
    prefix: str
    choose: str
    summary: str
    options: dict[str, Option]
    further: str = ""


def section(name: str) -> Group:
    """A section of a recipe or of a command; its keys are those that a user can set."""
    options: dict[str, Option] = {}
    for place in (SECTIONS | COMMAND_SECTIONS)[name]:
        for key, option in fields_of_class(*place).items():
            known = options.get(key)
            options[key] = replace(option, meaning=option.meaning or (known.meaning if known else ""))
    if name == "model":
        options |= {key: Option(key, None, "None", START_MEANINGS[key], "") for key in START_MEANINGS}
    return Group(name, f"{name}.", "", SECTION_SUMMARIES[name], {key: options[key] for key in keys_of(name)})


def part(kind: str, name: str) -> Group:
    """A part and its options."""
    module, class_name = class_of(kind, name)
    _, definition = find_definition(module, class_name)
    further = "" if kind != "encoder" or name == "vit" else "every field of the wrapped model's own config"
    options = keywords_of_part(module, class_name)
    return Group(
        f"{kind}.{name}", f"model.{kind}_config.", f"model.{kind}={name}", summary(definition), options, further
    )


def names_of(kind: str) -> list[str]:
    """The entries of a kind of part; those of plug-ins where they are loaded."""
    return list(dict.fromkeys([*entries_of(*PARTS[kind]), *loaded(kind)]))


def loaded(kind: str) -> dict[str, Any]:
    module, table = PARTS[kind]
    return getattr(sys.modules[module], table, {}) if module in sys.modules else {}


def class_of(kind: str, name: str) -> tuple[str, str]:
    """The module and the name of the class or function of a part."""
    module, table = PARTS[kind]
    own = entries_of(module, table)
    return (module, own[name]) if name in own else (loaded(kind)[name].__module__, loaded(kind)[name].__name__)


def groups() -> Iterator[Group]:
    """All sections, then all parts."""
    yield from map(section, SECTIONS | COMMAND_SECTIONS)
    for kind in PARTS:
        yield from (part(kind, name) for name in names_of(kind))


def find(word: str) -> list[Group]:
    """What a word names: a section; a kind of part, all of its entries; a part, as `hog`, `target.hog` or `target=hog`;
    or a key, as `crop_scale` or `data.crop_scale`, in each group that has it.

    Raises:
        OptionError: nothing has that name; the nearest one is named.
    """
    word = word.removeprefix("model.").replace("=", ".").replace("_config", "")
    if word in SECTIONS | COMMAND_SECTIONS:
        return [section(word)]
    if word in PARTS:
        return [part(word, name) for name in names_of(word)]
    everything = list(groups())
    named = [group for group in everything if word in (group.name, group.name.partition(".")[2])]
    if named:
        return named
    place, _, key = word.rpartition(".")
    keyed = [
        replace(group, options={key: group.options[key]})
        for group in everything
        if key in group.options and place in ("", group.name, *group.name.split("."))
    ]
    if keyed:
        return keyed
    names = [group.name.partition(".")[2] for group in everything if group.choose]
    choices = dict.fromkeys([*SECTIONS, *COMMAND_SECTIONS, *PARTS, *names])
    raise unknown_choice("section, part or key", word, choices)


def type_title(option: Option) -> str:
    """Such as `text or null`."""
    if option.annotation is None:  # of `START_MEANINGS`, which are no fields of a class
        return describe_type(keys_of("model")[option.name])
    source = ast.unparse(option.annotation)
    # Enumerations of transformers, which are not imported, can be given as text.
    return describe_type(read_type(option.annotation)) or ("text" if "str" in source.split(" | ") else source)


def default_title(option: Option) -> str:
    """The default as a recipe would have it; where it is computed, as the source has it."""
    words = {"None": "null", "True": "true", "False": "false", "": "none: it must be given"}
    return words.get(option.default, option.default.strip("'"))
