"""Scores of frozen features, against scikit-learn."""

import numpy as np
import pytest
import torch
from helpers import perturb, tiny_config
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_mim import MIMModel
from hf_mim.training.data.splits import hold_out
from hf_mim.training.evaluation import metrics


def blobs(count=300, dim=6, classes=4, spread=1.2, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * 1.5
    labels = rng.integers(0, classes, count)
    scales = np.geomspace(0.1, 10, dim)  # features of very different size, as tokens have
    features = (centres[labels] + spread * rng.normal(size=(count, dim))) * scales + 3
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_unweighted_knn_is_scikit_learns(k):
    (train, train_labels), (test, test_labels) = blobs(seed=1), blobs(200, seed=2)
    reference = KNeighborsClassifier(k, metric="cosine").fit(train, train_labels)
    ours = metrics.knn_accuracy(train, train_labels, test, test_labels, k, temperature=None)
    assert ours == pytest.approx(100 * reference.score(test, test_labels), abs=0.5 if k > 1 else 1e-9)  # ties


def test_knn_votes_weigh_exp_of_cosine_over_temperature():
    angles = torch.tensor([0.0, 0.5, 0.6])  # the one near neighbour outvotes two farther ones
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    weight = np.exp(np.cos(angles.numpy()) / 0.07)
    assert weight[0] > weight[1] + weight[2]
    assert metrics.knn_accuracy(train, labels, test, torch.tensor([0]), k=3, temperature=0.07) == 100
    assert metrics.knn_accuracy(train, labels, test, torch.tensor([0]), k=3, temperature=None) == 0


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_logistic_regression_is_scikit_learns(penalty):
    features, labels = blobs()
    features = (features - features.mean(0)) / features.std(0)
    weight, bias = metrics.fit_logistic(features, labels, 4, penalty, tolerance=1e-6)
    reference = LogisticRegression(C=penalty, tol=1e-8, max_iter=5000).fit(features.numpy(), labels.numpy())
    ours = torch.softmax(features @ weight.T + bias, dim=1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(features.numpy()), atol=2e-3)


def test_the_linear_probe_is_that_of_the_best_penalty_whatever_the_features_scale():
    (train, train_labels), (test, test_labels) = blobs(600, seed=3), blobs(400, seed=4)
    score = metrics.linear_accuracy(train, train_labels, test, test_labels)
    mean, std = train.mean(0), train.std(0)
    standard, standard_test = ((x - mean) / std for x in (train, test))
    held_out = np.isin(np.arange(600), hold_out(train_labels, 0.2)[1])
    scores = {}
    for penalty in metrics.PENALTIES:
        fit = LogisticRegression(C=penalty, max_iter=5000).fit(standard[~held_out], train_labels[~held_out])
        scores[penalty] = fit.score(standard[held_out], train_labels[held_out])
    best = max(scores, key=scores.get)
    reference = LogisticRegression(C=best, max_iter=5000).fit(standard, train_labels)
    assert score == pytest.approx(100 * reference.score(standard_test, test_labels), abs=0.6)
    assert metrics.linear_accuracy(train * 1000 - 7, train_labels, test * 1000 - 7, test_labels) == pytest.approx(
        score, abs=0.6
    )


def test_a_constant_feature_does_no_harm():
    (train, train_labels), (test, test_labels) = blobs(seed=5), blobs(seed=6)
    plain = metrics.linear_accuracy(train, train_labels, test, test_labels)
    constant = torch.full((300, 1), 0.3)
    wider = metrics.linear_accuracy(
        torch.cat([train, constant], 1), train_labels, torch.cat([test, constant + 1e-3], 1), test_labels
    )
    assert wider == pytest.approx(plain, abs=0.4)


@pytest.mark.parametrize("options", [{}, {"use_cls_token": False}, {"num_register_tokens": 2}])
def test_features_are_the_mean_of_the_patches_and_the_class_token(options):
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(encoder_config=options))).train()
    pixels = torch.randn(5, 3, 16, 16)
    features = metrics.extract_features(model, [pixels[:3], pixels[3:]])
    assert not model.training
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    prefix = tokens.shape[1] - 16
    torch.testing.assert_close(features["mean"], tokens[:, prefix:].mean(1), atol=1e-5, rtol=1e-5)
    if options.get("use_cls_token", True):
        torch.testing.assert_close(features["cls"], tokens[:, 0], atol=1e-5, rtol=1e-5)
    else:
        assert features["cls"] is None


def test_raw_pixels_are_averaged_down_to_a_size_that_can_be_fitted():
    small, large = torch.rand(2, 3, 28, 20), torch.rand(2, 3, 64, 96)
    assert torch.equal(metrics.raw_pixels([small]), small.flatten(1))
    averaged = metrics.raw_pixels([large]).view(2, 3, 32, 32)
    torch.testing.assert_close(averaged[:, :, 1, 2], large[:, :, 2:4, 6:9].mean((2, 3)))


class Numbers(torch.utils.data.Dataset):
    labels = torch.arange(100) % 7

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return index


def test_a_subset_keeps_images_and_labels_together():
    chosen, labels = metrics.subset(Numbers(), 30)
    assert len(chosen) == 30 and [i % 7 for i in chosen] == labels.tolist()
    again, _ = metrics.subset(Numbers(), 30)
    assert list(again) == list(chosen) == sorted(set(chosen))
    assert len(metrics.subset(Numbers(), 1000)[0]) == 100
