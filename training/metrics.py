"""What a frozen encoder is worth: k-NN and linear-probe accuracy of its features."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data import MIMCollator


# At most so many images are used, drawn at random but always the same; what was used stands in metrics.json.
TRAIN_IMAGES, TEST_IMAGES = 20_000, 10_000
RAW_SIDE = 32  # raw pixels are averaged down to this height and width: beyond, their linear probe costs gigabytes
NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTY = 1.0  # C of the linear probe, as in scikit-learn


def subset(dataset, most: int):
    """The data set, or `most` images of it drawn with a fixed seed; and their labels (count,)."""
    chosen = torch.arange(len(dataset))
    if len(dataset) > most:
        chosen = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(dataset))[:most]))
    return torch.utils.data.Subset(dataset, chosen.tolist()), dataset.labels[chosen]


def pixel_loader(dataset, config: MIMConfig, batch_size: int = 250, workers: int = 0):
    """Batches of `pixel_values` (batch, channels, height, width), in order."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=MIMCollator(config), num_workers=workers)
    return (batch["pixel_values"] for batch in loader)


@torch.inference_mode()
def extract_features(model, loader, bf16: bool = False) -> dict[str, Tensor | None]:
    """Features of a frozen encoder.

    Args:
        model: a `MIMModel`; it is put into eval mode.
        loader: batches of `pixel_values` (batch, channels, height, width).
        bf16: compute in bfloat16 where autocast does.

    Returns:
        "mean": (images, dim), the mean of the patch tokens; "cls": (images, dim), or None without a class token.
    """
    model.eval()
    prefix, has_cls = model.encoder.num_prefix_tokens, getattr(model.encoder, "has_cls_token", False)
    mean, cls = [], []
    for pixel_values in loader:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            tokens = model(pixel_values.to(model.device)).last_hidden_state
        mean.append(tokens[:, prefix:].float().mean(1).cpu())
        if has_cls:
            cls.append(tokens[:, 0].float().cpu())
    return {"mean": torch.cat(mean), "cls": torch.cat(cls) if has_cls else None}


def raw_pixels(loader) -> Tensor:
    """Normalised pixels themselves as features, (images, channels * height * width), at most `RAW_SIDE` a side."""
    pixels = []
    for batch in loader:
        size = [min(RAW_SIDE, side) for side in batch.shape[-2:]]
        pixels.append(F.adaptive_avg_pool2d(batch, size).flatten(1))
    return torch.cat(pixels)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = NEIGHBOURS, temperature=TEMPERATURE
) -> float:
    """Accuracy of a weighted vote of the k nearest neighbours by cosine (DINO, 2104.14294).

    Args:
        train, test: features (images, dim).
        train_labels, test_labels: class numbers (images,).
        temperature: a neighbour's vote weighs exp(cosine / temperature); None lets all count the same.

    Returns:
        percent.
    """
    train, test, k = F.normalize(train, dim=1), F.normalize(test, dim=1), min(k, len(train))
    classes, right = int(max(train_labels.max(), test_labels.max())) + 1, 0
    for features, labels in zip(test.split(500), test_labels.split(500), strict=True):
        similarity, nearest = (features @ train.T).topk(k)
        weights = torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()
        votes = torch.zeros(len(features), classes).scatter_add_(1, train_labels[nearest], weights)
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(test)


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of multinomial logistic regression on standardised features, fitted to convergence.

    Args: as of `knn_accuracy`. Returns: percent.
    """
    mean, std = train.mean(0), train.std(0)
    # A feature that is constant but for rounding says nothing, and must not be blown up.
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    train, test = (train - mean) * scale, (test - mean) * scale
    weight, bias = fit_logistic(train, train_labels, int(max(train_labels.max(), test_labels.max())) + 1)
    predictions = (test @ weight.T + bias).argmax(1)
    return 100 * (predictions == test_labels).float().mean().item()


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float = PENALTY, iterations: int = 500):
    """Multinomial logistic regression by L-BFGS; scikit-learn's objective: sum of losses + |weight|^2 / (2 penalty).

    Args:
        features: (images, dim), standardised.
        labels: (images,), in [0, classes).

    Returns:
        weight (classes, dim), bias (classes,).
    """
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, features, weight.T), labels)
        loss = loss + weight.square().sum() / (2 * penalty * len(features))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def accuracies(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """{"knn", "linear"}, percent."""
    arguments = (train.float(), train_labels, test.float(), test_labels)
    return {"knn": knn_accuracy(*arguments), "linear": linear_accuracy(*arguments)}


def evaluate_encoder(model, config: MIMConfig, train, test, bf16: bool = False, workers: int = 0) -> dict[str, float]:
    """k-NN and linear-probe accuracy of both poolings, each image encoded once.

    Args:
        train, test: pairs of a data set and its labels, as of `subset`.

    Returns:
        {"knn_mean", "linear_mean", "knn_cls", "linear_cls"}, percent; without the last two if there is no class token.
    """
    seen = [
        extract_features(model, pixel_loader(dataset, config, workers=workers), bf16) for dataset, _ in (train, test)
    ]
    scores = {}
    for pooling in ("mean", "cls"):
        if seen[0][pooling] is not None:
            found = accuracies(seen[0][pooling], train[1], seen[1][pooling], test[1])
            scores.update({f"{name}_{pooling}": score for name, score in found.items()})
    return scores


def evaluate_raw_pixels(config: MIMConfig, train, test, workers: int = 0) -> dict[str, float]:
    """{"knn", "linear"} of the pixels themselves, percent."""
    pixels = [raw_pixels(pixel_loader(dataset, config, workers=workers)) for dataset, _ in (train, test)]
    return accuracies(pixels[0], train[1], pixels[1], test[1])
