"""Fine-tuning a classifier: encoder, pooler and a linear head on labelled images."""

import shlex
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_native import load_native
from hf_mim.modeling.modeling_mim import MIMForImageClassification
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_config, model_type_of, resolve
from hf_mim.training.commands.finetune import FinetuneRun, train, write_results
from hf_mim.training.data.augment import ClassificationCollator
from hf_mim.training.data.labelled import LabelledSplits, balanced_weights, load_labelled_splits
from hf_mim.training.data.pretraining import processor_for
from hf_mim.training.evaluation import classification as evaluation
from hf_mim.training.run import copied, lookout, place_of
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer
from hf_mim.training.trainer.lora import ADAPTER, add_lora, save_adapted


# Of a new head's weights, by optimizer: tiny ones as in MAE's release let predictions start out equal; but LAMB's steps
# are proportional to the weights, and a tiny head would hardly learn.
HEAD_STD = {None: 2e-5, "lamb": 0.02}
METRIC = "accuracy"  # what the best checkpoint is the best in


def finetune_classification(run: FinetuneRun) -> Path:
    """Fine-tunes, evaluates and writes everything; see `finetune`."""
    config, state = classifier_config(run)
    splits = load_labelled_splits(run.data, config, run.arguments.seed)
    weights = class_weights(run.options.class_weights, splits)
    model = load_classifier(run, config, state, splits.classes)
    encoder = model.mim.encoder
    describe(run, model, splits)
    if run.options.lora:
        model = add_lora(model, run.options, run.source)
    run.arguments.metric_for_best_model = METRIC
    trainer = FinetuneTrainer(
        model=model,
        args=run.arguments,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        data_collator=ClassificationCollator(config, run.options, len(splits.classes)),
        processing_class=processor_for(config),
        compute_loss_func=ClassificationLoss(weights, run.options.label_smoothing),
        compute_metrics=lambda found: evaluation.score(found.predictions, found.label_ids),
        options=run.options,
        encoder=encoder,
        console=run.console,
    )
    started = time.perf_counter()
    with copied(run):
        train(run, trainer, partial(save, run, trainer))
        with lookout(run, "finetune"):
            finish(run, trainer, splits, time.perf_counter() - started)
            trainer.accelerator.wait_for_everyone()
    return run.folder


# ---- the model -----------------------------------------------------------------------------------------------------
def classifier_config(run: FinetuneRun) -> tuple[MIMConfig, dict | None]:
    """The config that a source gives with what the recipe changes in it, and the weights of a model of transformers;
    those of a checkpoint of this project are read with the model.

    Raises:
        ValueError: there is no model, it is no image encoder, or the changes do not fit it.
    """
    changes = {key: value for key, value in run.recipe["model"].items() if key != "init_from"}
    build, state = config_builder(run.source)
    if run.options.drop_path is not None:
        rate = {"encoder_config": {"drop_path_rate": run.options.drop_path}}
        try:
            return build(recipes.merge(changes, rate)), state
        except ValueError as error:
            if "drop_path_rate" not in str(error):
                raise
        if run.options.drop_path:
            run.console.print("this encoder has no drop path: finetune.drop_path is left out", highlight=False)
    return build(changes), state


def config_builder(source: str):
    """-> a function from changes to a `MIMConfig`, and the weights of a model of transformers or None."""
    kind = model_type_of(source)
    if kind == MIMConfig.model_type:
        return partial(strict, partial(load_config, source)), None
    try:
        native, state = load_native(resolve(source))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{source} holds {kind!r}, which cannot be used as an image encoder: {error}") from error
    return partial(strict, lambda changes: MIMConfig(**recipes.merge(native, changes))), state


def strict(build, changes: dict) -> MIMConfig:
    try:
        return build(changes)
    except StrictDataclassError as error:  # no ValueError of its own
        raise ValueError(" ".join(str(error).split())) from None


