"""Fine-tuning a classifier: encoder, pooler and a linear head on labelled images."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.modeling_mim import MIMForImageClassification
from hf_mim.modeling.native_models import load_native
from hf_mim.modeling.options import OptionError, size_title
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import (
    checkpoint_errors,
    config_errors,
    load_checkpoint,
    load_config,
    model_type_of,
    resolve,
)
from hf_mim.training.commands.dry_run import dry_run
from hf_mim.training.commands.finetune_run import FinetuneRun
from hf_mim.training.common.console import make_table
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.data.augment import ClassificationCollator
from hf_mim.training.data.labelled import LabelledSplits, load_labelled_splits
from hf_mim.training.data.labels import balanced_weights
from hf_mim.training.data.processors import processor_for
from hf_mim.training.evaluation.classification import confusion_matrix
from hf_mim.training.evaluation.metrics import CLASSIFICATION, score_classes
from hf_mim.training.own_data import dataset_title
from hf_mim.training.plots.charts import draw_confusion
from hf_mim.training.trainer.advice import SHORT_FINETUNING
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.finetune_trainer import FinetuneTrainer
from hf_mim.training.trainer.lora import ADAPTER, add_lora, save_adapted


# Of a new head's weights, by optimizer: tiny ones as in MAE's release let predictions start out equal; but LAMB's steps
# are proportional to the weights, and a tiny head would hardly learn.
HEAD_STD = {None: 2e-5, "lamb": 0.02}
NEW = ("classifier.", "mim.pooler.", "mim.pooled_norm.")  # weights that a checkpoint may lack
METRIC = "accuracy"  # what the best checkpoint is the best in


def finetune_classification(run: FinetuneRun, preview: bool = False) -> Path:
    """Fine-tunes, evaluates and writes everything; see `finetune`."""
    config, state = classifier_config(run)
    splits = load_labelled_splits(run.data, config, run.arguments.seed)
    run.keep_pixels(config, splits.data)
    weights = class_weights(run.options.class_weights, splits)
    model = load_classifier(run, config, state, splits.classes)
    describe(run, model, splits)
    run.log_sample(splits.sample)
    if preview:
        return dry_run(run, partial(make_trainer, run, model, splits, weights))
    trainer = make_trainer(run, model, splits, weights)
    return run.execute(lambda: train(run, splits, trainer), partial(finish, run, splits))


def make_trainer(
    run: FinetuneRun, model: MIMForImageClassification, splits: LabelledSplits, weights: Tensor | None
) -> FinetuneTrainer:
    """The trainer of a classifier; `weights` are those of the classes."""
    config, encoder = model.config, model.mim.encoder
    run.model = add_lora(model, run.options, run.source) if run.options.lora else model
    run.arguments.metric_for_best_model = METRIC
    return FinetuneTrainer(
        model=run.model,
        args=run.arguments,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        data_collator=ClassificationCollator(config, run.options, len(splits.classes)),
        processing_class=processor_for(config, splits.sample),
        compute_loss_func=ClassificationLoss(weights, run.options.label_smoothing),
        compute_metrics=lambda output: score_classes(output.predictions, output.label_ids),
        options=run.options,
        encoder=encoder,
        console=run.console,
    )


def train(run: FinetuneRun, splits: LabelledSplits, trainer: FinetuneTrainer) -> FinetuneTrainer:
    run.train(trainer, partial(save, run, splits, trainer))
    return trainer


# ---- the model -----------------------------------------------------------------------------------------------------
def classifier_config(run: FinetuneRun) -> tuple[MIMConfig, dict | None]:
    """The config that a source gives with what the recipe changes in it, and the weights of a model of transformers;
    those of a checkpoint of this project are read with the model.

    Raises:
        CheckpointError: there is no model, or it is no image encoder.
        ValueError: the changes do not fit it.
    """
    changes = {key: value for key, value in run.recipe["model"].items() if key != "init_from"}
    build, state = config_builder(run.source)
    if run.options.drop_path is not None:
        rate = {"encoder_config": {"drop_path_rate": run.options.drop_path}}
        try:
            return build(recipes.merge(changes, rate)), state
        except OptionError as error:
            if error.option != "drop_path_rate":
                raise
        if run.options.drop_path:
            run.console.log("this encoder has no drop path: finetune.drop_path is left out")
    return build(changes), state


def config_builder(source: str) -> tuple[Callable[[dict], MIMConfig], dict | None]:
    """-> a function from changes to a `MIMConfig`, and the weights of a model of transformers or None."""
    kind, state = model_type_of(source), None
    native: dict = {}
    if kind != MIMConfig.model_type:
        with checkpoint_errors(source):
            native, state, _ = load_native(resolve(source))

    def build(changes: dict) -> MIMConfig:
        with config_errors():
            return MIMConfig(**recipes.merge(native, changes)) if native else load_config(source, changes)

    return build, state


def load_classifier(run: FinetuneRun, config: MIMConfig, state: dict | None, classes: list[str]):
    """A `MIMForImageClassification` for these classes. The pooler's weights are the checkpoint's where it has them; so
    are the head's if the checkpoint was trained for the very same classes.

    Raises:
        ValueError: the weights do not fit the config.
    """
    same_classes = list((config.id2label or {}).values()) == classes
    keeps_head = same_classes and "MIMForImageClassification" in (config.architectures or ())
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    if run.options.from_scratch or state is not None:
        model, keeps_head = MIMForImageClassification(config), False
        if state is not None and not run.options.from_scratch:
            with checkpoint_errors(run.source):
                model.mim.encoder.load_native_state(state)
    else:
        model = load_checkpoint(MIMForImageClassification, run.source, config, new=NEW, reshaped=("classifier.",))
    if not keeps_head:
        torch.nn.init.trunc_normal_(model.classifier.weight, std=HEAD_STD[run.options.optimizer])
        torch.nn.init.zeros_(model.classifier.bias)
    if model.mim.pooler is not None and not model.mim.pooler.apply_final_norm:
        model.mim.encoder.final_norm.requires_grad_(False)  # several processes would wait for gradients it never gets
    return model


# ---- the loss ------------------------------------------------------------------------------------------------------
def class_weights(choice: str | list[float] | None, splits: LabelledSplits) -> Tensor | None:
    """A weight per class (classes,), None where all count the same.

    Raises:
        RecipeError: there are not as many as classes, or they are no weights.
    """
    if choice is None:
        return None
    if choice == "balanced":
        return balanced_weights(splits.train.labels, len(splits.classes))
    if len(choice) != len(splits.classes):
        raise RecipeError(
            f"finetune.class_weights has {len(choice)} numbers for {len(splits.classes)} classes: "
            f"{', '.join(splits.classes[:12])}{', ...' if len(splits.classes) > 12 else ''}",
            "finetune.class_weights",
        )
    weights = torch.tensor(choice, dtype=torch.float32)
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        message = f"finetune.class_weights must be positive numbers or 0, not {choice}"
        raise RecipeError(message, "finetune.class_weights")
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
    config, options, plain = model.config, run.options, FinetuneArguments()
    test = "no test images" if splits.test is None else f"{len(splits.test):,} test images ({splits.notes['test']})"
    start = "from scratch" if options.from_scratch else f"from {run.source}"
    trained = "pooler and head" if options.freeze else "LoRA, pooler and head" if options.lora else "all weights"
    names = ("layer_decay", "drop_path", "mixup", "cutmix", "label_smoothing", "randaugment", "random_erasing", "ema")
    used = [f"{name} {getattr(options, name)}" for name in names if getattr(options, name) != getattr(plain, name)]
    run.describe(
        splits.report,
        splits.digest,
        data=f"{dataset_title(run.data)}, {len(splits.classes)} classes, {len(splits.train):,} training images at "
        f"{size_title(config.image_size)}, {len(splits.validation):,} validation images "
        f"({splits.notes['validation']}), {test}",
        model=f"{config.encoder} encoder {start}, {config.pooler} pooler, "
        f"{model.num_parameters() / 1e6:.2f} M parameters",
        fine_tuning=", ".join([trained, *used]),
        training=run.describe_training(),
    )
    run.describe_length(splits.train, SHORT_FINETUNING)


def save(run: FinetuneRun, splits: LabelledSplits, trainer: FinetuneTrainer) -> None:
    """Writes weights, config and processor: the averaged ones where there is an average."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.processing_class = processor_for(model.config, splits.sample_seen())
    if not isinstance(model, PeftModel):
        run.save_model(trainer)
    elif trainer.is_world_process_zero():
        with trainer.averaged():
            save_adapted(model, run.folder)
        trainer.processing_class.save_pretrained(run.folder)


