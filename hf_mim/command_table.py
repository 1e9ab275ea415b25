"""The table of subcommands that `cli.py` fills, and what its rows share."""

from collections.abc import Callable
from typing import Annotated

import typer

from hf_mim.reference.examples import epilog


HELP = ("-h", "--help")
app = typer.Typer(
    name="hf-mim",
    help="Masked image modeling for the Hugging Face ecosystem.",
    epilog=epilog("hf-mim"),
    no_args_is_help=True,
    context_settings={"help_option_names": list(HELP)},
    pretty_exceptions_enable=False,
)
# {command: the sections of its overrides}, which are checked before anything heavy is imported
SECTIONS: dict[str, tuple[str, ...]] = {}
TUNED: set[str] = set()  # commands that compute for long; see `tune_for_cpu`
LIGHT: set[str] = set()  # commands that need nothing heavy


def command(*sections: str, tuned: bool = False, light: bool = False) -> Callable[[Callable], Callable]:
    """Adds a function to the table."""

    def add(function: Callable) -> Callable:
        name = function.__name__
        SECTIONS[name] = sections
        TUNED.update([name] if tuned else [])
        LIGHT.update([name] if light else [])
        return app.command(epilog=epilog(name))(function)

    return add


def completing(name: str) -> Callable[[str], list[str]]:
    """A function of `reference.completion`, which is imported when the shell asks."""

    def complete(incomplete: str) -> list[str]:
        from hf_mim.reference import completion

        return getattr(completion, name)(incomplete)

    return complete


def recipe_words(default: str) -> object:
    help = f"A recipe's name (see `hf-mim recipes`) or a file, `{default}` by default, and what to change in it."
    complete = completing("complete_words")
    return typer.Argument(metavar="RECIPE SECTION.KEY=VALUE", help=help, show_default=False, autocompletion=complete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", show_default=False, autocompletion=completing("complete_words")),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, time and memory; write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist already.")]
License = Annotated[str | None, typer.Option(help="Licence id for the card, such as mit.")]


def print_version(asked: bool) -> None:
    if asked:
        from hf_mim import __version__

        typer.echo(f"hf-mim {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="A module or file with parts of your own; it may stand anywhere, and repeatedly.",
        ),
    ] = None,
):
    """Masked image modeling for the Hugging Face ecosystem."""
    if plugin:
        from hf_mim.training.common.plugins import load_plugins

        load_plugins(plugin)
