"""What the source of a class says of its options: names, types, defaults and meanings. It is read, never imported:
torch takes seconds, and a reader who asks what an option means should not wait for it."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, resolve_name
from inspect import cleandoc
from pathlib import Path


Definition = ast.ClassDef | ast.FunctionDef
HEADINGS = ("Args:", "Options:", "Parameters:")
# `name: text`, `name, name: text`, or, as transformers has it, `name (type, *optional*, defaults to 3):`.
ENTRY = re.compile(r"(?P<names>`?\w+`?(?:, `?\w+`?)*) ?(?:\((?P<type>.*?)\))?(?:, \*optional.*?)?:(?: (?P<text>.*))?$")


@dataclass(frozen=True)
class Option:
    """A field of a dataclass, or a keyword of a part.

    Attributes:
        annotation: its type, as it stands in the source.
        default: as it stands in the source; "" where there is none.
        meaning: one line; "" where the docstring is silent.
        module: that defines it.
    """

    name: str
    annotation: ast.expr | None
    default: str
    meaning: str
    module: str


# ---- finding -------------------------------------------------------------------------------------------------------
def source_of(module: str) -> Path:
    """The file of a module, which is not imported; the packages that it is in are, unless it is at the top of one."""
    package, _, name = module.rpartition(".")
    spec = find_spec(package or name)
    if spec is None or (package and spec.submodule_search_locations is None):
        raise ModuleNotFoundError(f"no package {package or name}")
    if not package and not spec.submodule_search_locations:
        return Path(str(spec.origin))
    return Path((spec.submodule_search_locations or [""])[0]) / f"{name if package else '__init__'}.py"


@cache
def parse_module(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


@cache
def origins(module: str) -> dict[str, str]:
    """{name: the module that defines it} of the classes and functions of a module, and of what it imports by name from
    its own project."""
    names, project = {}, module.partition(".")[0]
    for node in parse_module(module).body:
        if isinstance(node, Definition):
            names[node.name] = module
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            if origin.partition(".")[0] in (project, "hf_mim"):
                names |= {alias.asname or alias.name: origin for alias in node.names}
    return names


@cache
def find_definition(module: str, name: str) -> tuple[str, Definition]:
    """The module that defines a class or function, and its syntax tree.

    Raises:
        LookupError: the module neither defines nor imports it.
    """
    for node in parse_module(module).body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
    origin = origins(module).get(name, module)
    if origin == module:
        raise LookupError(f"no class {name} in {module}")
    return find_definition(origin, name)


def bases_of(module: str, definition: Definition) -> Iterator[tuple[str, Definition]]:
    """The base classes that are of this project too, the first first."""
    if isinstance(definition, ast.ClassDef):
        for base in definition.bases:
            name = base.value.id if isinstance(base, ast.Subscript) and isinstance(base.value, ast.Name) else base
            name = name.id if isinstance(name, ast.Name) else name
            if isinstance(name, str) and name in origins(module):
                yield find_definition(module, name)


# ---- docstrings ----------------------------------------------------------------------------------------------------
def summary(definition: Definition) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((ast.get_docstring(definition) or "").partition("\n\n")[0].split())


def meanings_in(docstring: str) -> dict[str, str]:
    """{option: meaning} of the section Args, Options or Parameters of a docstring. What is said of several options at
    once is the meaning of each."""
    lines = cleandoc(docstring).splitlines()
    starts = [index for index, line in enumerate(lines) if line.strip() in HEADINGS]
    meanings: dict[str, str] = {}
    for start in starts:
        names: list[str] = []
        indent = None
        for line in lines[start + 1 :]:
            depth = len(line) - len(line.lstrip())
            if line.strip() and not depth:
                break
            indent = depth if indent is None and line.strip() else indent
            match = ENTRY.match(line.strip()) if depth == indent else None
            if match is not None:
                names = [name.strip("` ") for name in match["names"].split(",")]
                meanings |= dict.fromkeys(names, match["text"] or "")
            elif depth == indent:
                names = []  # a heading between the options, such as transformers has
            elif names and line.strip():
                meanings |= {name: f"{meanings[name]} {line.strip()}".strip() for name in names}
    return meanings


def meanings_of(module: str, definition: Definition) -> dict[str, str]:
    """As of `meanings_in`, with what the base classes say of the others."""
    inherited: dict[str, str] = {}
    for base in reversed(list(bases_of(module, definition))):
        inherited |= meanings_of(*base)
    return inherited | meanings_in(ast.get_docstring(definition) or "")


# ---- options -------------------------------------------------------------------------------------------------------
@cache
def fields_of_class(module: str, name: str) -> dict[str, Option]:
    """{field: option} of a dataclass and of its bases in the same project.

    Raises:
        LookupError: there is no such class in the module.
    """
    module, definition = find_definition(module, name)
    fields: dict[str, Option] = {}
    for base_module, base in reversed(list(bases_of(module, definition))):
        fields |= fields_of_class(base_module, base.name)
    meanings = meanings_of(module, definition)
    fields = {key: option_like(option, meanings) for key, option in fields.items()}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            key = node.target.id
            default, help = read_default(node.value)
            fields[key] = Option(key, node.annotation, default, meanings.get(key) or help, module)
    return fields


def option_like(option: Option, meanings: dict[str, str]) -> Option:
    """An inherited option, with the meaning that the heir's docstring gives it."""
    meaning = meanings.get(option.name) or option.meaning
    return Option(option.name, option.annotation, option.default, meaning, option.module)


def read_default(value: ast.expr | None) -> tuple[str, str]:
    """The default of a dataclass field as it stands in the source, and its `help`."""
    if value is None:
        return "", ""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"):
        return ast.unparse(value), ""
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    default = keywords.get("default", keywords.get("default_factory"))
    text = ast.unparse(default) if default is not None else ""
    metadata, help = keywords.get("metadata"), ""
    for key, entry in zip(metadata.keys, metadata.values) if isinstance(metadata, ast.Dict) else ():
        if isinstance(key, ast.Constant) and key.value == "help" and isinstance(entry, ast.Constant):
            help = str(entry.value)
    return text if "default" in keywords else f"{text}()", " ".join(help.split())


@cache
def keywords_of_part(module: str, name: str) -> dict[str, Option]:
    """{option: option} of a part: the keyword-only arguments of a function, or of the `__init__` of a class or of the
    first of its bases that has one."""
    module, definition = find_definition(module, name)
    meanings = meanings_of(module, definition)
    function, place = definition, module
    if isinstance(definition, ast.ClassDef):
        function, place = find_init(module, definition)
    options: dict[str, Option] = {}
    if isinstance(function, ast.FunctionDef):
        for keyword, default in zip(function.args.kwonlyargs, function.args.kw_defaults):
            name, text = keyword.arg, ast.unparse(default) if default else ""
            options[name] = Option(name, keyword.annotation, text, meanings.get(name, ""), place)
    return options


def find_init(module: str, definition: ast.ClassDef) -> tuple[Definition, str]:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node, module
    for base_module, base in bases_of(module, definition):
        if isinstance(base, ast.ClassDef):
            return find_init(base_module, base)
    return definition, module


@cache
def entries_of(module: str, name: str) -> dict[str, str]:
    """{name in a config: class or function} of a dict such as `TARGETS`, where it is written or added to."""
    entries: dict[str, str] = {}
    for node in parse_module(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        is_named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if is_named and isinstance(value := getattr(node, "value", None), ast.Dict):
            pairs = zip(value.keys, value.values)
            entries |= {key.value: entry.id for key, entry in pairs if key is not None}  # type: ignore[attr-defined]
    return entries
