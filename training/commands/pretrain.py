"""The command `pretrain`: from a recipe to a checkpoint, its scores and its pictures."""

import shlex
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import set_seed

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.masking import num_hidden_tokens
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair, size_title
from hf_mim.modeling.teachers import teachers_of
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import config_errors, load_model, start_model
from hf_mim.training.commands.dry_run import dry_run
from hf_mim.training.commands.reconstruct import draw_examples
from hf_mim.training.common.console import IMAGES_DONE, RunConsole, make_table
from hf_mim.training.common.device import on_device
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.recipe_keys import KEEP_KEYS, START_KEYS
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits, load_splits
from hf_mim.training.data.processors import processor_for
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.data.urls import is_url
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.feature_statistics import describe_explained, nearly_constant
from hf_mim.training.evaluation.metrics import FORGETTING, format_forgetting, frozen_scores
from hf_mim.training.own_data import dataset_title
from hf_mim.training.plots.charts import draw_loss
from hf_mim.training.run import TrainingRun, which_run
from hf_mim.training.trainer.advice import warning_of_twin
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.fitting import fit_target
from hf_mim.training.trainer.forgetting import ForgettingMonitor, watched_images
from hf_mim.training.trainer.lora import merge_lora
from hf_mim.training.trainer.monitor import IMAGES, TeacherMonitor, TrainingMonitor
from hf_mim.training.trainer.profiling import ProfileCallback
from hf_mim.training.trainer.start import check_start, describe_keeping
from hf_mim.training.trainer.teacher_cache import cache_teachers, check_cache
from hf_mim.training.trainer.throughput import mean_throughput
from hf_mim.training.trainer.trainer import MIMTrainer


@dataclass(kw_only=True)
class PretrainRun(TrainingRun[MIMTrainer]):
    """A pretraining that is set up and has written nothing yet."""

    model: MIMForPreTraining = field(init=False, repr=False)
    splits: Splits = field(init=False, repr=False)

    @property
    def config(self) -> MIMConfig:
        return self.model.config


def pretrain(
    name: str = "quick",
    overrides: Sequence[str] = (),
    console: Console | RunConsole | None = None,
    preview: bool = False,
) -> Path:
    """Pretrains a recipe, evaluates it where there are labels, and writes everything into one folder.

    Args:
        name: of a recipe, or a file or run folder with one, or the URL of such.
        overrides: `section.key=value`.
        console: where to print; None is the terminal.
        preview: print what would run, how long and with how much memory, and write nothing.

    Returns:
        the folder; of a run at a URL, its local one.

    Raises:
        ValueError, OSError: something in the recipe, the data or the folder is wrong; nothing has been written.
        KeyboardInterrupt: after Ctrl-C, and a checkpoint.
        SystemExit: with code 143, after SIGTERM and a checkpoint; with 1, where another process is gone.
    """
    run = set_up(name, overrides, console)
    if preview:
        return dry_run(run, partial(make_trainer, run))
    return run.execute(lambda: train(run), partial(finish, run))


# ---- before --------------------------------------------------------------------------------------------------------
def set_up(name: str, overrides: Sequence[str], console: Console | RunConsole | None = None) -> PretrainRun:
    """Reads and checks everything that can be wrong, from the quickest to the slowest, and prints what will run."""
    recipe = recipes.resolve(name, overrides, "pretrain")
    training, data = dict(recipe["training"]), DataArguments(**recipe["data"])
    output_dir = training.pop("output_dir", None)
    arguments = MIMTrainingArguments(output_dir=output_dir or "outputs", **training)
    if arguments.resume and output_dir is None:
        if not is_url(name) and not Path(name).expanduser().is_dir():
            raise which_run("pretrain")
        output_dir = name
    check_start(recipe["model"], arguments)
    file = recipes.find(name)
    run = PretrainRun.start(
        recipe,
        arguments,
        output_dir,
        f"pretrain-{file.stem}",
        console,
        command="pretrain",
        data=data,
        paper=recipes.credited_paper(name, recipe),
    )
    run.model, start = make_model(recipe["model"] | display_bands(data))
    run.splits = load_splits(data, run.config, arguments.seed)
    run.keep_pixels(run.config, run.splits.data)
    check_length(run.splits.train, arguments)
    if arguments.cache_teacher:
        check_cache(run.model, run.splits.train, data)
    describe(run, start)
    run.log_sample(run.splits.sample)
    run.find_checkpoint()
    return run


