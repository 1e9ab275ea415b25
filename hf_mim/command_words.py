"""What is wrong with the words of a command line, found before anything heavy is imported."""

import typer

from hf_mim.command_table import HELP, LIGHT, SECTIONS


def split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """`[RECIPE] SECTION.KEY=VALUE ...` -> the recipe, or None, and the overrides."""
    from hf_mim.training.recipe import is_override

    words = list(words or [])
    return (words[0], words[1:]) if words and not is_override(words[0]) else (None, words)


def part_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Names and overrides, in any order. -> the names, and the overrides."""
    from hf_mim.training.recipe import is_override

    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def take_plugins(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes `--plugin MODULE`, which may stand anywhere, out of a command line. -> both parts."""
    plugins: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--plugin":
            plugins += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (plugins if word.startswith("--plugin=") else others).append(word)
    return plugins, others


def is_heavy(arguments: list[str]) -> bool:
    """Whether a command runs that needs torch."""
    return bool(arguments) and arguments[0] in SECTIONS and arguments[0] not in LIGHT and not {*arguments} & {*HELP}


def check_command(arguments: list[str]) -> None:
    """Raises:
    OptionError: there is no such command.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in SECTIONS:
        from hf_mim.modeling.options import unknown_choice

        raise unknown_choice("command", arguments[0], SECTIONS)


def check_words(name: str, *words: str) -> None:
    """Finds what is wrong with recipe and overrides before torch is imported, which takes seconds.

    Raises:
        RecipeError: an unknown recipe, section or key, or a value of another type.
    """
    words = tuple(word for word in words if word != "--dry-run")
    if not SECTIONS.get(name) or any(word.startswith("-") for word in words):
        return
    from hf_mim.training import recipe as recipes

    if name in ("pretrain", "finetune"):
        recipe, overrides = split(list(words[1:] if name == "finetune" else words))
        if recipe is not None or name == "pretrain":
            recipes.read_words(recipe or "quick", recipes.expand_task(overrides, name), name)
            return
    else:
        overrides = [word for word in words if recipes.is_override(word)]
    recipes.check_names(overrides, name, SECTIONS[name])


# What each form of `demo` uses, beside the model.
DEMO_OPTIONS = {"page": ("overrides", "runtime", "force"), "space": ("force",), "app": ("overrides", "port")}


def check_demo(**given: object) -> None:
    """
    Args:
        given: what was said by the arguments and options of `demo`, by name.

    Raises:
        BadParameter: one has no effect on what is shown.
    """
    shown = {"page": "demo --page", "space": "demo --space", "app": "the app of demo"}
    form = next((name for name in ("page", "space") if given[name]), "app")
    for name, value in given.items():
        if value and name not in (form, *DEMO_OPTIONS[form]):
            option = "data settings" if name == "overrides" else f"--{name}"
            users = " and ".join(shown[other] for other, names in DEMO_OPTIONS.items() if name in names)
            remedy = f"it is for {users}" if users else "choose one of the two"
            raise typer.BadParameter(f"{shown[form]} does not use {option}: {remedy}")
