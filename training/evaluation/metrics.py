"""What a frozen encoder is worth: k-NN and linear-probe accuracy of its features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.splits import draw_subset, hold_out
from hf_mim.training.errors import DataError


# At most so many images are used, drawn at random but always the same; what was used stands in metrics.json.
TRAIN_IMAGES, TEST_IMAGES = 10_000, 5_000
RAW_SIDE = 32  # raw pixels are averaged down to this height and width: beyond, their linear probe costs gigabytes
NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of the linear probe, as in scikit-learn; strong ones first
# What the accuracies mean, in the words of metrics.json and the model card.
PROTOCOL = {
    "knn": f"k-NN: a vote of the {NEIGHBOURS} nearest training images by cosine, each weighing "
    f"exp(cosine / {TEMPERATURE}).",
    "linear": "Linear probe: logistic regression on standardised features, fitted to convergence by L-BFGS; its "
    "penalty is the best of five on a held-out fifth of the training images.",
    "raw_pixels": f"Raw pixels: the normalised images, averaged down to at most {RAW_SIDE} pixels a side.",
}


def subset(dataset, most: int):
    """The data set, or `most` images of it drawn with a fixed seed; and their labels (count,)."""
    chosen = draw_subset(dataset.labels, most).tolist()
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
    prefix, has_cls = model.encoder.num_prefix_tokens, model.encoder.has_cls_token
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
    """Accuracy in percent of `knn_predict` for test images of the classes test_labels (images,)."""
    return percent(knn_predict(train, train_labels, test, k, temperature), test_labels)


def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int = NEIGHBOURS, temperature: float | None = TEMPERATURE
) -> Tensor:
    """The class by a weighted vote of the k nearest neighbours by cosine (DINO, 2104.14294).

    Args:
        train, test: features (images, dim).
        train_labels: class numbers (images,).
        temperature: a neighbour's vote weighs exp(cosine / temperature); None lets all count the same.

    Returns:
        class numbers (test images,).
    """
    train, test, k = F.normalize(train, dim=1), F.normalize(test, dim=1), min(k, len(train))
    classes, found = int(train_labels.max()) + 1, []
    for features in test.split(500):
        similarity, nearest = (features @ train.T).topk(k)
        weights = torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()
        votes = torch.zeros(len(features), classes).scatter_add_(1, train_labels[nearest], weights)
        found.append(votes.argmax(1))
    return torch.cat(found)


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy in percent of `linear_predict` for test images of the classes test_labels (images,)."""
    return percent(linear_predict(train, train_labels, test), test_labels)


