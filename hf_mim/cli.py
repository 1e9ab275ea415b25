"""The `hf-mim` command: a thin table of subcommands. Each row names the arguments of one, with their help, and the
function that runs it, whose module is imported when it is called."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hf_mim.cpu import tune_for_cpu


app = typer.Typer(
    name="hf-mim",
    help="Masked image modeling for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# {command: the sections of its overrides}, which are checked before anything heavy is imported
SECTIONS: dict[str, tuple[str, ...]] = {}
TUNED: set[str] = set()  # commands that compute for long; see `tune_for_cpu`


def command(*sections: str, tuned: bool = False) -> Callable[[Callable], Callable]:
    """Adds a function to the table."""

    def add(function: Callable) -> Callable:
        SECTIONS[function.__name__] = sections
        if tuned:
            TUNED.add(function.__name__)
        return app.command()(function)

    return add


def recipe_words(default: str) -> object:
    help = f"A recipe's name (see `hf-mim recipes`) or a file, `{default}` by default, and what to change in it."
    return typer.Argument(metavar="RECIPE SECTION.KEY=VALUE", help=help, show_default=False)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist already.")]
License = Annotated[str | None, typer.Option(help="Licence id for the card, such as mit.")]


def split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """`[RECIPE] SECTION.KEY=VALUE ...` -> the recipe, or None, and the overrides."""
    from hf_mim.training.recipe import is_override

    words = list(words or [])
    return (words[0], words[1:]) if words and not is_override(words[0]) else (None, words)


def push_if_asked(folder: Path) -> None:
    """Publishes a run whose recipe says `training.push_to_hub`, and prints where."""
    from hf_mim.hub.push import push_run

    if (published := push_run(folder)) is not None:
        typer.echo(published.url)


# ---- the table -----------------------------------------------------------------------------------------------------
@command("model", "data", "training", tuned=True)
def pretrain(words: Annotated[list[str] | None, recipe_words("quick")] = None):
    """Pretrain a model: `hf-mim pretrain`, or `hf-mim pretrain mae data.dataset=me/photos model.target=pixel`."""
    from hf_mim.training.commands.pretrain import pretrain as run

    name, overrides = split(words)
    push_if_asked(run(name or "quick", overrides))


@command("model", "data", "training", "finetune", tuned=True)
def finetune(
    model: Annotated[str, typer.Argument(help="A checkpoint or a vision model of transformers; a folder or a Hub id.")],
    words: Annotated[list[str] | None, recipe_words("finetune_small")] = None,
):
    """Fine-tune on labelled images: `hf-mim finetune MODEL data.dataset=me/photos finetune.lora=true`."""
    from hf_mim.training.commands.finetune import finetune as run

    push_if_asked(run(model, *split(words)))


@command()
def recipes():
    """List the recipes that `pretrain` and `finetune` know."""
    from rich.table import Table

    from hf_mim.training.common.console import RunConsole
    from hf_mim.training.recipe import list_recipes

    table = Table(caption="Run one with: hf-mim pretrain RECIPE data.dataset=..., or: hf-mim finetune MODEL RECIPE ...")
    for title in ("recipe", "command", "paper"):
        table.add_column(title, no_wrap=True)
    table.add_column("description")
    for entry in list_recipes():
        table.add_row(entry["name"], entry["runs"], entry.get("paper", "").partition(" ")[0], entry["title"])
    RunConsole().show(table)


@command("data")
def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help="The output folder of a run, or a model on the Hub.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE | SECTION.KEY=VALUE]", help="An image file; without, images of the data it was trained on."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("reconstruction.png"),
    force: Force = False,
    bands: Annotated[str, typer.Option(help="Channels to show as red, green and blue, such as 3,2,1; or one.")] = "",
):
    """Hide parts of an image, or of images of a run's own data, and let a checkpoint fill them in."""
    from hf_mim.training.commands import reconstruct as run

    try:
        chosen = [int(band) for band in bands.split(",")] if bands else None
    except ValueError:
        raise typer.BadParameter(f"--bands takes numbers like 3,2,1, not {bands!r}") from None
    image, overrides = split(words)
    if image is None:
        run.reconstruct_examples(checkpoint, out, overrides, force=force, bands=chosen)
    else:
        run.reconstruct_file(checkpoint, Path(image), out, force=force, bands=chosen)
    typer.echo(out)


@command("analyze", "data", tuned=True)
def analyze(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT... SECTION.KEY=VALUE",
            help="Checkpoints of this project or vision models of transformers, and what to change.",
        ),
    ],
):
    """Measure what encoders learned, beside the same encoders untrained: `hf-mim analyze FOLDER data.dataset=...`."""
    from hf_mim.analysis.run import analyze as run
    from hf_mim.training.recipe import is_override

    run([word for word in words if not is_override(word)], [word for word in words if is_override(word)])


@command("probe", "data", tuned=True)
def probe(
    model: Annotated[str, typer.Argument(help="A checkpoint of this project or a vision model of transformers.")],
    overrides: Overrides = None,
    uncached: Annotated[bool, typer.Option("--uncached", help="Run the encoder again in every epoch: slow.")] = False,
):
    """Evaluate a frozen encoder behind several poolers: `hf-mim probe FOLDER data.dataset=me/photos`."""
    from hf_mim.training.commands.probe import probe as run

    run(model, [*(overrides or []), *(["probe.uncached=true"] if uncached else [])])


