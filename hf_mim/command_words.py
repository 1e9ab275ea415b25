"""What is wrong with the words of a command line, found before anything heavy is imported."""

from itertools import takewhile
from typing import Annotated

import typer

from hf_mim.command_table import HELP, LIGHT, SECTIONS


# Commands whose first word is a checkpoint; those that take a folder alone, and several of them.
ONE = ("finetune", "reconstruct", "probe", "embed", "teacher", "codebook", "demo", "doctor", "export", "convert")
FOLDER = ("push", "card")
SEVERAL = ("analyze", "distill")
MEASUREMENTS = ("hf_mim.analysis.__init__", "MEASUREMENTS")


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


def check_words(name: str, *words: str, plugins: bool = False) -> None:
    """Finds what is wrong with checkpoint, recipe and overrides before torch is imported, which takes seconds.

    Args:
        plugins: whether the command line names any.

    Raises:
        CheckpointError: there is no folder where one must be.
        RecipeError: an unknown recipe, section or key, or a value of another type or not among its choices.
    """
    check_places(name, *words)
    words = tuple(word for word in words if word != "--dry-run")
    if not SECTIONS.get(name) or any(word.startswith("-") for word in words):
        return
    from hf_mim.training import recipe as recipes

    if name in ("pretrain", "finetune"):
        recipe, overrides = split(list(words[1:] if name == "finetune" else words))
        if recipe is not None or name == "pretrain":
            read, changes = recipes.read_words(recipe or "quick", recipes.expand_task(overrides, name), name)
            check_parts(changes, plugins or bool(read.get("plugins")))
            return
    else:
        overrides = [word for word in words if recipes.is_override(word)]
    recipes.check_names(overrides, name, SECTIONS[name])
    check_parts(recipes.parse_overrides(recipes.expand_task(overrides, name)), plugins)


def check_places(name: str, *words: str) -> None:
    """Raises:
    CheckpointError: a checkpoint that the command takes must be a folder, and is not there.
    """
    from hf_mim.training.common.checkpoint_path import check_path

    plain = list(takewhile(lambda word: not word.startswith("-"), words))
    for source in part_words(plain)[0] if name in SEVERAL else plain[:1] if name in (*ONE, *FOLDER) else []:
        check_path(source, local=name in FOLDER)


def check_parts(changes: dict, plugins: bool = False) -> None:
    """Raises:
    RecipeError: an unknown part or measurement, where no plug-in could bring it.
    """
    from importlib.metadata import entry_points

    from hf_mim.modeling.options import unknown_choice
    from hf_mim.reference.options import PARTS, names_of
    from hf_mim.training.common.choices import words_of
    from hf_mim.training.common.errors import RecipeError
    from hf_mim.training.common.plugins import GROUP

    if plugins or entry_points(group=GROUP):
        return
    names = [(kind, f"model.{kind}", changes.get("model", {}).get(kind)) for kind in PARTS]
    names += [("pooler", "probe.poolers", name) for name in probed_poolers(changes.get("probe", {}))]
    names += [("measurement", "analyze", name) for name in changes.get("analyze", {}).get("measurements") or []]
    for kind, key, name in names:
        choices = words_of(*MEASUREMENTS) if kind == "measurement" else names_of(kind)
        if isinstance(name, str) and name not in choices:
            raise RecipeError(str(unknown_choice(kind, name, choices)), key)


def probed_poolers(probe: dict) -> list:
    """The kind of each pooler that the section `probe` names: `pooler_config` may give a kind another name."""
    options = probe.get("pooler_config")
    options = options if isinstance(options, dict) else {}
    kinds = {name: value.get("pooler", name) for name, value in options.items() if isinstance(value, dict)}
    return [kinds.get(name, name) for name in probe.get("poolers") or kinds]


def check_pooler(name: str) -> str:
    """As a callback of an option. -> the name, which a pooler has."""
    check_parts({"model": {"pooler": name}})
    return name


Pooler = Annotated[str, typer.Option(help="What makes one vector of the tokens.", callback=check_pooler)]


def check_installed(to: str | None = None, demo: bool = False, page: bool = False) -> None:
    """Raises:
    UserError: a package is not installed that an export to a format, a demo or its page needs.
    """
    from hf_mim.training.common.choices import ONNX, ONNX_RUN, check_packages

    if to == "onnx":
        check_packages("ONNX", ONNX_RUN, "onnx")
    if page:
        check_packages("a page", ONNX, "onnx")
    elif demo:
        check_packages("the demo", ("gradio",), "demo")


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
    check_installed(demo=True, page=form == "page")