def linear_predict(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """The class by multinomial logistic regression on standardised features, fitted to convergence.

    The penalty is the one of `PENALTIES` that does best on a fifth of the training images, which the others fit: how
    much features want differs so much (raw pixels a strong one, pooled tokens a weak one) that any fixed one is unfair.

    Args: as of `knn_predict`. Returns: class numbers (test images,).
    """
    mean, std = train.mean(0), train.std(0)
    # A feature that is constant but for rounding says nothing, and must not be blown up.
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    train, test = (train - mean) * scale, (test - mean) * scale
    # Along the principal axes the problem is the same, the penalty being round, but the fit needs far fewer steps.
    axes = torch.linalg.eigh(train.T @ train).eigenvectors
    train, test = train @ axes, test @ axes
    classes = int(train_labels.max()) + 1
    penalty, start = choose_penalty(train, train_labels, classes)
    weight, bias = fit_logistic(train, train_labels, classes, penalty, start)
    return (test @ weight.T + bias).argmax(1)


def percent(predicted: Tensor, labels: Tensor) -> float:
    return 100 * (predicted == labels).double().mean().item()


def choose_penalty(features: Tensor, labels: Tensor, classes: int) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """The best of `PENALTIES` on a fifth of every class, fitted on the others, and the weights fitted with it."""
    try:
        rest, held_out = map(torch.from_numpy, hold_out(labels.numpy(), 0.2))
    except DataError:  # no class has two images
        return 1.0, None
    start, best = None, (-1.0, 1.0, None)
    for penalty in PENALTIES:
        start = fit_logistic(features[rest], labels[rest], classes, penalty, start)
        score = percent((features[held_out] @ start[0].T + start[1]).argmax(1), labels[held_out])
        best = max(best, (score, penalty, start), key=lambda found: found[0])
    return best[1:]


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 3e-4,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS; scikit-learn's objective: sum of losses + |weight|^2 / (2 penalty).

    Args:
        features: (images, dim), centred.
        labels: (images,), in [0, classes).
        start: weight and bias to start from.
        tolerance: the largest slope of the mean loss at which it stops.

    Returns:
        weight (classes, dim), bias (classes,).
    """
    decay = 1 / (penalty * len(features))
    # Scaled so that the curvature is about the same in every direction; 0.03 stands for p (1 - p).
    scale = (0.03 * features.square().mean(0) + decay).rsqrt()
    weight, bias = start or (torch.zeros(classes, features.shape[1]), torch.zeros(classes))
    scaled, weight, bias = features * scale, (weight / scale).requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, scaled, weight.T), labels)
        loss = loss + (weight * scale).square().sum() * decay / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weight * scale).detach(), bias.detach()


def accuracies(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """{"knn", "linear"}, percent."""
    arguments = (train.float(), train_labels, test.float(), test_labels)
    return {"knn": knn_accuracy(*arguments), "linear": linear_accuracy(*arguments)}


def evaluate_encoder(model, train, test, bf16: bool = False, **loader) -> dict[str, float]:
    """k-NN and linear-probe accuracy of both poolings, each image encoded once.

    Args:
        model: a `MIMModel`.
        train, test: pairs of a data set and its labels, as of `subset`.
        loader: arguments of `pixel_loader`.

    Returns:
        {"knn_mean", "linear_mean", "knn_cls", "linear_cls"}, percent; without the last two if there is no class token.
    """
    loaders = [pixel_loader(dataset, model.config, **loader) for dataset, _ in (train, test)]
    seen = [extract_features(model, pixels, bf16) for pixels in loaders]
    scores = {}
    for pooling in ("mean", "cls"):
        if seen[0][pooling] is not None:
            found = accuracies(seen[0][pooling], labels_of(train), seen[1][pooling], labels_of(test))
            scores.update({f"{name}_{pooling}": score for name, score in found.items()})
    return scores


def evaluate_raw_pixels(config: MIMConfig, train, test, **loader) -> dict[str, float]:
    """{"knn", "linear"} of the pixels themselves, percent. Arguments as of `evaluate_encoder`."""
    pixels = [raw_pixels(pixel_loader(dataset, config, **loader)) for dataset, _ in (train, test)]
    return accuracies(pixels[0], labels_of(train), pixels[1], labels_of(test))


def token_diversity(tokens: Tensor) -> dict[str, float]:
    """How different the tokens of one image are from each other, means over images (Img2Vec, 2304.12535; the formula
    is this project's: the paper's is not known here).

    Args:
        tokens: (batch, tokens, dim), without a class token; compare encoders at equal numbers of tokens.

    Returns:
        "raw": 1 - the mean cosine of two tokens, in [0, tokens / (tokens - 1)], 0 where all point one way;
        "centred": the same of the tokens less their image's mean; "residual": the norm of the tokens less their mean
        over the norm of the tokens, in [0, 1].
    """
    tokens = tokens.double()
    centred = tokens - tokens.mean(dim=1, keepdim=True)
    norms, left = tokens.norm(dim=2), centred.norm(dim=2)
    share = left.norm(dim=1) / norms.norm(dim=1).clamp(min=1e-12)
    found = {"raw": diversity_of(tokens, norms), "centred": diversity_of(centred, left), "residual": share}
    return {name: values.mean().item() for name, values in found.items()}


def diversity_of(tokens: Tensor, norms: Tensor) -> Tensor:
    """1 - the mean cosine of two tokens of an image, (batch,); a token of norm zero has cosine zero to all others.

    Args:
        tokens: (batch, tokens, dim).
        norms: (batch, tokens), theirs.
    """
    count, directed = tokens.shape[1], norms > 1e-12
    inverse = torch.where(directed, 1 / norms, 0)
    # The sum of all cosines is the squared norm of the sum of unit vectors: no tokens x tokens matrix.
    total = (inverse[:, None] @ tokens)[:, 0].square().sum(dim=1)
    return 1 - (total - directed.sum(dim=1)) / (count * (count - 1))
