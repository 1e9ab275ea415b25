"""Where trained heads start, and by what a linear probe of few labels chooses its penalty."""

import pytest
import torch
from helpers import perturb, tiny_config

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


def test_a_pooler_with_self_attention_is_trained_in_bfloat16_and_its_vectors_keep_their_digits():
    """Vectors of images that share most of their tokens: the differences between images are what counts, and the error
    is below 3 percent of them (vectors rounded to bfloat16: above 6). All else is in float32, and all validation."""
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(), add_pooling_layer=False))
    length, dim = model.encoder.num_prefix_tokens + 16, model.encoder.hidden_size
    tokens = (5 + torch.randn(length, dim) + 0.1 * torch.randn(64, length, dim)).bfloat16().float()
    deep = PoolerChoice("deep", "abmilp", {"depth": 2, "self_attention": "both", "content": "all"})
    features, found = {"tokens/2": tokens}, {}
    for bf16 in (False, True):
        torch.manual_seed(1)
        groups = [Group(choice, 2, model, False, bf16) for choice in (deep, PoolerChoice("abmilp", "abmilp", {}))]
        heads = [perturb(members[0].head) for members in make_heads(dict.fromkeys(groups, [1e-3]), 3, 0).values()]
        for group, head in zip(groups, heads):
            own = [Trained("", 2, 0.0, 0, head.train())]
            (trained,) = group.vectors(features, own)
            loss = (trained - trained.mean(0)).square().sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.pooler.parameters()))])
            with torch.no_grad():
                (validated,) = group.vectors(features, own)
            found[group.choice.name, bf16] = trained, validated, gradient
    for name in ("deep", "abmilp"):
        trained, validated, gradient = found[name, True]
        exact, exactly_validated, exact_gradient = found[name, False]
        assert torch.equal(validated, exactly_validated) and trained.dtype == torch.float32
        assert torch.equal(trained, exact) == (name == "abmilp")
        spread = (exact - exact.mean(0)).norm()
        assert (trained - exact).norm() < 0.03 * spread and (exact.bfloat16() - exact).norm() > 0.06 * spread
        assert (gradient - exact_gradient).norm() <= 0.05 * exact_gradient.norm()


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