def display_bands(data: DataArguments) -> dict:
    """The choice of bands, which the target's pictures follow too, as a field of the model."""
    return {} if data.display_bands is None else {"display_bands": data.display_bands}


def make_model(section: dict) -> tuple[MIMForPreTraining, list[str]]:
    """The model of a recipe, new or with the encoder of `init_from`, and what to tell about its start.

    Raises:
        ValueError: an unknown part, option or checkpoint, or values that do not fit together.
    """
    section = {name: value for name, value in section.items() if name not in KEEP_KEYS}
    with config_errors():
        if section.get("init_from"):
            return start_model(section)
        fields = {name: value for name, value in section.items() if name not in START_KEYS}
        return MIMForPreTraining(MIMConfig(**fields)), []


def check_length(dataset, arguments: MIMTrainingArguments) -> None:
    """Raises:
    RecipeError: there would be no optimizer step.
    """
    if not isinstance(dataset, Sized):
        if arguments.max_steps < 1:
            raise RecipeError("streaming data has no length: set training.max_steps", "training.max_steps")
    elif arguments.dataloader_drop_last and len(dataset) < arguments.train_batch_size * arguments.world_size:
        raise RecipeError(
            f"{len(dataset)} images do not fill one batch of {arguments.train_batch_size} on each of "
            f"{arguments.world_size} processes: lower training.per_device_train_batch_size",
            "training.per_device_train_batch_size",
        )


def describe(run: PretrainRun, start: list[str]) -> None:
    config, train = run.config, run.splits.train
    count = f"{len(train):,}" if isinstance(train, Sized) else "streamed"
    hiding = f"{config.masking} masks" if run.model.hides_tokens else "whole images"
    run.describe(
        run.splits.report,
        run.splits.digest,
        data=f"{dataset_title(run.data)}, {count} training images at {size_title(config.image_size)}",
        model=f"{config.encoder} encoder, {run.model.mim.num_parameters() / 1e6:.2f} M parameters, with the decoder "
        f"{run.model.num_parameters() / 1e6:.2f} M",
        method=f"{hiding}, {config.target} target, {config.decoder} decoder",
        masks=describe_masks(run.model),
        **describe_keeping(run.recipe["model"], run.arguments),
        training=run.describe_training(),
    )
    for line in start:
        run.console.log(line)
    run.describe_length(train)
    if isinstance(train, MIMDataset):
        whole = train.without_augmentation()
        examples = whole.__getitems__(draw_subset(len(whole), IMAGES).tolist())[0].images
        if (problem := nearly_constant(examples)) is not None:
            run.console.warn(f"warning: {problem}")


def describe_masks(model: MIMForPreTraining) -> str:
    """Such as `37 of 49 tokens hidden, on a grid of 7x7`."""
    grid = model.mask_grid(*pair(model.config.image_size))
    hidden, count = num_hidden_tokens(model.config, grid), model.config.masks_per_image
    several = f", {count} masks of each image" if count > 1 else ""
    return f"{hidden} of {grid[0] * grid[1]} tokens hidden, on a grid of {grid[0]}x{grid[1]}{several}"


# ---- training ------------------------------------------------------------------------------------------------------
def make_trainer(run: PretrainRun) -> MIMTrainer:
    config = run.config
    if run.checkpoint is None:  # a checkpoint brings what was estimated
        fit_target(run.model, run.splits.train, run.arguments.device, run.console)
    return MIMTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=run.splits.train,
        data_collator=MIMCollator(config, run.model.mask_grid(*pair(config.image_size)), normalized=False),
        processing_class=processor_for(config, run.splits.sample),
        console=run.console,
        keep=run.recipe["model"].get("keep"),
        keep_weight=run.recipe["model"].get("keep_weight"),
    )


