"""Sizes, and the names and options of parts: what is checked before anything is built. Needs neither torch nor
transformers, and imports nothing of this project."""

import difflib
import inspect
import reprlib
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


Size = int | list[int] | tuple[int, int]
Grid = tuple[int, int]  # rows and columns, or height and width
# Options of encoders that say how one learns from hidden tokens, and not what it computes: with the encoder of somebody
# else they stay those of the recipe.
LEARNING_OPTIONS = (
    *("mask_style", "mask_stage", "mask_after_downsampling", "mask_token_std", "mask_scale_init_value", "pixel_fill"),
    "drop_path_rate",
)


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have.

    Attributes:
        option: its name, or what kind of name was looked for.
        value: what was given.
    """

    def __init__(self, message: str, option: str = "", value: object = None):
        super().__init__(message)
        self.option, self.value = option, value


class _Shortened(reprlib.Repr):
    """Of text and numbers the beginning and the end, of collections the first items."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring = self.maxother = 120
        self.maxlong = 40

    def repr_int(self, number: int, level: int) -> str:
        bits = number.bit_length()
        return super().repr_int(number, level) if bits < 10_000 else f"a number of {bits:,} bits"


def shorten(value: object) -> str:
    """`repr` for messages: whatever a file holds, it stays a line that can be read."""
    text = _Shortened().repr(value)
    return text if len(text) <= 400 else f"{text[:300]} ..."


def shorten_text(text: str) -> str:
    """Text of a file or of another library, as it is, as part of a line."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:280]} ..."


def unknown_choice(kind: str, value: str, choices: Iterable[object]) -> OptionError:
    """The error for a name that is not among the choices; it names the nearest one and lists them all."""
    names = [str(choice) for choice in choices]
    name = value[:100] if isinstance(value, str) else shorten(value)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return OptionError(f"unknown {kind} {shorten(value)}{hint} Choices: {', '.join(names) or 'none'}", name, value)


def pair(size: Size) -> Grid:
    """An int or a (height, width) pair as a (height, width) pair of positive ints."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise OptionError(f"a size must be a positive int or a (height, width) pair of them, got {shorten(size)}")
    return sides[0], sides[1]


def size_title(size: Size) -> str:
    """Such as 224x224, height first."""
    height, width = pair(size)
    return f"{height}x{width}"


def at_least(least: int, section: str = "", /, **options: int) -> None:
    """Raises:
    OptionError: an option, given by its name, has a value below `least`. `section` is put before the name.
    """
    for name, value in options.items():
        if value < least:
            raise OptionError(f"{section}{name} must be at least {least}, got {value}", name, value)


def options_of(entry) -> dict[str, object]:
    """The options of a part with their defaults: the keyword-only arguments of its class or function."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def is_of(value: object, annotation: Any) -> bool:
    """Whether a value is of an annotated type, and the items of a list of theirs. A list passes for a tuple and the
    reverse, an int for a float; annotations that are no types pass everything."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(is_of(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    kind = origin or annotation
    if not isinstance(kind, type) or kind in (Any, inspect.Parameter.empty):
        return True
    accepted = {float: (int, float), tuple: (list, tuple), list: (list, tuple)}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return False
    return not inner or not isinstance(value, list | tuple) or all(is_of(item, inner[0]) for item in value)


def check_part(kind: str, entries: dict, name: str, options: dict, plugins: Iterable[str] | None = None) -> None:
    """Checks a part's name, and the names and types of its options.

    Args:
        plugins: the modules of other projects that a checkpoint needs, for the message.

    Raises:
        ValueError: the name or an option is unknown (the message lists the choices), or a value is of a wrong type.
    """
    if name not in entries:
        if plugins:
            message = f"{kind} {shorten(name)} comes from the plug-in {' or '.join(plugins)}, which is not loaded"
            raise OptionError(f"{message}: import it first, or add --plugin {' --plugin '.join(plugins)}", kind, name)
        raise unknown_choice(kind, name, entries)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(entries[name]).parameters.values())
    choices = options_of(entries[name])
    annotations = {p.name: p.annotation for p in inspect.signature(entries[name]).parameters.values()}
    for option, value in options.items():
        if option not in choices and not takes_any:
            raise unknown_choice(f"option of {kind} {shorten(name)}", option, choices)
        if option in choices and not is_of(value, annotations[option]):
            expected = inspect.formatannotation(annotations[option])
            raise OptionError(
                f"option {option!r} of {kind} {name!r} must be {expected}, got {shorten(value)}", option, value
            )
