"""The error for a name that does not exist: in a file of its own, which needs no torch."""

import difflib


def unknown(kind: str, value: str, choices) -> ValueError:
    """The error for a name that is not among the choices; it names the nearest one and lists them all."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {value!r}{hint} Choices: {', '.join(map(str, choices)) or 'none'}")
