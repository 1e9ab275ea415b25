"""What `hf-mim options` and `hf-mim recipes` print."""

import re

from rich.console import Group as Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hf_mim.reference import options
from hf_mim.training import recipe as recipes
from hf_mim.training.common.console import RunConsole


SENTENCE = re.compile(r"\.\s+(?=[A-Z(`])")


def show_options(word: str | None = None) -> None:
    """Prints the sections and parts there are, or what `word` names.

    Raises:
        OptionError: nothing has that name.
    """
    console = RunConsole()
    if word is None:
        console.show(overview())
        return
    groups = options.find(word)
    brief = len(groups) == 1 and len(groups[0].options) > 60  # of what transformers says, the first sentence
    for index, group in enumerate(groups):
        if index:
            console.log("")
        console.show(describe(group, brief))
    if brief:
        console.log(f"\nOne key in full: hf-mim options {groups[0].name}.KEY", style="dim")


def overview() -> Lines:
    sections, parts = plain_table(), plain_table()
    for name in options.SECTIONS | options.COMMAND_SECTIONS:
        group = options.section(name)
        sections.add_row(Text(name, "bold"), Text(f"{len(group.options)} keys"), Text(group.summary))
    for kind in options.PARTS:
        parts.add_row(Text(kind, "bold"), Text(", ".join(options.names_of(kind))))
    usage = (
        "A section, a part or a key in full: hf-mim options data, hf-mim options target.hog, hf-mim options crop_scale"
    )
    return Lines(
        Text("Sections of a recipe, SECTION.KEY=VALUE on the command line"),
        sections,
        Text("\nParts of a model, model.KIND=NAME and model.KIND_config.OPTION=VALUE"),
        parts,
        Text(f"\n{usage}", "dim"),
    )


def plain_table() -> Table:
    return Table(box=None, show_header=False, padding=(0, 2))


def describe(group: options.Group, brief: bool = False) -> Lines:
    """The options of a group, each with what it means on the lines below it."""
    title = Text.assemble((group.name, "bold underline"), f"  {group.summary}")
    lines: list = [title, *([Text(f"choose it by: {group.choose}", "dim")] if group.choose else [])]
    for name, option in group.options.items():
        kind, default = options.type_title(option), options.default_title(option)
        lines.append(Text.assemble((group.prefix, "dim"), (name, "bold"), f"  {kind}", (f"  [{default}]", "cyan")))
        meaning = SENTENCE.split(option.meaning)[0] if brief else option.meaning
        lines.append(Padding(Text(meaning), (0, 0, 0, 4)))
    if group.further:
        lines.append(Text(f"and {group.further}", "dim"))
    if not group.options and not group.further:
        lines.append(Text("no options", "dim"))
    return Lines(*lines)


def show_recipes(name: str | None = None) -> None:
    """Prints what recipes there are, or one as it is: a file that can be changed and run.

    Raises:
        RecipeError, OSError: there is no such recipe.
    """
    console = RunConsole()
    if name is not None:
        console.rich.file.write(recipes.find(name).read_text(encoding="utf-8"))
        return
    table = Table(caption="Read one by: hf-mim recipes RECIPE. Run it by: hf-mim pretrain RECIPE data.dataset=...")
    for title in ("recipe", "command", "paper"):
        table.add_column(title, no_wrap=True)
    table.add_column("description")
    for entry in recipes.list_recipes():
        table.add_row(entry["name"], entry["runs"], entry.get("paper", "").partition(" ")[0], entry["title"])
    console.show(table)
