"""The command `finetune` with `task=segmentation`: from an encoder and images with masks to a UperNet."""

import math
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import SegformerImageProcessor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.image_processing_mim import MIMImageProcessor
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.modeling_upernet import MIMUperNet, MIMUperNetConfig
from hf_mim.modeling.options import OptionError, Size, pair, size_title
from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.commands.dry_run import dry_run
from hf_mim.training.commands.finetune_run import FinetuneRun, set_up
from hf_mim.training.common.console import RunConsole, make_table
from hf_mim.training.common.errors import CheckpointError, RecipeError
from hf_mim.training.data.masked import MaskedSplits, load_masked_splits
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.data.processors import BICUBIC, own_processor
from hf_mim.training.data.sample import PixelSample, fits_stock_processor
from hf_mim.training.data.scenes import SIZE
from hf_mim.training.data.segmentation import MaskedDataset, SegmentationCollator
from hf_mim.training.evaluation.iou import ious, predict_mask
from hf_mim.training.evaluation.metrics import SEGMENTATION, mask_intervals, score_masks
from hf_mim.training.own_data import SCENES, dataset_title
from hf_mim.training.plots.pictures import draw_masks
from hf_mim.training.trainer.advice import SHORT_FINETUNING
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments
from hf_mim.training.trainer.segmentation_trainer import SegmentationTrainer


DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)  # of the blocks whose maps UperNet gets: 4, 6, 8 and 12 of 12, as BEiT and MAE choose
SHOWN = 8  # images in the picture
# Of `FinetuneArguments`, what has no meaning here.
ELSEWHERE = ("mixup", "cutmix", "label_smoothing", "randaugment", "random_erasing", "class_weights", "lora")


def finetune_segmentation(
    source: str,
    recipe: dict,
    console: Console | RunConsole | None = None,
    paper: str = "",
    preview: bool = False,
) -> Path:
    """Fine-tunes an encoder inside a UperNet. Arguments, result and errors as of `finetune`."""
    options = FinetuneArguments(**recipe["finetune"])
    check_options(options)
    others = sorted(set(recipe["model"]) - {"init_from", "image_size"})
    if others:
        message = f"segmentation takes model.image_size only, not model.{others[0]}"
        raise RecipeError(message, f"model.{others[0]}")
    image_size = recipe["model"].get("image_size")
    run = set_up(source, recipe, console, paper)
    encoder = load_encoder(source)
    size = input_size(encoder, image_size, run.data.dataset is None)
    recipe["model"]["image_size"] = list(size)
    splits = load_masked_splits(run.data, encoder.config, options.classes, run.console, run.arguments.seed)
    run.keep_pixels(encoder.config, splits.data)
    batch = min(run.arguments.train_batch_size, len(splits.train))
    run.model = model = make_segmenter(encoder, options, splits.classes, batch)
    describe(run, model, splits, size)
    run.log_sample(splits.sample)
    if preview:
        return dry_run(run, partial(make_trainer, run, model, splits, size))
    trainer = make_trainer(run, model, splits, size)
    return run.execute(lambda: train(run, trainer), partial(write_results, run, splits))


def train(run: FinetuneRun, trainer: SegmentationTrainer) -> SegmentationTrainer:
    run.train(trainer, partial(run.save_model, trainer))
    return trainer


# ---- before --------------------------------------------------------------------------------------------------------
def check_options(options: FinetuneArguments) -> None:
    """Raises:
    RecipeError: an option is set that only classification has.
    """
    for name in ELSEWHERE:
        if getattr(options, name) != getattr(FinetuneArguments(), name):
            message = f"finetune.{name} is for task=classification: leave it out for segmentation"
            raise RecipeError(message, f"finetune.{name}")


def input_size(encoder: MIMModel, choice: Size | None, composed: bool) -> tuple[int, int]:
    """The (height, width) that images are brought to: as chosen; for the composed scenes their own, if the encoder's
    cells fill it; else that of the encoder's config.

    Raises:
        ValueError: the encoder's cells do not fill it, or its tokens have no place in the image.
    """
    size = pair(encoder.config.image_size)
    if choice is not None:
        size = pair(choice)
        check_grid(encoder, size)
    elif composed:
        try:
            encoder.encoder.token_grid(*SIZE)
            size = SIZE
        except ValueError:
            pass
    check_grid(encoder, size)
    return size


@torch.no_grad()
def check_grid(encoder: MIMModel, size: tuple[int, int]) -> None:
    """Raises:
    CheckpointError: there is not one token for every cell of an image of this size.
    """
    rows, cols = encoder.encoder.token_grid(*size)
    tokens = encoder(torch.zeros(1, encoder.config.num_channels, *size)).last_hidden_state
    count = tokens.shape[1] - encoder.encoder.num_prefix_tokens
    if tokens.ndim != 3 or count != rows * cols or rows * cols < 2:
        raise CheckpointError(
            f"this encoder has no patch tokens: {count} for an image of {size[0]}x{size[1]}, where segmentation needs "
            "one for every cell of a grid"
        )


