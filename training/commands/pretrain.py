"""The command `pretrain`: from a recipe to a checkpoint, its scores and its pictures."""

import json
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from transformers import set_seed

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_model
from hf_mim.training.commands.teacher import teacher_of
from hf_mim.training.data.pretraining import MIMCollator, Splits, load_splits, processor_for
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.urls import is_url
from hf_mim.training.evaluation import metrics
from hf_mim.training.plots import pictures
from hf_mim.training.run import (
    choose_folder,
    copied,
    facts,
    find_checkpoint,
    lookout,
    place_of,
    remote_of,
    save_recipe,
    train_and_save,
)
from hf_mim.training.trainer.monitor import TeacherWatch, Watch
from hf_mim.training.trainer.profiling import ProfileCallback
from hf_mim.training.trainer.remote import RemoteRun
from hf_mim.training.trainer.throughput import mean_throughput
from hf_mim.training.trainer.trainer import MIMTrainer, MIMTrainingArguments


@dataclass
class Run:
    """A run that is set up and has written nothing yet."""

    recipe: dict
    arguments: MIMTrainingArguments
    folder: Path
    model: MIMForPreTraining
    splits: Splits
    console: Console
    paper: str = ""  # what the recipe's header says of it
    checkpoint: Path | None = None  # to resume from
    remote: RemoteRun | None = None  # what copies it to a URL

    @property
    def config(self) -> MIMConfig:
        return self.model.config


def pretrain(name: str = "quick", overrides: list[str] = (), console: Console | None = None) -> Path:
    """Pretrains a recipe, evaluates it where there are labels, and writes everything into one folder.

    Args:
        name: of a recipe, or a file or run folder with one, or the URL of such.
        overrides: `section.key=value`.
        console: where to print; None is the terminal.

    Returns:
        the folder; of a run at a URL, its local one.

    Raises:
        ValueError, OSError: something in the recipe, the data or the folder is wrong; nothing has been written.
        KeyboardInterrupt: after Ctrl-C, and a checkpoint.
        SystemExit: with code 143, after SIGTERM and a checkpoint; with 1, where another process is gone.
    """
    run = set_up(name, list(overrides), console or Console())
    started = time.perf_counter()
    with copied(run):
        trainer = train(run)
        seconds = time.perf_counter() - started
        with lookout(run, "pretrain"):
            if trainer.is_world_process_zero():
                write_results(run, trainer, seconds)
                say_what_next(run)
            trainer.accelerator.wait_for_everyone()
    return run.folder


# ---- before --------------------------------------------------------------------------------------------------------
def set_up(name: str, overrides: list[str], console: Console) -> Run:
    """Reads and checks everything that can be wrong, from the quickest to the slowest, and prints what will run."""
    recipe = recipes.resolve(name, overrides, "pretrain")
    training, data = dict(recipe["training"]), DataArguments(**recipe["data"])
    wanted = training.pop("output_dir", None)
    arguments = MIMTrainingArguments(output_dir=wanted or "outputs", **training)
    for key in ("output_dir", "resume"):  # another run of the saved recipe must not write here
        recipe["training"].pop(key, None)
    if arguments.resume and wanted is None:
        if not is_url(name) and not Path(name).expanduser().is_dir():
            raise ValueError("which run to resume? hf-mim pretrain FOLDER training.resume=true")
        wanted = name
    if arguments.process_index > 0:
        console = Console(quiet=True)
    remote = remote_of(wanted, console)
    folder = choose_folder(wanted, f"pretrain-{Path(recipes.find(name)).stem}", arguments.resume, remote)
    arguments.output_dir = str(folder)
    console.print(f"output folder: {remote.url if remote else folder}", highlight=False, soft_wrap=True)
    set_seed(arguments.seed)
    model = make_model(recipe["model"])
    splits = load_splits(data, model.config, arguments.seed)
    check_length(splits.train, arguments)
    describe(console, model, splits, arguments, data)
    paper = recipes.read_header(recipes.find(name)).get("paper", "")
    checkpoint = find_checkpoint(console, recipe, folder, remote) if arguments.resume else None
    return Run(recipe, arguments, folder, model, splits, console, paper, checkpoint, remote)


def make_model(section: dict) -> MIMForPreTraining:
    """The model of a recipe: new, or with the weights of `init_from` and its config where the recipe is silent.

    Raises:
        ValueError: an unknown part, option or checkpoint, or values that do not fit together.
    """
    fields = dict(section)
    checkpoint = fields.pop("init_from", None)
    try:
        return load_model(checkpoint, fields) if checkpoint else MIMForPreTraining(MIMConfig(**fields))
    except StrictDataclassError as error:  # no ValueError of its own
        raise ValueError(" ".join(str(error).split())) from None