def train(run: PretrainRun) -> MIMTrainer:
    """Trains and saves; so does a run that is stopped by Ctrl-C or SIGTERM, which are then passed on."""
    if run.arguments.cache_teacher:
        cache_teachers(run.model, run.splits, run.data, run.arguments, run.console)
    trainer = make_trainer(run)
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)  # a check needs whole weights
    if run.arguments.watch_every and whole:
        trainer.add_callback(
            TrainingMonitor(trainer, run.splits, run.folder, run.arguments.watch_every, run.console.warn)
        )
        if run.recipe["model"].get("init_from") and trainer.is_world_process_zero():
            trainer.add_callback(watch_forgetting(run, trainer))
    if trainer.is_world_process_zero():
        if teachers_of(run.model.target):
            trainer.add_callback(TeacherMonitor(trainer, run.splits, run.console.log))
        if run.arguments.profile:
            trainer.add_callback(ProfileCallback(trainer, run.folder, run.console.log))
        run.save_recipe("hf-mim pretrain")
    trainer.count_flops()
    run.train(trainer, partial(save, run, trainer))
    return trainer


def watch_forgetting(run: PretrainRun, trainer: MIMTrainer) -> ForgettingMonitor:
    """Measures the start, which takes a while."""
    images = watched_images(run.splits, run.config)
    run.console.log(f"measuring the start on {', and on '.join(watched.title for watched in images)}")
    return ForgettingMonitor(trainer, images, run.folder, run.arguments.watch_every, run.console.warn)


def save(run: PretrainRun, trainer: MIMTrainer) -> None:
    """Writes weights, config and processor, the curve of the loss and reconstructions."""
    merge_lora(run.model)
    trainer.processing_class = processor_for(run.config, run.splits.sample_seen())
    run.save_model(trainer)
    if not trainer.is_world_process_zero():
        return
    if trainer.is_sharded:
        moving = run.model.target.moving_state()
        run.model = on_device(load_model(str(run.folder)), run.arguments.device)
        run.model.target.load_moving_state(moving)
    if any("loss" in entry for entry in trainer.state.log_history):
        draw_loss(trainer.state.log_history, run.folder / "loss.png", run.arguments.figures)
    dataset = run.splits.test or run.splits.train
    if isinstance(dataset, MIMDataset):
        try:
            draw_examples(run.model, dataset.without_augmentation()).save(run.folder / "reconstructions.png")
        except Exception as error:  # the weights are saved; whatever is wrong, the evaluation may still be had
            run.console.warn(f"warning: reconstructions.png was not drawn: {type(error).__name__}: {error}")


# ---- after ---------------------------------------------------------------------------------------------------------
def finish(run: PretrainRun, trainer: MIMTrainer, seconds: float) -> None:
    if not trainer.is_world_process_zero():
        return
    write_results(run, trainer, seconds)
    folder = shlex.quote(run.location)
    # A stream is not opened again for examples; those of the looks are there.
    drawn = [
        name for name in ("reconstructions.png", "watch", "loss.png", "forgetting.png") if (run.folder / name).exists()
    ]
    run.log_next_steps(
        f"pictures: {', '.join(f'{folder}/{name}' for name in drawn)}",
        f"next, train it further: hf-mim pretrain {folder} model.init_from={folder}",
        f"or let it fill in an image of yours: hf-mim reconstruct {folder} IMAGE",
    )


def write_results(run: PretrainRun, trainer: MIMTrainer, seconds: float) -> None:
    """Evaluates where there are labels, writes metrics.json and prints the table.

    Raises:
        EvaluationError: the evaluation failed; what else is known is written.
    """
    results, failure = run.try_evaluation(lambda: evaluate(run) if run.splits.test is not None else {})
    results |= {
        **run.metadata(trainer, seconds),
        **mean_throughput(trainer.state.log_history),
        "num_train_images": len(run.splits.train) if isinstance(run.splits.train, Sized) else None,
        "bad_images": asdict(bad := run.splits.bad_images()),
        "missing_values": missing_values(run.splits),
    }
    if isinstance(run.splits.train, StreamedImages):
        results["damaged_shards"] = run.splits.train.damaged_shards()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TeacherMonitor):
            results["teacher"] = callback.diversity
        if isinstance(callback, TrainingMonitor) and callback.explained is not None:
            results["explained"] = round(callback.explained, 4)
        if isinstance(callback, ForgettingMonitor):
            results["forgetting"] = callback.summary(trainer.state.log_history)
    run.write_json("metrics.json", results)
    if bad.count:
        run.console.log(str(bad))
    if failure is not None:
        raise failure
    if "trained" in results:
        run.console.show(results_table(results))
    else:
        run.console.log(f"Not evaluated: {run.splits.note}")
    if results.get("forgetting"):
        run.console.show(forgetting_table(results["forgetting"]))
    log_advice(run, trainer, results)


