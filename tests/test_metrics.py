"""Scores of frozen features, against scikit-learn and the definition; and that a metric has one place."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import perturb, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hf_mim import MIMModel
from hf_mim.hub import card_results
from hf_mim.training.commands.pretrain import results_table
from hf_mim.training.data.splits import hold_out
from hf_mim.training.evaluation import classification as evaluation
from hf_mim.training.evaluation import frozen, readouts
from hf_mim.training.evaluation.dense import dense_protocol
from hf_mim.training.evaluation.metrics import CLASSIFICATION, READOUTS, Metric, score_classes
from hf_mim.training.evaluation.probe_scores import probe_protocol, score_readouts
from hf_mim.training.evaluation.readouts import LinearProbe, NearestNeighbours, fit_logistic


def blobs(count=300, dim=6, classes=4, spread=1.2, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * 1.5
    labels = rng.integers(0, classes, count)
    scales = np.geomspace(0.1, 10, dim)  # features of very different size, as tokens have
    features = (centres[labels] + spread * rng.normal(size=(count, dim))) * scales + 3
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def accuracy(readout, test, test_labels) -> float:
    return readouts.percent(readout(test).argmax(1), test_labels)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_unweighted_knn_is_scikit_learns(k):
    (train, train_labels), (test, test_labels) = blobs(seed=1), blobs(200, seed=2)
    reference = KNeighborsClassifier(k, metric="cosine").fit(train, train_labels)
    ours = accuracy(NearestNeighbours(train, train_labels, k=k, temperature=None), test, test_labels)
    assert ours == pytest.approx(100 * reference.score(test, test_labels), abs=0.5 if k > 1 else 1e-9)  # ties


def test_knn_votes_weigh_exp_of_cosine_over_temperature():
    angles = torch.tensor([0.0, 0.5, 0.6])  # the one near neighbour outvotes two farther ones
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    weight = np.exp(np.cos(angles.numpy()) / 0.07)
    assert weight[0] > weight[1] + weight[2]
    votes = NearestNeighbours(train, labels, temperature=0.07)(test)
    np.testing.assert_allclose(votes[0, 0], weight[0] / weight.sum(), rtol=1e-4)
    assert NearestNeighbours(train, labels, temperature=None)(test).argmax() == 1


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_logistic_regression_has_no_slope_where_it_ends(penalty, classes):
    features, labels = blobs(classes=classes)
    features = (features - features.mean(0)) / features.std(0)
    weight, bias = (value.double() for value in fit_logistic(features, labels, classes + 1, penalty))
    assert (bias[classes] == readouts.UNSEEN) and not weight[:, classes].any()  # it does not occur
    weight, bias = weight[:, :classes].requires_grad_(), bias[:classes].requires_grad_()
    loss = F.cross_entropy(features.double() @ weight + bias, labels, reduction="mean")
    (loss + weight.square().sum() / (2 * penalty * len(labels))).backward()
    free = slice(1, None) if classes == 2 else slice(None)  # of two classes scikit-learn fits the difference
    assert max(weight.grad[:, free].abs().max(), bias.grad[free].abs().max()) < 1e-3


@pytest.mark.parametrize(("images", "dim"), [(600, 6), (60, 200)])
def test_the_linear_probe_is_that_of_the_best_penalty_whatever_the_features_scale(images, dim):
    (train, train_labels), (test, test_labels) = blobs(images, dim, seed=3), blobs(400, dim, seed=4)
    probe = LinearProbe(train, train_labels)
    mean, std = train.mean(0), train.std(0, correction=0)
    standard, standard_test = ((x - mean) / std for x in (train, test))
    held_out = np.isin(np.arange(images), hold_out(train_labels, 0.2)[1])
    scores = {}
    for penalty in readouts.PENALTIES:
        fit = LogisticRegression(C=penalty, max_iter=5000).fit(standard[~held_out], train_labels[~held_out])
        scores[penalty] = fit.score(standard[held_out], train_labels[held_out])
    assert scores[probe.penalty] >= max(scores.values()) - 1.5 / (images / 5)  # but for one image
    reference = LogisticRegression(C=probe.penalty, max_iter=5000).fit(standard, train_labels)
    assert (probe(test).argmax(1).numpy() == reference.predict(standard_test)).mean() > 0.99
    other = LinearProbe(train * 1000 - 7, train_labels)
    assert accuracy(other, test * 1000 - 7, test_labels) == pytest.approx(accuracy(probe, test, test_labels), abs=0.6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_readouts_take_any_features(data):
    """Constant and repeated columns, none, fewer images than classes, classes that lack in a split, values that are not
    finite: scores of every class, finite where the features are, and constant columns change nothing."""
    images, dim, classes = (data.draw(st.integers(*ends)) for ends in ((1, 12), (0, 20), (1, 9)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    features = torch.from_numpy(rng.normal(size=(images, dim)) * 10.0 ** rng.integers(-3, 4, dim)).float()
    kind = data.draw(st.sampled_from(["plain", "constant", "repeated", "rounding", "not finite"]))
    if dim:
        columns = rng.integers(0, dim, data.draw(st.integers(1, dim)))
        features[:, columns] = {
            "plain": features[:, columns],
            "constant": torch.full((images, 1), 0.3),
            "repeated": features[:, :1].clone(),
            "rounding": 1e4 + 1e-4 * features[:, columns],
            "not finite": torch.tensor(float(rng.choice([np.nan, np.inf]))),
        }[kind]
    labels = torch.from_numpy(rng.integers(0, classes, images))
    for fit in (NearestNeighbours, LinearProbe):
        scores = fit(features, labels, classes)(features)
        assert scores.shape == (images, classes)
        assert scores.isfinite().all() or kind == "not finite" and fit is NearestNeighbours
    wider = torch.cat([features, torch.full((images, 2), 7.7)], dim=1)
    changed = torch.cat([features, torch.full((images, 2), -1e6)], dim=1)  # in the test images it is another constant
    plain = LinearProbe(features, labels, classes)(features)
    torch.testing.assert_close(LinearProbe(wider, labels, classes)(changed), plain, atol=1e-2, rtol=1e-2)


def test_one_class_is_predicted_and_others_never():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    probe = LinearProbe(features, torch.full((6,), 2), 5)
    assert probe(features).argmax(1).tolist() == [2] * 6
    nothing = LinearProbe(features[:, :0], torch.tensor([0, 1, 1, 1, 0, 1]), 3)
    torch.testing.assert_close(nothing(features[:, :0])[0, :2].softmax(0), torch.tensor([1 / 3, 2 / 3]))


def test_a_metric_is_added_in_one_place(monkeypatch):
    """Its entry is enough for metrics.json, the tables and the card."""
    entry = Metric("3-NN", partial(NearestNeighbours, k=3), "3-NN: a vote of three.")
    monkeypatch.setitem(READOUTS, "knn3", entry)
    monkeypatch.setitem(CLASSIFICATION, "error", Metric("error", lambda logits, labels: 12.5))
    torch.manual_seed(0)
    dataset = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)]
    monkeypatch.setattr(frozen, "MIMCollator", lambda config: torch.utils.data.default_collate)
    side = (dataset, torch.arange(8) % 2)
    model = MIMModel(tiny_config())
    scores = frozen.evaluate_encoder(model, side, side)
    assert list(scores) == ["knn_mean", "linear_mean", "knn3_mean", "knn_cls", "linear_cls", "knn3_cls"]
    sizes = {"train_images": 8, "test_images": 8}
    raw = frozen.evaluate_raw_pixels(model.config, side, side)
    results = {"trained": scores, "untrained": scores, "raw_pixels": raw, "evaluation": sizes}
    titles = ["3-NN, mean of the patches", "3-NN, class token"]
    assert set(titles) <= {text.plain for text in results_table(results).columns[0].cells}
    assert set(titles) <= {row["name"] for row in card_results.result_rows(results)}
    assert frozen.frozen_protocol()["knn3"] == probe_protocol()["knn3"] == dense_protocol()["knn3"] == entry.protocol
    assert score_readouts(torch.randn(9, 3), torch.arange(9) % 2, torch.randn(5, 3), torch.zeros(5))["knn3"]["low"] >= 0
    assert score_classes(np.eye(3), np.arange(3))["error"] == 12.5


@pytest.mark.parametrize("options", [{}, {"use_cls_token": False}, {"num_register_tokens": 2}])
def test_features_are_the_mean_of_the_patches_and_the_class_token(options):
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(encoder_config=options))).train()
    pixels = torch.randn(5, 3, 16, 16)
    features = frozen.extract_features(model, [pixels[:3], pixels[3:]])
    assert not model.training
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    prefix = tokens.shape[1] - 16
    torch.testing.assert_close(features["mean"], tokens[:, prefix:].mean(1), atol=1e-5, rtol=1e-5)
    if options.get("use_cls_token", True):
        torch.testing.assert_close(features["cls"], tokens[:, 0], atol=1e-5, rtol=1e-5)
    else:
        assert "cls" not in features


def test_raw_pixels_are_averaged_down_to_a_size_that_can_be_fitted():
    small, large = torch.rand(2, 3, 28, 20), torch.rand(2, 3, 64, 96)
    assert torch.equal(frozen.raw_pixels([small]), small.flatten(1))
    averaged = frozen.raw_pixels([large]).view(2, 3, 32, 32)
    torch.testing.assert_close(averaged[:, :, 1, 2], large[:, :, 2:4, 6:9].mean((2, 3)))


class Numbers(torch.utils.data.Dataset):
    labels = torch.arange(100) % 7

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return index


def test_a_subset_keeps_images_and_labels_together():
    chosen, labels = frozen.subset(Numbers(), 30)
    assert len(chosen) == 30 and [i % 7 for i in chosen] == labels.tolist()
    again, _ = frozen.subset(Numbers(), 30)
    assert list(again) == list(chosen) == sorted(set(chosen))
    assert len(frozen.subset(Numbers(), 1000)[0]) == 100


# ---- of a classifier ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [2, 5, 9])
def test_metrics_are_their_definitions(classes):
    rng = np.random.default_rng(classes)
    logits, labels = rng.normal(size=(200, classes)).astype(np.float32), rng.integers(0, max(2, classes - 2), 200)
    predictions = logits.argmax(1)
    counts = np.zeros((classes, classes), dtype=int)
    for label, prediction in zip(labels, predictions):
        counts[label, prediction] += 1
    present = [c for c in range(classes) if counts[c].any() or counts[:, c].any()]
    expected = {
        "accuracy": 100 * np.trace(counts) / 200,
        "f1_macro": 100 * np.mean([2 * counts[c, c] / (counts[c].sum() + counts[:, c].sum()) for c in present]),
    }
    if classes > 5:
        ranks = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
        expected["top5_accuracy"] = 100 * np.mean(ranks < 5)
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    expected["loss"] = -np.mean([np.log(row[label]) for row, label in zip(shares, labels)])
    assert score_classes(logits, labels) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(evaluation.confusion_matrix(logits, labels), counts)


def test_metrics_refuse_what_they_do_not_measure():
    with pytest.raises(ValueError):
        evaluation.Accuracy().compute(predictions=[1, 2], references=[1])
