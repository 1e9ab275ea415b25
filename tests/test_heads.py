"""Where trained heads start, and by what a linear probe of few labels chooses its penalty."""

import pytest
import torch
from helpers import tiny_config

from hf_mim import MIMModel
from hf_mim.modeling.poolers import POOLERS
from hf_mim.training.evaluation import readouts
from hf_mim.training.evaluation.heads import Head
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