def log_advice(run: PretrainRun, trainer: MIMTrainer, results: dict) -> None:
    """Prints at the end what the model explains, the warnings that still hold, and whether it is better than
    untrained."""
    if "explained" in results:
        run.console.log(f"at the end, {describe_explained(run.model, results['explained'])}")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrainingMonitor | ForgettingMonitor):
            for warning in callback.standing.values():
                run.console.warn(f"warning: {warning}")
    worse = warning_of_twin(results, run.length) if "trained" in results else None
    if worse is not None:
        run.console.warn(worse)


def forgetting_table(forgetting: dict[str, dict]) -> Table:
    return make_table(
        ("", "start", "now"),
        [
            (
                f"{FORGETTING[name].title}, {images['data']}",
                *(format_forgetting(name, images[end][name]) for end in ("before", "after")),
            )
            for images in forgetting.values()
            for name in images["after"]
        ],
        title="what became of the start: accuracy of the frozen encoder in percent, and CKA",
    )


def missing_values(splits: Splits) -> dict | None:
    """{"images", "share"} of the training images that held `data.nodata`, as far as they were decoded in this run; of a
    stream, the share in the sample."""
    if splits.data.nodata is None:
        return None
    if isinstance(splits.train, MIMDataset):
        return splits.train.missing_values()
    return {"images": None, "share": round(splits.sample.missing, 6)}


def evaluate(run: PretrainRun) -> dict:
    """The accuracies of the frozen encoder, of the same encoder untrained, and of raw pixels."""
    started, limit = time.perf_counter(), run.data.max_eval_images or frozen.TRAIN_IMAGES
    train = frozen.subset(run.splits.train_eval, min(limit, frozen.TRAIN_IMAGES))
    test = frozen.subset(run.splits.test, min(limit, frozen.TEST_IMAGES))
    set_seed(run.arguments.seed)
    untrained = on_device(MIMForPreTraining(run.config).mim, run.model.device)
    images = f"{len(train[1]):,} training and {len(test[1]):,} test images"
    run.console.log(
        f"evaluating on {images}: k-NN and linear probe of the encoder, trained and untrained, and raw pixels"
    )
    with run.console.progress(IMAGES_DONE) as bar:
        task = bar.add_task("evaluating", total=3 * (len(train[1]) + len(test[1])))
        loader = {"workers": run.arguments.dataloader_num_workers, "advance": partial(bar.advance, task)}
        bf16 = bool(run.arguments.bf16)
        results: dict[str, dict] = {
            "trained": frozen.evaluate_encoder(run.model.mim, train, test, bf16, **loader),
            "untrained": frozen.evaluate_encoder(untrained, train, test, bf16, **loader),
            "raw_pixels": frozen.evaluate_raw_pixels(run.config, train, test, **loader),
        }
    results["evaluation"] = {
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "test": run.splits.note,
        "protocol": frozen.frozen_protocol(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return results


def results_table(results: dict) -> Table:
    sizes, rows = results["evaluation"], []
    for row in frozen_scores():
        if row.key in results["trained"]:
            values = [results["trained"][row.key], results["untrained"][row.key]]
            raw = f"{results['raw_pixels'][row.raw_key]:.1f}" if row.raw_key else ""
            rows.append((row.title, *(f"{value:.1f}" for value in values), raw))
    return make_table(
        ("", "trained", "untrained", "raw pixels"),
        rows,
        title="accuracy of the frozen encoder, percent",
        caption=f"{sizes['train_images']:,} training images, {sizes['test_images']:,} test images",
    )
