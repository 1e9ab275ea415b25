"""Where trained heads start, and by what a linear probe of few labels chooses its penalty."""

import pytest
import torch
from helpers import perturb, tiny_config
from torch import Tensor

from hf_mim import MIMModel
from hf_mim.modeling.poolers import POOLERS
from hf_mim.training.evaluation import readouts
from hf_mim.training.evaluation.features import PoolerChoice
from hf_mim.training.evaluation.heads import Group, Head, Trained, make_heads
from hf_mim.training.evaluation.readouts import LinearProbe, fit_logistic, stratified_folds


@pytest.mark.parametrize("as_linear", [True, False])
def test_under_lars_heads_start_as_linear_layers_do(as_linear):
    """Beyond [cls]: score and classifier uniform in +-1/sqrt(width). With AdamW the score starts at zero."""
    torch.manual_seed(0)
    encoder = MIMModel(tiny_config()).encoder
    width = encoder.hidden_size
    head = Head(POOLERS["abmilp"](encoder), width, 2000, as_linear)
    largest = head.pooler.score.abs().max().item()
    assert 0.6 * width**-0.5 < largest <= width**-0.5 if as_linear else largest == 0
    spread = (3 * width) ** -0.5 if as_linear else 0.01
    assert head.classifier.weight.std().item() == pytest.approx(spread, rel=0.03)


DEEP = {"depth": 2, "self_attention": "both", "content": "all"}


@pytest.mark.parametrize(
    "options",
    [DEEP, {**DEEP, "gated": True, "position": "sincos"}, {**DEEP, "depth": 1}],
    ids=["deep", "gated", "flat"],
)
def test_abmilp_with_self_attention_is_trained_in_bfloat16_and_its_vectors_keep_their_digits(options):
    """Images share most of what their tokens are. The error of vectors, without what is the same in all of them (the
    batch norm removes it), is below 2 percent of the differences between images, and below a third of what rounding
    the vectors would cost; that of all gradients together is below 5 percent. Validation is in float32."""
    trained, validated, gradient = vectors_of(options, bf16=True)
    exact, exactly_validated, exact_gradient = vectors_of(options, bf16=False)
    assert torch.equal(validated, exactly_validated)
    assert trained.dtype == torch.float32 and not torch.equal(trained, exact)
    error, rounding, spread = ((x - x.mean(0)).norm() for x in (trained - exact, exact.bfloat16() - exact, exact))
    assert error < 0.02 * spread and error < rounding / 3
    assert (gradient - exact_gradient).norm() <= 0.05 * exact_gradient.norm()


@pytest.mark.parametrize("options", [{}, {"depth": 2, "self_attention": "map"}], ids=["none", "map"])
def test_other_poolers_are_trained_in_float32(options):
    for one, other in zip(vectors_of(options, bf16=True), vectors_of(options, bf16=False)):
        assert torch.equal(one, other)


def vectors_of(options: dict, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An AbMILP's vectors of 64 images in training and in validation, and the gradient of their spread."""
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(), add_pooling_layer=False))
    length, dim = model.encoder.num_prefix_tokens + 16, model.encoder.hidden_size
    features = {"tokens/2": (5 + torch.randn(length, dim) + 0.1 * torch.randn(64, length, dim)).bfloat16().float()}
    group = Group(PoolerChoice("abmilp", "abmilp", options), 2, model, False, bf16=bf16)
    head = perturb(make_heads({group: [1e-3]}, 3, 0)[group][0].head)
    members = [Trained("abmilp", 2, 0.0, 0, head)]
    head.train()
    (trained,) = group.vectors(features, members)
    loss = (trained - trained.mean(0)).square().sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.pooler.parameters()))])
    head.eval()
    (validated,) = group.vectors(features, members)
    return trained, validated, gradient


def test_folds_have_every_class_on_both_sides_or_there_are_none(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(readouts, "PATIENCE", 99)
    labels = torch.tensor([0, 1, 2] * 7)[torch.randperm(21)]
    folds = stratified_folds(labels)
    assert torch.stack(folds).sum(dim=0).eq(1).all()
    for fold in folds:
        assert set(labels[fold].tolist()) == set(labels[~fold].tolist()) == {0, 1, 2}
    assert stratified_folds(torch.tensor([0] * 9 + [1] * 4)) == []
    features = torch.nn.functional.one_hot(labels, 4) + torch.randn(21, 4)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    assert LinearProbe(features, labels, held_out=[]).penalty == 1.0
    scores = {}
    for penalty in readouts.PENALTIES:
        fits = [(fold, fit_logistic(features[~fold], labels[~fold], 3, penalty)) for fold in folds]
        right = [((features[fold] @ w + b).argmax(1) == labels[fold]).double().mean() for fold, (w, b) in fits]
        scores[penalty] = torch.stack(right).mean().item()
    chosen = LinearProbe(features, labels, held_out=folds).penalty
    assert scores[chosen] == max(scores.values()) > min(scores.values())
