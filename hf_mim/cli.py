"""The `hf-mim` command: a thin table of subcommands. Each row names the arguments of one, with their help, and the
function that runs it, whose module is imported when it is called."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_mim import command_words
from hf_mim.command_table import TUNED, DryRun, Force, License, Overrides, app, command, completing, recipe_words
from hf_mim.command_words import Pooler, part_words, split
from hf_mim.cpu import tune_for_cpu
from hf_mim.error_lines import describe


def push_if_asked(folder: Path) -> None:
    """Publishes a run whose recipe says `training.push_to_hub`, and prints where."""
    from hf_mim.hub.push import push_run

    if (published := push_run(folder)) is not None:
        typer.echo(published.url)


# ---- the table -----------------------------------------------------------------------------------------------------
@command("model", "data", "training", tuned=True)
def pretrain(words: Annotated[list[str] | None, recipe_words("quick")] = None, dry_run: DryRun = False):
    """Pretrain a model: `hf-mim pretrain`, or `hf-mim pretrain mae data.dataset=me/photos model.target=pixel`."""
    from hf_mim.training.commands.pretrain import pretrain as run

    name, overrides = split(words)
    folder = run(name or "quick", overrides, preview=dry_run)
    if not dry_run:
        push_if_asked(folder)


@command("model", "data", "training", tuned=True)
def distill(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER... STUDENT SECTION.KEY=VALUE",
            help="Models to learn from, the model that learns, and what to change in the recipe. The student: vit, a "
            "timm model, a model type of transformers, or a folder or Hub id to start from.",
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option(help="distill; distill_small for the shipped images.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
):
    """Distil teachers into a student of any architecture: `hf-mim distill lite0 facebook/dinov2-small resnet18`."""
    from hf_mim.training.commands.distill import distill as run

    names, overrides = part_words(words)
    if len(names) < 2:
        raise typer.BadParameter("name at least one teacher and the student: hf-mim distill TEACHER STUDENT")
    folder = run(names[:-1], names[-1], overrides, recipe, preview=dry_run)
    if not dry_run:
        push_if_asked(folder)


@command("model", "data", "training", "finetune", tuned=True)
def finetune(
    model: Annotated[str, typer.Argument(help="A checkpoint or a vision model of transformers; a folder or a Hub id.")],
    words: Annotated[list[str] | None, recipe_words("finetune_small")] = None,
    dry_run: DryRun = False,
):
    """Fine-tune on labelled images: `hf-mim finetune MODEL data.dataset=me/photos finetune.lora=true`."""
    from hf_mim.training.commands.finetune import finetune as run

    folder = run(model, *split(words), preview=dry_run)
    if not dry_run:
        push_if_asked(folder)


@command(light=True)
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="The one to print as it is.", autocompletion=completing("complete_recipe"))
    ] = None,
):
    """List the recipes of `pretrain` and `finetune`, or print one, to read or to change."""
    from hf_mim.reference.show import show_recipes

    show_recipes(name)


@command(light=True)
def options(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION, PART or KEY",
            help="Such as data, target, target.hog or crop_scale; without, what there is.",
            autocompletion=completing("complete_option"),
        ),
    ] = None,
):
    """List every key of a recipe and every option of a part: type, default and meaning."""
    from hf_mim.reference.show import show_options

    show_options(name)


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

    run(*part_words(words))


@command("probe", "data", tuned=True)
def probe(
    model: Annotated[str, typer.Argument(help="A checkpoint of this project or a vision model of transformers.")],
    overrides: Overrides = None,
    uncached: Annotated[bool, typer.Option("--uncached", help="Run the encoder again in every epoch: slow.")] = False,
):
    """Evaluate a frozen encoder behind several poolers: `hf-mim probe FOLDER data.dataset=me/photos`."""
    from hf_mim.training.commands.probe import probe as run

    run(model, [*(overrides or []), *(["probe.uncached=true"] if uncached else [])])


@command("data", tuned=True)
def embed(
    model: Annotated[str, typer.Argument(help="A checkpoint of this project or a vision model of transformers.")],
    words: Annotated[
        list[str], typer.Argument(metavar="OUT SECTION.KEY=VALUE", help="The folder to write, and what to embed.")
    ],
    pooler: Pooler = "mean",
    layer: Annotated[int, typer.Option(help="Whose tokens; -1 is the last, 0 the embedding.")] = -1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
):
    """Write a vector of every image, with file names and labels, as parquet. Run it again to go on where it stopped."""
    from hf_mim.training.commands.embed import embed as run

    folders, overrides = part_words(words)
    if len(folders) != 1:
        raise typer.BadParameter(f"embed takes one folder to write, not {len(folders)}: {' '.join(folders)}")
    run(model, Path(folders[0]), overrides, pooler, layer, workers)


@command(tuned=True)
def search(
    folder: Annotated[Path, typer.Argument(help="A folder that `embed` wrote.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("nearest.png"),
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    force: Force = False,
):
    """Find the images that are most like one, and show them beside it."""
    from hf_mim.training.commands.search import search as run

    run(folder, image, out, count, force)


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


@command("data", tuned=True)
def demo(
    model: Annotated[str, typer.Argument(help="A checkpoint of this project or a vision model of transformers.")],
    overrides: Overrides = None,
    space: Annotated[Path | None, typer.Option(help="Write a Space of the Hub into this folder instead.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page that needs no server into this folder.")] = None,
    runtime: Annotated[Path | None, typer.Option(help="For --page: the npm package onnxruntime-web.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where the app listens, on this machine only: 7860 by default.")
    ] = None,
    force: Force = False,
):
    """Show a model in the browser: reconstruction at any mask ratio, attention, nearest neighbours."""
    command_words.check_demo(page=page, space=space, overrides=overrides, runtime=runtime, port=port, force=force)
    if page is not None:
        from hf_mim.demo.page import write_page

        written = write_page(model, page, overrides or [], runtime, force)
        typer.echo(f"open {written[0]}")
    elif space is not None:
        from hf_mim.demo.app import write_space

        written = write_space(model, space, force)
        typer.echo(f"wrote {len(written)} files; publish them with: hf upload --repo-type space ME/NAME {space}")
    else:
        from hf_mim.demo.app import make_app

        make_app(model, overrides or []).launch(server_name="127.0.0.1", server_port=port or 7860)


@command(light=True)
def new(
    kind: Annotated[str, typer.Argument(help="target, mask, pooler or decoder.")],
    name: Annotated[str, typer.Argument(help="What recipes are to call it, such as edge.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("."),
    force: Force = False,
):
    """Write a part of your own: a class, its test and a recipe that run as they are."""
    from hf_mim.new.write import write_part

    module, test, recipe = write_part(kind, name, out, force)
    typer.echo(f"wrote {module}, {test} and {recipe}\nnext: pytest {test}\nand:  hf-mim pretrain {recipe}")


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
    to: Annotated[
        Literal["transformers", "timm", "onnx", "official"] | None,
        typer.Option(help="official is for FCMAE; by default the library it came from."),
    ] = None,
    force: Force = False,
):
    """Write a checkpoint's encoder as a model of transformers or timm, or as ONNX, that needs nothing of hf_mim; or a
    whole FCMAE as its official file."""
    command_words.check_installed(to)
    from hf_mim.conversion import export as run

    for line in run(checkpoint, out, to, force):
        typer.echo(line)


LONGEST = 2000  # characters of an error: names and values in it may come from files


# ---- running it ----------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C.

    With HF_MIM_DEBUG=1 in the environment an error keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = os.environ.get("HF_MIM_DEBUG", "0") not in ("", "0")
    try:
        plugins, arguments = command_words.take_plugins(arguments)
        command_words.check_command(arguments)
        if command_words.is_heavy(arguments):
            command_words.check_words(*arguments, plugins=bool(plugins))
            if arguments[0] in TUNED:
                tune_for_cpu()
            silence_libraries()
        group = typer.main.get_command(app)
        return group.main(args=[*plugins, *arguments], prog_name="hf-mim", standalone_mode=False) or 0
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
        message = message if len(message) <= LONGEST else f"{message[: LONGEST - 300]} ... {message[-200:]}"
        print(f"error: {message}".encode(errors="backslashreplace").decode(), file=sys.stderr)
        return 2


def silence_libraries() -> None:
    """Keeps the libraries' own bars and advice out of what a command prints; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