def check_length(dataset, arguments: MIMTrainingArguments) -> None:
    """Raises:
    ValueError: there would be no optimizer step.
    """
    if not hasattr(dataset, "__len__"):
        if arguments.max_steps < 1:
            raise ValueError("a streamed data set has no length: set training.max_steps")
    elif arguments.dataloader_drop_last and len(dataset) < arguments.train_batch_size * arguments.world_size:
        raise ValueError(
            f"{len(dataset)} images do not fill one batch of {arguments.train_batch_size} on each of "
            f"{arguments.world_size} processes: lower training.per_device_train_batch_size"
        )


def describe(console: Console, model, splits: Splits, arguments: MIMTrainingArguments, data: DataArguments) -> None:
    config = model.config
    count = f"{len(splits.train):,}" if hasattr(splits.train, "__len__") else "streamed"
    height, width = pair(config.image_size)
    where = f"{arguments.device.type}, {'bf16' if arguments.bf16 else 'float32'}"
    where += f", {arguments.world_size} processes" if arguments.world_size > 1 else ""
    where += f", {torch.get_num_threads()} threads" if arguments.device.type == "cpu" else ""
    console.print(
        f"data: {data.dataset or 'Fashion-MNIST subset (shipped)'}, {count} training images at {height}x{width}\n"
        f"model: {config.encoder} encoder, {model.mim.num_parameters() / 1e6:.2f} M parameters, with the decoder "
        f"{model.num_parameters() / 1e6:.2f} M\n"
        f"method: {config.masking} masks, {config.target} target, {config.decoder} decoder\n"
        f"training: total batch {arguments.total_batch_size}, learning rate {arguments.learning_rate:.3g}, on {where}",
        highlight=False,
    )


# ---- training ------------------------------------------------------------------------------------------------------
def train(run: Run) -> MIMTrainer:
    """Trains and saves; so does a run that is stopped by Ctrl-C or SIGTERM, which are then passed on."""
    config = run.config
    trainer = MIMTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=run.splits.train,
        data_collator=MIMCollator(config, run.model.mask_grid(*pair(config.image_size)), normalized=False),
        processing_class=processor_for(config),
        console=run.console,
    )
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)  # a look at sharded weights takes them all
    if run.arguments.watch_every and whole:
        say = partial(run.console.print, style="yellow", highlight=False, soft_wrap=True)
        trainer.add_callback(Watch(trainer, run.splits, run.folder, run.arguments.watch_every, say))
    if trainer.is_world_process_zero():
        if teacher_of(run.model.target) is not None:
            say = partial(run.console.print, highlight=False, soft_wrap=True)
            trainer.add_callback(TeacherWatch(trainer, run.splits, say))
        if run.arguments.profile:
            trainer.add_callback(ProfileCallback(trainer, run.folder, partial(run.console.print, highlight=False)))
        save_recipe(run, "hf-mim pretrain")
    trainer.count_flops()
    train_and_save(run, trainer, partial(save, run, trainer), "pretrain")
    return trainer