def load_classifier(run: FinetuneRun, config: MIMConfig, state: dict | None, classes: list[str]):
    """A `MIMForImageClassification` for these classes. The pooler's weights are the checkpoint's where it has them; so
    are the head's if the checkpoint was trained for the very same classes.

    Raises:
        ValueError: the weights do not fit the config.
    """
    keeps_head = list(config.id2label.values()) == classes and "MIMForImageClassification" in (
        config.architectures or ()
    )
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if run.options.from_scratch or state is not None:
        model, keeps_head = MIMForImageClassification(config), False
        if not run.options.from_scratch:
            try:
                model.mim.encoder.load_native_state(state)
            except RuntimeError as error:
                raise misfit(run.source, str(error)) from None
    else:
        model = load_checkpoint(run.source, config)
    if not keeps_head:
        torch.nn.init.trunc_normal_(model.classifier.weight, std=HEAD_STD[run.options.optimizer])
        torch.nn.init.zeros_(model.classifier.bias)
    if not model.mim.pooler.apply_final_norm:
        model.mim.encoder.final_norm.requires_grad_(False)  # several processes would wait for gradients it never gets
    return model


def load_checkpoint(source: str, config: MIMConfig) -> MIMForImageClassification:
    try:
        model, found = MIMForImageClassification.from_pretrained(
            resolve(source), config=config, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except RuntimeError as error:
        raise misfit(source, str(error)) from None
    new = ("classifier.", "mim.pooler.", "mim.pooled_norm.")
    other = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in found["mismatched_keys"]]
    lost = [f"{name} has another shape" for name in other if not name.startswith("classifier.")]
    lost += [f"{name} is missing" for name in found["missing_keys"] if not name.startswith(new)]
    if lost:
        raise misfit(source, sorted(lost)[0])
    return model


def misfit(source: str, reason: str) -> ValueError:
    line = next((line.strip() for line in reason.splitlines() if "mismatch" in line.lower()), reason)
    return ValueError(f"the weights of {source} do not fit this configuration: {line}")


# ---- the loss ------------------------------------------------------------------------------------------------------
def class_weights(wanted: str | list[float] | None, splits: LabelledSplits) -> Tensor | None:
    """A weight per class (classes,), None where all count the same.

    Raises:
        ValueError: there are not as many as classes, or they are no weights.
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        return balanced_weights(splits.train.labels, len(splits.classes))
    if len(wanted) != len(splits.classes):
        raise ValueError(
            f"finetune.class_weights has {len(wanted)} numbers for {len(splits.classes)} classes: "
            f"{', '.join(splits.classes[:12])}{', ...' if len(splits.classes) > 12 else ''}"
        )
    weights = torch.tensor(wanted, dtype=torch.float32)
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"finetune.class_weights must be positive numbers or 0, not {wanted}")
    return weights


class ClassificationLoss:
    """Cross entropy, as `compute_loss_func` of a `Trainer`: the mean over all images of an optimizer step, accumulated
    and on all processes; in evaluation that of the batch, without weights and smoothing.

    Args:
        weights: (classes,), of each class in the target: -sum_c weight_c target_c log p_c, divided by the number of
            images, not by the sum of their weights.
        smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, weights: Tensor | None, smoothing: float):
        self.weights, self.smoothing = weights, smoothing

    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """labels (batch,), or shares of the classes (batch, classes); `num_items_in_batch` counts their entries."""
        logits = outputs["logits"].float()
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        images = num_items_in_batch / (labels.shape[1] if labels.ndim == 2 else 1)
        targets = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1]).float()
        weights = None if self.weights is None else self.weights.to(logits.device)
        loss = F.cross_entropy(logits, targets, weights, label_smoothing=self.smoothing, reduction="sum")
        return loss / images


