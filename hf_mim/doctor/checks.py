"""The command `doctor`: known faults of a checkpoint, each with what was seen and what to do."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hf_mim.doctor.weights import (
    STATES,
    Check,
    check_finite,
    check_positions,
    file_of,
    look_at_weights,
    read_weights,
)
from hf_mim.hub.errors import explain
from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.modeling_mim import MIMForPreTraining, MIMModel
from hf_mim.modeling.options import OptionError, pair
from hf_mim.modeling.target_discrete import DiscreteTokenTarget
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, load_model, resolve, untrained_twin
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.resources import explain_shortage
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits, load_splits
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.feature_statistics import (
    describe_explained,
    effective_rank,
    explained_share,
    nearly_constant,
)
from hf_mim.training.evaluation.readouts import NearestNeighbours
from hf_mim.training.evaluation.twin import BETTER, WORSE, chance, compare
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.trainer.monitor import COLLAPSED_RANK, COLLAPSED_SPREAD


IMAGES = 64  # that the predictions and the target are computed of
SAME = 1e-3  # the spread of predictions, as a share of their size or their target's spread, below which they are one
IGNORED = 1e-2  # the change of predictions by other visible pixels, as a share of their spread: 0.15 and more untrained
TOKENS_PER_CODE = 10  # fewer, and a living code may go unseen
DEAD = 0.5  # the share of dead codes from which on the codebook is at fault
WORK = 3e12  # parameters x tokens x images: how much k-NN may cost; a minute for a ViT-B on a few cores
FEWEST, MOST = 160, 1800  # images of k-NN, a third of them to test on
UNEXPLAINED = 0.03  # of the loss of the mean: a model that is better by less has learned little but the mean


def doctor(source: str, overrides: Sequence[str] = (), console: Console | RunConsole | None = None) -> int:
    """Prints what is wrong with a checkpoint.

    Args:
        source: a checkpoint of this project or a vision model of transformers, a folder, a URL or an id on the Hub.
        overrides: `data.dataset=...` and the like.

    Returns:
        1 where a fault was found, else 0.

    Raises:
        ValueError, OSError: the checkpoint or the data cannot be read.
    """
    console = RunConsole(console)
    base = {"data": own_data([source], chosen_data(overrides), console)}
    (data,) = recipes.read_sections(overrides, base, data=DataArguments)
    with console.status("looking at the weights") as status:
        checks = examine(source, data, status.update, console.log)
    console.show(table_of(checks))
    faults, unclear = ([check for check in checks if check.state == state] for state in ("fault", "unclear"))
    for check in checks:
        if check.remedy:
            console.show(Text.assemble((f"{check.name}: ", "bold"), check.remedy))
    found = f"{len(faults)} fault{'s' * (len(faults) > 1)} found" if faults else "no known fault found"
    found += f"; unclear: {', '.join(check.name for check in unclear)}" if unclear else ""
    console.log(f"{source}: {found}")
    return int(bool(faults))


def table_of(checks: list[Check]) -> Table:
    table = Table("looked at", "", "what was seen")
    table.columns[0].no_wrap = True
    for check in checks:
        table.add_row(Text(check.name), Text(check.state, STATES[check.state]), Text(check.seen))
    return table


def examine(source: str, data: DataArguments, say=lambda words: None, log=lambda words: None) -> list[Check]:
    """All checks, the quick ones first. Arguments and errors as of `doctor`.

    Args:
        say: is told what is going on.
        log: prints what is used of the data and what is left out.
    """
    if data.streaming:
        message = "doctor draws images at random: set data.streaming=false"
        raise RecipeError(message, "data.streaming")
    source = resolve(source)
    try:
        encoder, looked = load_encoder(source), look_at_weights(read_weights(source))
        model = load_model(source).eval() if looked.has_decoder and is_mim(source) else None
    except (ValueError, OSError) as error:
        if not (Path(source) / "config.json").is_file() or not is_damage(error):
            raise
        remedy = "copy it again from where it came from, or take an earlier checkpoint of its run"
        return [Check("checkpoint", "fault", str(error).partition("\n")[0], remedy)]
    checks = [check_finite(looked), *check_positions(looked)]
    untrained = bool(looked.norms) and all(looked.norms)
    if untrained:
        checks.append(Check("training", "note", f"none: the weights of all {len(looked.norms)} norms are exactly 1"))
    if looked.not_finite:
        return [*checks, Check("predictions and features", "skipped", "nothing can be computed with such weights")]
    say("reading images")
    splits = load_splits(data, encoder.config)
    log("\n".join([*splits.report, splits.sample.line]))
    pixels = check_pixels(splits)
    later = check_pretraining(model, splits, untrained, say)
    say("comparing the features with those of the untrained twin")
    later += check_features(encoder, splits, untrained)
    if pixels.state != "ok":  # what follows may follow from them
        for check in later:
            check.remedy = check.remedy and f"the pixels may be the cause; mend them first. Then: {check.remedy}"
    return [*checks, pixels, *later]


def is_damage(error: BaseException) -> bool:
    """Whether an error of loading is the checkpoint's: not an option or a plug-in that is not known here, a package
    that is not installed, no memory or network, or a file system that fails."""
    if explain(error) is not None or explain_shortage(error) is not None:
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OptionError | ImportError):
            return False
        if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
            return False
        cause = cause.__cause__
    return True


def check_pixels(splits: Splits) -> Check:
    """Whether there is something to see in the images."""
    if splits.sample.warning:
        message = splits.sample.warning.removeprefix("warning: ")
        return Check("pixels", "fault", *message.split(": ", 1))
    dataset = cast(MIMDataset, splits.train).without_augmentation()  # `examine` refuses streams
    (batch,) = dataset.__getitems__(draw_subset(len(dataset), IMAGES).tolist())
    if (problem := nearly_constant(batch.images)) is not None:
        return Check("pixels", "note", problem)
    return Check("pixels", "ok", f"{len(batch.images)} images, neither few levels nor nearly constant ones")


# ---- what pretraining left -----------------------------------------------------------------------------------------
def check_pretraining(model: MIMForPreTraining | None, splits: Splits, untrained: bool, say) -> list[Check]:
    """Target, codes, and what the decoder predicts."""
    names = ("target", "predictions", "decoder")
    if model is None:
        reason = "no decoder and target of hf_mim in this checkpoint"
        return [Check(f"{names[0]}, {names[1]}", "skipped", reason)]
    say("looking at target and predictions")
    pixel_values = pixels_of(splits.test or training_images(splits), model.config, IMAGES)
    checks = check_target(model, pixel_values, splits)
    if untrained:
        return [*checks, Check("predictions", "skipped", "nothing was trained")]
    return checks + check_predictions(model, pixel_values) + check_loss(model, pixel_values)


def is_mim(source: str) -> bool:
    path = file_of(source, "config.json")
    return path is not None and json.loads(Path(path).read_text()).get("model_type") == MIMConfig.model_type


def training_images(splits: Splits) -> MIMDataset:
    """The training images as they are, without crops and flips."""
    assert isinstance(splits.train, MIMDataset)  # streaming is refused before
    return splits.train.without_augmentation()


def pixels_of(dataset: MIMDataset, config: MIMConfig, count: int) -> Tensor:
    """(count, channels, height, width), normalised; always the same images."""
    batches = dataset.__getitems__(draw_subset(len(dataset), count).tolist())
    return MIMCollator(config)(batches)["pixel_values"]


@torch.no_grad()
def check_target(model: MIMForPreTraining, pixel_values: Tensor, splits: Splits) -> list[Check]:
    grid = model.mask_grid(*pixel_values.shape[2:])
    try:
        model.target.bind(model.mim.encoder)
        values = model.target.targets(pixel_values, grid)["patches"]
    except (ValueError, OSError) as error:  # a teacher or a codebook that is not at hand
        return [Check("target", "skipped", f"it cannot be computed: {str(error).strip().splitlines()[0]}")]
    flat = values.flatten(0, 1)
    of = f"{len(flat):,} tokens of {len(pixel_values)} images"
    varies = bool((flat != flat[0]).any()) if not flat.is_floating_point() else spread_and_size(flat)[0] > 0
    if flat.is_floating_point():
        spread, size = spread_and_size(flat)
        varies = spread > 1e-6 * size
        seen = f"{model.config.target}: varies by {spread:.3g} around a size of {size:.3g} over {of}"
    else:
        seen = f"{model.config.target}: {len(flat.unique())} different codes among {of}"
    remedy = (
        "there is nothing to learn: look at the images (are they all blank, or one and the same?), at the layers of "
        "the teacher (hf-mim teacher), and at model.target_config"
    )
    check = Check("target", "ok", seen) if varies else Check("target", "fault", f"{seen}: it is constant", remedy)
    target = model.target
    return [check, *(check_codes(model, target, splits, grid) if isinstance(target, DiscreteTokenTarget) else [])]


def check_codes(
    model: MIMForPreTraining, target: DiscreteTokenTarget, splits: Splits, grid: tuple[int, int]
) -> list[Check]:
    number, dataset = target.num_codes, training_images(splits)
    count = min(len(dataset), math.ceil(TOKENS_PER_CODE * number / math.prod(grid)), MOST)
    batches = pixels_of(dataset, model.config, max(count, IMAGES)).split(IMAGES)
    codes = torch.cat([target.targets(batch, grid)["patches"] for batch in batches])
    perplexity, dead = target.usage(codes)
    seen = f"{dead} of {number} are never used by {codes.numel():,} tokens; perplexity {perplexity:.1f}"
    if codes.numel() < TOKENS_PER_CODE * number:
        return [Check("codes", "skipped", f"{seen}, which is too few to tell")]
    if dead <= DEAD * number:
        return [Check("codes", "ok", seen)]
    remedy = "fit the codebook again on the features and images that it is used for (hf-mim codebook), or fewer codes"
    return [Check("codes", "fault", seen, remedy)]


def spread_and_size(values: Tensor) -> tuple[float, float]:
    """(count, dim) -> the root mean square of what they differ by from their mean, and of the values."""
    values = values.double()
    centred = values - values.mean(dim=0)
    return centred.square().mean().sqrt().item(), values.square().mean().sqrt().item()


@torch.no_grad()
def check_predictions(model: MIMForPreTraining, pixel_values: Tensor) -> list[Check]:
    """Whether predictions differ between tokens, and whether they follow what is visible."""
    grid = model.mask_grid(*pixel_values.shape[2:])
    mask = sample_masks(model.config, grid, [np.random.default_rng(0)]).flatten(0, -2)[:1]
    masks = mask.expand(len(pixel_values), -1)
    hidden = mask.view(1, 1, *grid)  # with masking `none` nothing is
    for axis, length in ((2, pixel_values.shape[2]), (3, pixel_values.shape[3])):
        hidden = hidden.repeat_interleave(length // hidden.shape[axis], dim=axis)
    # The visible pixels are those of the next image; the hidden ones, which must not matter, stay.
    exchanged = torch.where(hidden, pixel_values, pixel_values.roll(1, 0))
    before, after = (hidden_predictions(model, images, masks) for images in (pixel_values, exchanged))
    spread, size = spread_and_size(before.flatten(0, 1))
    kind = "hidden tokens" if model.hides_tokens else "tokens"
    of = f"{before.shape[1]} {kind} in each of {len(before)} images"
    seen = f"differ by {spread:.3g} around a size of {size:.3g} over {of}"
    remedy = (
        "the model has learned nothing but a mean: raise the learning rate or train longer, and compare the loss with "
        "that of predicting the mean (the log's watch_mean_loss)"
    )
    if not spread > SAME * size:
        return [Check("predictions", "fault", f"{seen}: all are the same", remedy)]
    change = (before - after).double().square().mean().sqrt().item()
    seen_change = f"predictions change by {change:.3g} with other visible pixels, and differ by {spread:.3g} in all"
    remedy = (
        "it predicts from the positions alone: check that it is given the encoded tokens (a decoder of your own), that "
        "the encoder's features are not all the same, and that some patches are visible at all (masking_config.ratio)"
    )
    ignores = not change > IGNORED * spread
    follows = Check("decoder", "fault" if ignores else "ok", seen_change, remedy if ignores else "")
    return [Check("predictions", "ok", seen), follows]


@torch.no_grad()
def check_loss(model: MIMForPreTraining, pixel_values: Tensor) -> list[Check]:
    """Whether the model predicts better than by a mean."""
    grid = model.mask_grid(*pixel_values.shape[2:])
    rngs = [np.random.default_rng(seed) for seed in range(len(pixel_values))]
    share = explained_share(model, pixel_values, sample_masks(model.config, grid, rngs))
    if share is None:
        return []
    seen = f"{describe_explained(model, share)}, on {len(pixel_values)} images"
    if share > UNEXPLAINED:
        return [Check("loss", "ok", seen)]
    remedy = "it has learned hardly more than the mean: train longer, or raise the learning rate"
    return [Check("loss", "unclear", f"{seen}: not distinguishable from predicting the mean", remedy)]


def hidden_predictions(model: MIMForPreTraining, pixel_values: Tensor, masks: Tensor) -> Tensor:
    """(batch, hidden, dim); of all tokens where the model hides none."""
    predicted = model(pixel_values, masks, return_loss=False).logits
    if predicted.shape[1] == masks.shape[1]:
        predicted = predicted[:, model.learned_tokens(masks)[0]]
    return predicted


# ---- the features --------------------------------------------------------------------------------------------------
def check_features(encoder: MIMModel, splits: Splits, untrained: bool) -> list[Check]:
    """Whether features differ between images, and whether training made them better."""
    count = images_for(encoder)
    labelled = [dataset for dataset in (splits.train_eval, splits.test) if dataset is not None]
    subsets = [frozen.subset(dataset, share) for dataset, share in zip(labelled, (2 * count // 3, count // 3))]
    images = [subset[0] for subset in subsets]
    if not images:
        dataset = training_images(splits)
        images = [torch.utils.data.Subset(dataset, draw_subset(len(dataset), count // 3).tolist())]
    features = [features_of(encoder, dataset) for dataset in images]
    if not all(torch.isfinite(value).all() for found in features for value in found.values()):
        remedy = "values overflow inside the encoder: go back to an earlier checkpoint, or compute in float32"
        return [Check("features", "fault", f"not finite on {len(images[0])} images", remedy)]
    if untrained:
        return [Check("features", "skipped", "nothing was trained: they are those of an untrained encoder")]
    checks = [check_collapse(features[-1])]
    if not labelled:
        return [*checks, Check("better than untrained", "skipped", f"k-NN needs labels: {splits.note}")]
    twin = [features_of(untrained_twin(encoder), dataset) for dataset in images]
    labels = [frozen.labels_of(subset) for subset in subsets]
    return [*checks, compare_with_twin(knn_of(features, labels), knn_of(twin, labels), len(images[1]))]


def images_for(encoder: MIMModel) -> int:
    tokens = math.prod(encoder.encoder.token_grid(*pair(encoder.config.image_size))) + encoder.encoder.num_prefix_tokens
    return int(min(MOST, max(FEWEST, WORK / (encoder.num_parameters() * tokens))))


def features_of(encoder: MIMModel, dataset) -> dict[str, Tensor]:
    return frozen.extract_features(encoder, frozen.pixel_loader(dataset, encoder.config))


def check_collapse(features: dict[str, Tensor]) -> Check:
    rank, spread = max((effective_rank(value) for value in features.values()), key=lambda found: min(found))
    dim = next(iter(features.values())).shape[1]
    seen = f"effective rank {rank:.1f} of {dim}, spread {spread:.2g} of their mean's norm"
    if rank >= COLLAPSED_RANK and spread >= COLLAPSED_SPREAD:
        return Check("features", "ok", seen)
    remedy = "all images look alike to it: a lower learning rate, a longer warm-up, or a target that moves more slowly"
    return Check("features", "fault", f"{seen}: they have collapsed", remedy)


def knn_of(features: list[dict[str, Tensor]], labels: list[Tensor]) -> float:
    """Percent, with the pooling that does best."""
    train, test = features
    sides = ((train[name], labels[0], test[name], labels[1]) for name in train)
    return max(frozen.readout_accuracy(NearestNeighbours, *side) for side in sides)


def compare_with_twin(trained: float, untrained: float, images: int) -> Check:
    """Better beyond the 95 percent interval of chance, at fault below three of its deviations, else unclear."""
    deviation, verdict = chance(trained, untrained, images), compare(trained, untrained, images)
    low, high = untrained - WORSE * deviation, untrained + BETTER * deviation
    verdicts = [f"at fault below {low:.1f}"] if low > 0 else []
    if compare(100, untrained, images) != "better":
        verdicts.append("no accuracy would tell it better")
    elif high < 100:
        verdicts.append(f"better above {high:.1f}")
    said = f" ({', '.join(verdicts)})" if verdicts else ""
    seen = f"k-NN {trained:.1f} %, its untrained twin {untrained:.1f} % on {images} images{said}"
    if verdict == "better":
        return Check("better than untrained", "ok", seen)
    if verdict == "unclear":
        remedy = (
            "train longer, or give more labelled images to tell by (data.dataset). A run of few steps looks so, and "
            "so does data whose classes raw pixels tell apart"
        )
        return Check("better than untrained", "unclear", f"{seen}: not distinguishable from untrained", remedy)
    remedy = (
        "training has destroyed more than it built. A run that has just begun looks so too: train it further. Else "
        "check that these images are normalised as in training (image_mean, image_std, channels), then lower the "
        "learning rate or take an earlier checkpoint"
    )
    return Check("better than untrained", "fault", seen, remedy)
