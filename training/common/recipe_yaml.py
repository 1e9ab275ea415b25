"""YAML whose scalars mean what they look like."""

import re
from typing import Any

import yaml

from hf_mim.training.common.errors import RecipeError


LENGTH, VALUES, LEVELS = 200_000, 20_000, 40  # at most: of the text, its values with aliases written out, its nesting


class Loader(yaml.SafeLoader):
    """SafeLoader of YAML 1.1, but `1e-4` is a number, and `no`, `on` and `1:30` are text. What would take years to
    look through is an error: aliases of aliases, deep nesting."""

    def __init__(self, stream):
        super().__init__(stream)
        self.level, self.counts = 0, {}  # counts: of the values below each node

    def compose_node(self, parent, index):
        self.level += 1
        if self.level > LEVELS:
            raise yaml.YAMLError(f"more than {LEVELS} levels")
        node = super().compose_node(parent, index)
        self.level -= 1
        if id(node) not in self.counts:
            children = () if isinstance(node, yaml.ScalarNode) else node.value
            nodes = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
            self.counts[id(node)] = 1 + sum(self.counts.get(id(part), VALUES) for part in nodes)
        if self.counts[id(node)] > VALUES:
            raise yaml.YAMLError(f"more than {VALUES:,} values, or an alias of itself")
        return node


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


def represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    """In double quotes, with escapes, where there are other line breaks than YAML 1.1 keeps in other quotes."""
    style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, represent_text)


def dump_yaml(value: Any) -> str:
    """A YAML text that `parse_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: not YAML; the message names `source` and the line.
    """
    if len(text) > LENGTH:
        raise RecipeError(f"{source[:200]}: {len(text):,} characters are no recipe")
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{source[:200]}{line}: not valid YAML ({reason})") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of tags such as !!timestamp and !!int
        raise RecipeError(f"{source[:200]}: not valid YAML ({str(error)[:200]})") from None


def parse_text(text: str, kind: Any) -> str | None:
    """The value of an override whose field is text: the text as it is, or what stands between quotes; `null` is null
    where the field can be."""
    if text[:1] in ("'", '"') and len(text) > 1 and text.endswith(text[0]):
        return str(parse_yaml(text, text))
    return None if kind is not str and text in ("", "null", "Null", "NULL") else text
