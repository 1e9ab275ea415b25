"""What the shell completes: recipes, and the keys of overrides. Needs no torch, and prints nothing."""

from hf_mim.reference import options
from hf_mim.training.recipe import recipe_files


def complete_words(incomplete: str) -> list[str]:
    """Recipes, `section.` and `section.key=`; after `model.target=` the targets, and so on."""
    place, equals, value = incomplete.partition("=")
    kind = place.removeprefix("model.")
    if equals:
        names = options.names_of(kind) if kind in options.PARTS else []
        return [f"{place}={name}" for name in names if name.startswith(value)]
    section = place.partition(".")[0]
    if "." not in place:
        sections = [f"{name}." for name in options.SECTIONS | options.COMMAND_SECTIONS]
        return [word for word in (*recipe_files(), *sections) if word.startswith(place)]
    if section not in options.SECTIONS | options.COMMAND_SECTIONS:
        return []
    keys = [f"{section}.{key}=" for key in options.section(section).options]
    return [key for key in keys if key.startswith(place)]


def complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipe_files() if name.startswith(incomplete)]


def complete_option(incomplete: str) -> list[str]:
    """For `hf-mim options`."""
    parts = [f"{kind}.{name}" for kind in options.PARTS for name in options.names_of(kind)]
    words = [*options.SECTIONS, *options.COMMAND_SECTIONS, *options.PARTS, *parts]
    return [word for word in words if word.startswith(incomplete)]