def make_segmenter(encoder: MIMModel, options: FinetuneArguments, classes: list[str], batch: int) -> MIMUperNet:
    """A UperNet over an encoder, with the encoder's weights unless `options.from_scratch`.

    Args:
        batch: images in a step on one device. With a single one, the pyramid pooling has no map of one pixel: batch
            norms of UperNet need two values.

    Raises:
        ValueError: the encoder has too few stages, or no drop path to set.
    """
    fields = {k: v for k, v in encoder.config.to_dict().items() if k not in ("out_features", "out_indices")}
    if options.drop_path is not None:
        fields["encoder_config"] = {**fields["encoder_config"], "drop_path_rate": options.drop_path}
    names, factors = choose_stages(encoder, options.pyramid)
    try:
        backbone = MIMConfig.from_dict({**fields, "out_features": names, "feature_pyramid": factors})
    except OptionError as error:
        if error.option != "drop_path_rate":
            raise
        message = "this encoder has no drop path: set finetune.drop_path=null"
        raise RecipeError(message, "finetune.drop_path") from None
    config = MIMUperNetConfig(
        backbone_config=backbone,
        hidden_size=options.head_size,
        pool_scales=[1, 2, 3, 6] if batch > 1 else [2, 3, 6],
        use_auxiliary_head=len(names) > 2,  # it reads the third map
        auxiliary_channels=max(1, options.head_size // 2),
        loss_ignore_index=IGNORE,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    model = MIMUperNet(config)
    if not options.from_scratch:
        model.backbone.mim.load_state_dict(encoder.state_dict())
    if factors is None:  # the last norm (Swin's) is no part of such stages, and DDP wants no parameter without gradient
        model.backbone.mim.encoder.final_norm.requires_grad_(False)
    return model.train()


def choose_stages(encoder: MIMModel, factors: list[float] | None) -> tuple[list[str], list[float] | None]:
    """The stages whose maps UperNet gets, and the factors of the pyramid over them.

    An encoder of one stride gives the maps of four blocks, `DEPTHS`, scaled to strides 4, 8, 16 and 32 unless
    `factors` says otherwise; one of several strides the last map of each width, at most four, as they are.

    Raises:
        ValueError: there are fewer than four maps of one stride, or fewer than two of several.
    """
    names, widths = encoder.encoder.stage_names, encoder.encoder.num_features
    if len(set(widths)) > 1 or encoder.encoder.strides is not None:
        if factors is not None:
            message = "finetune.pyramid is for encoders of one stride; the stages of this one have several"
            raise RecipeError(message, "finetune.pyramid")
        last = [name for name, width, after in zip(names, widths, [*widths[1:], None]) if width != after][-4:]
        if len(last) < 2:
            raise CheckpointError("this encoder has a single map, of one stride; UperNet needs maps of several")
        return last, None
    depth = len(names) - 1
    chosen = sorted({round(depth * share) for share in DEPTHS})
    chosen = chosen if len(chosen) == 4 else list(range(depth + 1))[-4:]
    if len(chosen) < 4:
        raise CheckpointError(f"UperNet takes the maps of four blocks, and this encoder has {depth} blocks; 3 would do")
    if factors is None:
        cell = pair(encoder.config.image_size)[0] / encoder.encoder.token_grid(*pair(encoder.config.image_size))[0]
        finest = 2.0 ** round(math.log2(cell / 4))
        factors = [finest, finest / 2, finest / 4, finest / 8]
    return [names[i] for i in chosen], factors


def describe(run: FinetuneRun, model: MIMUperNet, splits: MaskedSplits, size: tuple[int, int]) -> None:
    inside, whole = model.backbone.mim.num_parameters() / 1e6, model.num_parameters() / 1e6
    background = int(splits.shares.argmax())
    counts = [f"{len(split):,}" for split in (splits.train, splits.validation, splits.test)]
    run.describe(
        splits.report,
        splits.digest,
        data=f"{dataset_title(run.data, SCENES)}, {counts[0]} training, {counts[1]} validation, {counts[2]} test "
        f"images at {size_title(size)}, {len(splits.classes)} classes; "
        f"{100 * splits.shares[background]:.0f} percent of the pixels are {splits.classes[background]!r}",
        model=f"{model.backbone.config.encoder} encoder, {inside:.2f} M parameters, with UperNet {whole:.2f} M; "
        f"maps of {', '.join(model.backbone.out_features)}",
        training=run.describe_training(),
    )
    whole_batch = run.arguments.train_batch_size * run.arguments.world_size
    run.describe_length(splits.train, SHORT_FINETUNING, drop_last=len(splits.train) >= whole_batch)


# ---- training ------------------------------------------------------------------------------------------------------
def make_trainer(run: FinetuneRun, model: MIMUperNet, splits: MaskedSplits, size: tuple[int, int]):
    arguments, config = run.arguments, model.backbone.config
    arguments.metric_for_best_model = run.recipe["training"].get("metric_for_best_model", "mean_iou")
    flip = run.data.horizontal_flip
    return SegmentationTrainer(
        model=model,
        args=arguments,
        options=run.options,
        encoder=model.backbone.mim.encoder,
        train_dataset=MaskedDataset(splits.train, config, size, True, arguments.seed, flip),
        eval_dataset=MaskedDataset(splits.validation, config, size, False),
        data_collator=SegmentationCollator(config),
        compute_metrics=lambda output: score_masks(output.predictions),
        processing_class=segmentation_processor(config, size, splits.sample),
        console=run.console,
    )


def segmentation_processor(
    config: MIMConfig, size: tuple[int, int], sample: PixelSample | None = None
) -> SegformerImageProcessor | MIMImageProcessor:
    """An image processor, a stock one where that can do it, that gives a segmenter's `pixel_values`, and whose
    `post_process_semantic_segmentation(outputs, target_sizes)` gives masks."""
    if not fits_stock_processor(sample, config):
        return own_processor(config, size, eval_crop="squeeze")
    return SegformerImageProcessor(
        size={"height": size[0], "width": size[1]},
        resample=BICUBIC,
        image_mean=list(config.image_mean or ()),
        image_std=list(config.image_std or ()),
        do_reduce_labels=False,
        do_convert_rgb=True if config.num_channels == 3 else None,
    )


# ---- after ---------------------------------------------------------------------------------------------------------
def write_results(run: FinetuneRun, splits: MaskedSplits, trainer: SegmentationTrainer, seconds: float) -> None:
    """Evaluates on the test images, writes metrics.json and segmentation.png, and prints the table.

    Raises:
        EvaluationError: the evaluation failed; what else is known is written.
    """
    trained_on, model = cast(MaskedDataset, trainer.train_dataset), cast(MIMUperNet, trainer.model)
    dataset = MaskedDataset(splits.test, trained_on.config, trained_on.size, False)
    run.console.log(f"evaluating on {len(dataset):,} test images")
    results, failure = run.try_evaluation(lambda: evaluate(splits, dataset, trainer))
    if not trainer.is_world_process_zero():
        return
    known = {"best_validation_mean_iou": trainer.state.best_metric, "pretrained": not run.options.from_scratch}
    run.write_metrics(trainer, seconds, results | known, splits.bad_images())
    if failure is not None:
        raise failure
    with trainer.averaged():
        draw_examples(model, dataset, splits.classes).save(run.folder / "segmentation.png")
    run.console.show(results_table(results))
    run.log_next_steps()


def evaluate(splits: MaskedSplits, dataset: MaskedDataset, trainer: SegmentationTrainer) -> dict:
    """The scores on the test images, in every process."""
    counts, _ = trainer.predict_arrays(dataset)
    return {
        **score_masks(counts),
        "intervals": mask_intervals(counts),
        "iou": dict(zip(splits.classes, [None if np.isnan(v) else 100 * v for v in ious(counts.sum(axis=0))])),
        "evaluation": {"test_images": len(dataset), "test": splits.note},
    }


@torch.no_grad()
def draw_examples(model: MIMUperNet, dataset: MaskedDataset, classes: list[str]):
    """The picture of the first images of a data set: their masks, and what the model finds."""
    model.eval()
    originals = [dataset.source[index] for index in range(min(SHOWN, len(dataset)))]
    collate, predictions = SegmentationCollator(dataset.config), []
    for index, (_, mask) in enumerate(originals):
        logits = model(collate([dataset[index]])["pixel_values"].to(model.device)).logits
        predictions.append(predict_mask(logits[0], mask.shape).cpu().numpy())
    images, masks = map(list, zip(*originals, strict=True))
    return draw_masks(images, masks, {"predicted": predictions}, classes)


def results_table(results: dict) -> Table:
    rows = []
    for key, metric in SEGMENTATION.items():
        low, high = results["intervals"][key]
        rows.append((metric.title, f"{results[key]:.1f}", f"{low:.1f} to {high:.1f}"))
    for name, value in results["iou"].items():
        rows.append((f"IoU, {name}", "-" if value is None else f"{value:.1f}", ""))
    return make_table(
        ("", "value", "interval"),
        rows,
        title="segmentation, percent",
        caption=f"{results['evaluation']['test_images']:,} test images; intervals over images, 95 percent",
    )
