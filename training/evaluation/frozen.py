"""The features of a frozen encoder over whole data sets, and their scores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.splits import draw_labelled
from hf_mim.training.evaluation.metrics import READOUTS, frozen_scores, readout_protocol
from hf_mim.training.evaluation.readouts import percent


# At most so many images are used, drawn at random but always the same; what was used stands in metrics.json.
TRAIN_IMAGES, TEST_IMAGES = 10_000, 5_000
RAW_SIDE = 32  # raw pixels are averaged down to this height and width: beyond, their linear probe costs gigabytes


def frozen_protocol() -> dict[str, str]:
    """What the accuracies mean, in the words of metrics.json and the model card."""
    raw = f"Raw pixels: the normalised images, averaged down to at most {RAW_SIDE} pixels a side."
    return {**readout_protocol(), "raw_pixels": raw}


def subset(dataset, most: int):
    """The data set, or `most` images of it drawn with a fixed seed; and their labels (count,)."""
    chosen = draw_labelled(dataset.labels.numpy(), most).tolist()
    return torch.utils.data.Subset(dataset, chosen), dataset.labels[chosen]


def labels_of(pair) -> Tensor:
    """The labels of what was fetched, once it was: an image that cannot be decoded is replaced by another."""
    dataset, labels = pair
    if isinstance(dataset, torch.utils.data.Subset) and isinstance(dataset.dataset, MIMDataset):
        return dataset.dataset.true_labels(list(dataset.indices))
    return labels


def pixel_loader(dataset, config: MIMConfig, batch_size: int = 64, workers: int = 0, advance=lambda images: None):
    """Batches of `pixel_values` (batch, channels, height, width), in order; `advance` is told how many were fetched."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=MIMCollator(config), num_workers=workers)
    for batch in loader:
        yield batch["pixel_values"]
        advance(len(batch["pixel_values"]))


@torch.inference_mode()
def extract_features(model, loader, bf16: bool = False) -> dict[str, Tensor]:
    """Features of a frozen encoder.

    Args:
        model: a `MIMModel`; it is put into eval mode.
        loader: batches of `pixel_values` (batch, channels, height, width).
        bf16: compute in bfloat16 where autocast does.

    Returns:
        "mean": (images, dim), the mean of the patch tokens; "cls": (images, dim), where there is a class token.
    """
    model.eval()
    prefix, has_cls = model.encoder.num_prefix_tokens, model.encoder.has_cls_token
    vectors: dict[str, list[Tensor]] = {"mean": [], **({"cls": []} if has_cls else {})}
    for pixel_values in loader:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            tokens = model(pixel_values.to(model.device)).last_hidden_state
        vectors["mean"].append(tokens[:, prefix:].float().mean(1).cpu())
        if has_cls:
            vectors["cls"].append(model.encoder.class_token(tokens).float().cpu())
    return {pooling: torch.cat(parts) for pooling, parts in vectors.items()}


def raw_pixels(loader) -> Tensor:
    """Normalised pixels themselves as features, (images, channels * height * width), at most `RAW_SIDE` a side."""
    pixels = []
    for batch in loader:
        rows, cols = (min(RAW_SIDE, side) for side in batch.shape[-2:])
        pixels.append(F.adaptive_avg_pool2d(batch, (rows, cols)).flatten(1))
    return torch.cat(pixels)


def readout_accuracy(fit, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy in percent of a readout, fitted to train (images, dim), for test (images, dim).

    Args:
        fit: `NearestNeighbours` or `LinearProbe`.
        train_labels, test_labels: class numbers (images,).
    """
    return percent(fit(train.float(), train_labels)(test.float()).argmax(1), test_labels)


def evaluate_encoder(model, train, test, bf16: bool = False, **loader) -> dict[str, float]:
    """The accuracies of a frozen encoder, each image encoded once.

    Args:
        model: a `MIMModel`.
        train, test: pairs of a data set and its labels, as of `subset`.
        loader: arguments of `pixel_loader`.

    Returns:
        {"knn_mean", "linear_mean", "knn_cls", "linear_cls"}, percent; without the last two if there is no class token.
    """
    loaders = [pixel_loader(dataset, model.config, **loader) for dataset, _ in (train, test)]
    fitted, tested = (extract_features(model, pixels, bf16) for pixels in loaders)
    labels, test_labels = labels_of(train), labels_of(test)
    scores = {}
    for row in frozen_scores():
        if row.pooling in fitted:
            sides = (fitted[row.pooling], labels, tested[row.pooling], test_labels)
            scores[row.key] = readout_accuracy(READOUTS[row.readout].compute, *sides)
    return scores


def evaluate_raw_pixels(config: MIMConfig, train, test, **loader) -> dict[str, float]:
    """{"knn", "linear"} of the pixels themselves, percent. Arguments as of `evaluate_encoder`."""
    pixels = [raw_pixels(pixel_loader(dataset, config, **loader)) for dataset, _ in (train, test)]
    sides = (pixels[0], labels_of(train), pixels[1], labels_of(test))
    return {name: readout_accuracy(metric.compute, *sides) for name, metric in READOUTS.items()}
