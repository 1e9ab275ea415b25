"""The `hf-mim` command: a thin table of subcommands."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="hf-mim",
    help="Masked image modeling for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE SECTION.KEY=VALUE",
        help="A recipe's name (see `hf-mim recipes`) or a file, `quick` by default, and what to change in it.",
        show_default=False,
    ),
]


@app.command()
def pretrain(words: Words = None):
    """Pretrain a model: `hf-mim pretrain`, or `hf-mim pretrain mae data.dataset=me/photos model.target=pixel`."""
    from hf_mim.training.pretrain import pretrain as run

    words = list(words or [])
    named = bool(words) and "=" not in words[0]
    run(words[0] if named else "quick", words[1:] if named else words)


@app.command()
def recipes():
    """List the recipes that `pretrain` knows."""
    from rich.console import Console
    from rich.table import Table

    from hf_mim.training.recipe import list_recipes

    table = Table("recipe", "what", "paper", "command", show_lines=True)
    for entry in list_recipes():
        table.add_row(*(entry.get(key, "") for key in ("name", "title", "paper", "command")))
    Console().print(table, highlight=False)


@app.command()
def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help="The output folder of a run, or a model on the Hub.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("reconstruction.png"),
):
    """Hide parts of an image and let a checkpoint fill them in."""
    from hf_mim.training.reconstruct import reconstruct_file

    reconstruct_file(checkpoint, image, out)
    typer.echo(out)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    With HF_MIM_DEBUG=1 in the environment an error keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = os.environ.get("HF_MIM_DEBUG", "0") not in ("", "0")
    command = typer.main.get_command(app)
    try:
        check_command(arguments, command.commands)
        quieten()
        return command.main(args=arguments, prog_name="hf-mim", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        message = describe(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def check_command(arguments: list[str], commands: dict) -> None:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        from hf_mim.modeling.configuration_mim import unknown

        raise unknown("command", arguments[0], commands)


def describe(error: Exception) -> str | None:
    """One line for what the user can do something about; None for a mistake of ours, which keeps its traceback."""
    # What the command line itself got wrong: too few arguments, an option that does not exist.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"{usage()} See hf-mim --help"
    if not isinstance(error, ValueError | OSError):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def quieten() -> None:
    """Keeps the libraries' own bars and advice out of what a command prints; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
