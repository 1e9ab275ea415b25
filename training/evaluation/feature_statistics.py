"""What pixels and features say of themselves, without labels: whether pixels vary, how different the tokens of
an image are, in how many directions images differ, what predicting the mean costs, and how much better a model is."""

import torch
from torch import Tensor

from hf_mim.modeling.encoder_base import image_size
from hf_mim.modeling.target_base import DISTANCES
from hf_mim.modeling.teachers import teachers_of


DEAD_SHARE = 0.1  # of the codes of a codebook may be unused before there is a warning
EVEN = 2.0  # levels: images whose pixels deviate by less are all but constant


def nearly_constant(images: Tensor) -> str | None:
    """What is wrong with images (count, channels, height, width), uint8, half of which are nearly constant."""
    deviations = images.float().std(dim=(2, 3)).mean(dim=1)
    share = (deviations < EVEN).float().mean().item()
    if share < 0.5:
        return None
    return (
        f"{100 * share:.0f} percent of {len(images)} images are all but constant (their pixels deviate by less than "
        f"{EVEN:g} of 255): there is little to learn from. Look at the images, and at how their values are read"
    )


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
    measures = {"raw": diversity_of(tokens, norms), "centred": diversity_of(centred, left), "residual": share}
    return {name: values.mean().item() for name, values in measures.items()}


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


@torch.no_grad()
def explained_share(model, pixel_values: Tensor, bool_masked_pos: Tensor) -> float | None:
    """1 - the loss over that of predicting the mean: of squared errors, the share of the target's variance that the
    predictions explain. Args: as of `loss_of_the_mean`. Returns: None where there is no such mean, or it is exact."""
    mean_loss = loss_of_the_mean(model, pixel_values, bool_masked_pos)
    if mean_loss is None or not mean_loss > 0:
        return None
    loss = model(pixel_values, bool_masked_pos, generator=torch.Generator().manual_seed(0)).loss
    return 1 - loss.item() / mean_loss


def describe_explained(model, share: float) -> str:
    """`explained_share` in words."""
    if share < 0:
        return "the loss is above that of predicting the mean"
    squared = getattr(model.target, "distance", None) is DISTANCES["mse"]
    if squared and not getattr(model.target, "hog_weight", 0):  # then it is a weighted sum
        return f"{100 * share:.1f} percent of the target's variance is explained"
    return f"the loss is {100 * share:.1f} percent below that of predicting the mean"


@torch.no_grad()
def teacher_diversity(model, pixel_values: Tensor) -> list[dict]:
    """Token diversity of the features that a `MIMForPreTraining` has for targets, before they are normalised.

    Args:
        pixel_values: (batch, channels, height, width), as the student sees them.

    Returns:
        per teacher and layer: teacher, layer (its name), match (how its grid meets the student's), grid (the student's)
        and `token_diversity`; [] without a teacher.
    """
    grid, rows = model.mask_grid(*pixel_values.shape[2:]), []
    for teacher in teachers_of(model.target):
        maps, way = teacher.maps(pixel_values, grid), teacher.describe_match(image_size(pixel_values), grid)
        for name, stage in zip(teacher.layer_names(), maps):
            where = {"teacher": teacher.source, "layer": name, "match": way, "grid": list(grid)}
            rows.append({**where, **token_diversity(stage.flatten(2).transpose(1, 2))})
    return rows


def effective_rank(features: Tensor) -> tuple[float, float]:
    """In how many directions features (images, dim) vary, and how much.

    Returns:
        the exponential of the entropy of the centred features' singular values, in [1, min(images, dim)] (RankMe,
        2210.02885, which does not centre); and their root mean square over the norm of the mean.
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    values = torch.linalg.svdvals(centred)
    if not values.sum() > 0:
        return 1.0, 0.0
    shares = values / values.sum()
    spread = centred.square().sum(dim=1).mean().sqrt() / features.mean(dim=0).norm().clamp(min=1e-12)
    return torch.special.entr(shares).sum().exp().item(), spread.item()


def loss_of_the_mean(model, pixel_values: Tensor, bool_masked_pos: Tensor) -> float | None:
    """The loss where every hidden token is predicted as the mean of them all, or for codes by how frequent they are.

    Args: as of `MIMForPreTraining.forward`. Returns: None where the target's predictions are no estimates of its
    values.
    """
    target, grid = model.target, model.mask_grid(*pixel_values.shape[2:])
    masks = bool_masked_pos[:, 0] if bool_masked_pos.ndim == 3 else bool_masked_pos
    target.bind(model.mim.encoder)
    values = target.targets(pixel_values, grid)
    masks = model.learned_tokens(masks)
    hidden, dim = values["patches"][masks], target.outputs["patches"]
    if hidden.is_floating_point():
        mean = hidden.float().mean(dim=0)
    else:
        mean = (torch.bincount(hidden.flatten(), minlength=dim) / hidden.numel()).clamp(min=1e-9).log()
    if mean.shape != (dim,):
        return None
    count = masks.shape[1] if target.scope == "all" else int(masks[0].sum())
    predictions = {"patches": mean.expand(len(masks), count, dim)}
    if "global" in target.outputs:
        predictions["global"] = values["global"].float().mean(dim=0).expand_as(values["global"])
    return float(target.loss(predictions, values, masks, grid, torch.Generator().manual_seed(0)))