def finish(run: FinetuneRun, splits: LabelledSplits, trainer: FinetuneTrainer, seconds: float) -> None:
    """Evaluates what was saved, in every process, and writes metrics.json and confusion.png in one."""
    results, failure = run.try_evaluation(lambda: evaluate(run, splits, trainer))
    if not trainer.is_world_process_zero():
        return
    best = trainer.state.best_global_step if run.arguments.load_best_model_at_end else None
    chosen = {"best_step": best, "chosen_by": f"validation {METRIC}"}
    run.write_metrics(trainer, seconds, {"classes": splits.classes, **results, **chosen}, splits.bad_images())
    if failure is not None:
        raise failure
    run.console.show(results_table(results))
    folder = shlex.quote(run.location)
    run.log_next_steps(
        f"pictures: {folder}/confusion.png, {folder}/loss.png",
        *([f"the adapter alone: {folder}/{ADAPTER}"] if run.options.lora else []),
        f"next, share it: hf-mim push {folder} me/my-model",
    )


def evaluate(run: FinetuneRun, splits: LabelledSplits, trainer: FinetuneTrainer) -> dict:
    """{"validation", "test": scores}, in every process; draws confusion.png in one."""
    results: dict = {}
    for name, dataset in {"validation": splits.validation, "test": splits.test}.items():
        if dataset is None:
            continue
        run.console.log(f"evaluating on {len(dataset):,} {name} images")
        predictions, labels = trainer.predict_arrays(dataset)
        rounded = {key: round(value, 5) for key, value in score_classes(predictions, labels).items()}
        results[name] = {"images": len(dataset), "from": splits.notes[name], **rounded}
        last, matrix = name, confusion_matrix(predictions, labels)
    results[last]["confusion"] = matrix.tolist()
    if trainer.is_world_process_zero():
        draw_confusion(matrix, splits.classes, run.folder / "confusion.png", run.arguments.figures)
    return results


def results_table(results: dict) -> Table:
    splits = [name for name in ("validation", "test") if name in results]
    return make_table(
        ("", *(f"{name}, {results[name]['images']:,} images" for name in splits)),
        [
            (metric.title, *(f"{results[name][key]:.1f}" for name in splits))
            for key, metric in CLASSIFICATION.items()
            if key in results["validation"]
        ],
        title="the fine-tuned model, percent",
        caption="validation chose the checkpoint; test did not",
    )