def save(run: Run, trainer: MIMTrainer) -> None:
    """Writes weights, config and processor, the curve of the loss and reconstructions."""
    trainer.save_model(str(run.folder))  # in every process: sharded weights are gathered
    if not trainer.is_world_process_zero():
        return
    if trainer.has_shares:
        moving = run.model.target.moving_state()
        run.model = load_model(str(run.folder)).to(run.arguments.device)
        run.model.target.load_moving_state(moving)
    (run.folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same to people
    if any("loss" in entry for entry in trainer.state.log_history):
        pictures.draw_loss(trainer.state.log_history, run.folder / "loss.png")
    if hasattr(run.splits.train, "__len__"):
        reconstruct_examples(run).save(run.folder / "reconstructions.png")


def reconstruct_examples(run: Run):
    """The picture of some test images, or of training images where there are no others; masks are those of epoch 0."""
    dataset = run.splits.test or run.splits.train.without_augmentation()
    dataset.set_epoch(0)
    grid = run.model.mask_grid(*pair(run.config.image_size))
    batch = MIMCollator(run.config, grid)(dataset.__getitems__(pictures.examples(dataset)))
    run.model.eval()
    device = run.model.device
    inputs = (batch[name].to(device) for name in ("pixel_values", "bool_masked_pos"))
    shown = run.model.reconstruct(*inputs, with_target=True)
    return pictures.draw_reconstructions(shown)


# ---- after ---------------------------------------------------------------------------------------------------------
def write_results(run: Run, trainer: MIMTrainer, seconds: float) -> None:
    """Evaluates where there are labels, writes metrics.json and prints the table."""
    results = evaluate(run) if run.splits.test is not None else {}
    results |= {
        **facts(run, trainer, seconds),
        **mean_throughput(trainer.state.log_history),
        "num_train_images": len(run.splits.train) if hasattr(run.splits.train, "__len__") else None,
        "bad_images": bad_images(run.splits),
    }
    if hasattr(run.splits.train, "damaged"):
        results["damaged_shards"] = run.splits.train.damaged()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TeacherWatch):
            results["teacher"] = callback.found
    (run.folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if (bad := results["bad_images"])["count"]:
        words = f"skipped {bad['count']} images that cannot be used" + (
            f"; the first: {bad['first']}" * bool(bad["first"])
        )
        run.console.print(words, highlight=False, soft_wrap=True)
    if "trained" in results:
        run.console.print(results_table(results))
    else:
        run.console.print(f"not evaluated: {run.splits.note}", highlight=False)


def bad_images(splits: Splits) -> dict:
    """{"count", "first"}: how many images could not be used, as far as they were looked at, and what is wrong with the
    first; None where that is not known."""
    found = [split.bad.found() for split in (splits.train, splits.test) if hasattr(split, "bad")]
    found = [entry for entry in found if entry is not None]
    count = sum(entry[0] for entry in found) + getattr(splits.train, "bad_count", 0)
    return {"count": count, "first": found[0][1] if found else None}


def evaluate(run: Run) -> dict:
    """k-NN and linear-probe accuracy of the frozen encoder, of the same encoder untrained, and of raw pixels."""
    started, most = time.perf_counter(), run.recipe["data"].get("max_eval_images") or metrics.TRAIN_IMAGES
    train = metrics.subset(run.splits.train_eval, min(most, metrics.TRAIN_IMAGES))
    test = metrics.subset(run.splits.test, min(most, metrics.TEST_IMAGES))
    set_seed(run.arguments.seed)
    untrained = MIMForPreTraining(run.config).mim.to(run.model.device)
    columns = ("{task.description}", BarColumn(), "{task.completed:,.0f}/{task.total:,.0f} images")
    with Progress(*columns, TimeRemainingColumn(compact=True), console=run.console, transient=True) as bar:
        task = bar.add_task("evaluating", total=3 * (len(train[1]) + len(test[1])))
        loader = {
            "workers": run.arguments.dataloader_num_workers,
            "advance": lambda images: bar.advance(task, images),
        }
        results = {
            "trained": metrics.evaluate_encoder(run.model.mim, train, test, run.arguments.bf16, **loader),
            "untrained": metrics.evaluate_encoder(untrained, train, test, run.arguments.bf16, **loader),
            "raw_pixels": metrics.evaluate_raw_pixels(run.config, train, test, **loader),
        }
    results["evaluation"] = {
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "test": run.splits.note,
        "protocol": metrics.PROTOCOL,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return results


def results_table(results: dict) -> Table:
    sizes = results["evaluation"]
    table = Table(
        title="accuracy of the frozen encoder, percent",
        caption=f"{sizes['train_images']:,} images to learn from, {sizes['test_images']:,} to test on",
    )
    table.add_column("")
    for column in ("trained", "untrained", "raw pixels"):
        table.add_column(column, justify="right")
    names = {"knn": "k-NN", "linear": "linear probe"}
    poolings = {"mean": "mean of the patches", "cls": "class token"}
    for pooling, words in poolings.items():
        for name, title in names.items():
            key = f"{name}_{pooling}"
            if key in results["trained"]:
                cells = [results[column][key] for column in ("trained", "untrained")]
                raw = f"{results['raw_pixels'][name]:.1f}" if pooling == "mean" else ""
                table.add_row(f"{title}, {words}", *(f"{cell:.1f}" for cell in cells), raw)
    return table


def say_what_next(run: Run) -> None:
    folder = shlex.quote(place_of(run))
    # A stream is not opened again for examples; those of the looks are there.
    drawn = [name for name in ("reconstructions.png", "watch", "loss.png") if (run.folder / name).exists()]
    for line in (
        f"pictures: {', '.join(f'{folder}/{name}' for name in drawn)}",
        f"next, train it further: hf-mim pretrain {folder} model.init_from={folder}",
        f"or let it fill in an image of yours: hf-mim reconstruct {folder} IMAGE",
        f"output folder: {folder}",
    ):
        run.console.print(line, highlight=False, soft_wrap=True)