# ---- what is written and said --------------------------------------------------------------------------------------
def describe(run: FinetuneRun, model: MIMForImageClassification, splits: LabelledSplits) -> None:
    config, arguments, options = model.config, run.arguments, run.options
    height, width = pair(config.image_size)
    tested = "none to test on" if splits.test is None else f"{len(splits.test):,} to test on ({splits.notes['test']})"
    how = "from scratch" if options.from_scratch else f"from {run.source}"
    what = "pooler and head" if options.freeze else "LoRA, pooler and head" if options.lora else "all weights"
    names = ("layer_decay", "drop_path", "mixup", "cutmix", "label_smoothing", "randaugment", "random_erasing", "ema")
    plain = FinetuneArguments()
    used = [f"{name} {getattr(options, name)}" for name in names if getattr(options, name) != getattr(plain, name)]
    where = f"{arguments.device.type}, {'bf16' if arguments.bf16 else 'float32'}"
    where += f", {arguments.world_size} processes" if arguments.world_size > 1 else ""
    where += f", {torch.get_num_threads()} threads" if arguments.device.type == "cpu" else ""
    run.console.print(
        f"data: {run.data.dataset or 'Fashion-MNIST subset (shipped)'}, {len(splits.classes)} classes, "
        f"{len(splits.train):,} training images at {height}x{width}, {len(splits.validation):,} to choose the best by "
        f"({splits.notes['validation']}), {tested}\n"
        f"model: {config.encoder} encoder {how}, {config.pooler} pooler, {model.num_parameters() / 1e6:.2f} M "
        f"parameters\n"
        f"fine-tuning: {what}{', ' if used else ''}{', '.join(used)}\n"
        f"training: total batch {arguments.total_batch_size}, learning rate {arguments.learning_rate:.3g}, on {where}",
        highlight=False,
        soft_wrap=True,
    )


def save(run: FinetuneRun, trainer: FinetuneTrainer) -> None:
    """Writes weights, config and processor: the averaged ones where there is an average."""
    with trainer.averaged():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, PeftModel):
            trainer.save_model(str(run.folder))  # in every process: sharded weights are gathered
        elif trainer.is_world_process_zero():
            save_adapted(model, run.folder)
            trainer.processing_class.save_pretrained(run.folder)
    if trainer.is_world_process_zero():
        (run.folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same to people


def finish(run: FinetuneRun, trainer: FinetuneTrainer, splits: LabelledSplits, seconds: float) -> None:
    """Evaluates what was saved, in every process, and writes metrics.json and confusion.png in one."""
    results = {"classes": splits.classes}
    shown = {"validation": splits.validation, "test": splits.test}
    for name, dataset in shown.items():
        if dataset is None:
            continue
        found = trainer.predict(dataset)
        results[name] = {
            "images": len(dataset),
            "from": splits.notes[name],
            **{key: round(value, 5) for key, value in evaluation.score(found.predictions, found.label_ids).items()},
        }
        matrix = evaluation.confusion_matrix(found.predictions, found.label_ids)
    if not trainer.is_world_process_zero():
        return
    results[list(results)[-1]]["confusion"] = matrix.tolist()
    evaluation.draw_confusion(matrix, splits.classes, run.folder / "confusion.png")
    best = trainer.state.best_global_step if run.arguments.load_best_model_at_end else None
    write_results(run, trainer, seconds, results | {"best_step": best, "chosen_by": f"validation {METRIC}"})
    run.console.print(results_table(results))
    say_what_next(run)


def results_table(results: dict) -> Table:
    table = Table(title="the fine-tuned model, percent", caption="validation chose the checkpoint; test did not")
    titles = {"accuracy": "accuracy", "top5_accuracy": "top-5 accuracy", "f1_macro": "F1, mean over the classes"}
    columns = [name for name in ("validation", "test") if name in results]
    table.add_column("")
    for name in columns:
        table.add_column(f"{name}, {results[name]['images']:,} images", justify="right")
    for key, title in titles.items():
        if key in results["validation"]:
            table.add_row(title, *(f"{results[name][key]:.1f}" for name in columns))
    return table


def say_what_next(run: FinetuneRun) -> None:
    folder = shlex.quote(place_of(run))
    lines = [f"pictures: {folder}/confusion.png, {folder}/loss.png"]
    if run.options.lora:
        lines.append(f"the adapter alone: {folder}/{ADAPTER}")
    lines += [f"next, share it: hf-mim push {folder} me/my-model", f"output folder: {folder}"]
    for line in lines:
        run.console.print(line, highlight=False, soft_wrap=True)