@command("model", "data", "training")
def teacher(
    model: Annotated[str, typer.Argument(help="A vision model on the Hub, or a local folder.")],
    overrides: Overrides = None,
):
    """Show what a teacher would give: channels, grid and token diversity of its layers, images per second."""
    from hf_mim.training.commands.teacher import describe_teacher

    describe_teacher(model, list(overrides or []))


@command("model", "data", "training")
def codebook(
    model: Annotated[str, typer.Argument(help="The teacher: a vision model on the Hub, or a local folder.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    overrides: Overrides = None,
    codes: Annotated[int, typer.Option(min=2, help="How many; 256 to 1024 for small data.")] = 512,
    images: Annotated[int, typer.Option(min=1, help="How many training images to fit them on.")] = 2000,
    force: Force = False,
):
    """Fit a codebook of a teacher's features, for the target discrete_token."""
    from hf_mim.training.commands.teacher import fit_codebook

    fit_codebook(model, out, list(overrides or []), codes, images, force=force)


@command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    repo: Annotated[str, typer.Argument(help="Where to: me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; it is made if there is none.")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for what is uploaded.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    license: License = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was edited on the Hub.")] = False,
):
    """Publish a checkpoint on the Hub, with card, results and pictures. The token: `hf auth login` or HF_TOKEN."""
    from hf_mim.hub.push import push as run

    published = run(checkpoint, repo, private=private, revision=revision, tag=tag, pr=pr, license=license, force=force)
    for note in published.notes:
        typer.echo(note, err=True)
    typer.echo(published.url if published.uploaded else f"nothing to send, all of it is there already: {published.url}")


@command()
def card(
    checkpoint: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    repo: Annotated[str, typer.Argument(help="What it is to be called: me/my-model.")],
    out: Annotated[Path, typer.Option(help="The folder to write README.md and the pictures into.")],
    license: License = None,
    force: Force = False,
):
    """Write the model card that `push` would send, to read or change it first: `push` takes a README.md as it is."""
    from hf_mim.hub.push import write_card

    typer.echo(write_card(checkpoint, repo, out, license, force))


@command()
def convert(
    source: Annotated[str, typer.Argument(help="A file of weights, or a folder or Hub id of transformers or timm.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    heads: Annotated[int | None, typer.Option(help="Attention heads, where they are not 64 channels wide.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels, 224 or 192x320, where weights do not say.")] = None,
    timm_name: Annotated[
        str | None, typer.Option(help="timm model name, for ConvNets other than ResNet and ConvNeXt.")
    ] = None,
    decoder_heads: Annotated[int | None, typer.Option(help="Attention heads of MAE's decoder, if not 32 wide.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="The encoder's file, for a pooling head alone.")] = None,
    force: Force = False,
):
    """Bring a checkpoint of another project: MAE, SimMIM, BEiT, DTM, A2MIM, SparK, DINO, timm, transformers."""
    from hf_mim.conversion import convert as run
    from hf_mim.training.conversion.reading import size_of

    for line in run(source, out, heads, size_of(image_size), timm_name, decoder_heads, encoder, force):
        typer.echo(line)


@command("data")
def doctor(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint or a vision model of transformers, folder or Hub id.")
    ],
    overrides: Overrides = None,
):
    """Look for known faults in a checkpoint and name the remedy. Exit code 1 if one is found."""
    from hf_mim.doctor.checks import doctor as run

    raise typer.Exit(run(checkpoint, list(overrides or [])))


@command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="The output folder of a run, or a model on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="transformers, timm, onnx, or official (FCMAE).")],
    force: Force = False,
):
    """Write a checkpoint's encoder as a model of transformers or timm, or as ONNX, that needs nothing of hf_mim; or a
    whole FCMAE as its official file."""
    from hf_mim.conversion import export as run

    for line in run(checkpoint, out, to, force):
        typer.echo(line)


# ---- running it ----------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    With HF_MIM_DEBUG=1 in the environment an error keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = os.environ.get("HF_MIM_DEBUG", "0") not in ("", "0")
    try:
        check_command(arguments)
        if arguments and "--help" not in arguments and arguments != ["recipes"]:  # those need nothing heavy
            check_words(*arguments)
            if arguments[0] in TUNED:
                tune_for_cpu()
            silence_libraries()
        group = typer.main.get_command(app)
        return group.main(args=arguments, prog_name="hf-mim", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:  # nobody reads on, as of `| head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, it stays open
        return 141
    except Exception as error:
        message = describe(error)
        if debug or message is None:
            raise
        print(f"error: {message}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        return 2


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


def describe(error: Exception) -> str | None:
    """One line for what the user can do something about; None for a mistake of ours, which keeps its traceback."""
    # What the command line itself got wrong, such as an unknown option: the class of these errors moved within typer.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"{usage()} See hf-mim --help"
    if "torch" in sys.modules:
        from hf_mim.training.common.resources import explain_shortage

        if (message := explain_shortage(error)) is not None:
            return message
    if "huggingface_hub" in sys.modules:
        from hf_mim.hub.errors import explain

        if (message := explain(error)) is not None:
            return message
    from hf_mim.training.common.errors import UserError

    if not isinstance(error, ValueError | OSError):  # UserError and OptionError are ValueErrors
        return None
    if isinstance(error, UserError):  # a line already; a name in it may hold line breaks
        return str(error).replace("\n", "\\n")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def silence_libraries() -> None:
    """Keeps the libraries' own bars and advice out of what a command prints; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
