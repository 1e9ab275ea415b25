"""Forgetting is watched: what is measured, against computations of its own; when there is a warning, and which; that
training does not notice; and what a run writes of it."""

import io
import json

import PIL.Image
import pytest
import torch
from helpers import perturb, tiny_config
from rich.console import Console
from test_adaptation import run, source  # noqa: F401 (a fixture)
from test_data import rows
from test_pretrain import equal, weights
from test_trainer import make, model
from transformers import Dinov2Config, Dinov2Model

from hf_mim.hub.card import make_card
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits
from hf_mim.training.evaluation.cka import linear_cka
from hf_mim.training.trainer import forgetting
from hf_mim.training.trainer.forgetting import ForgettingMonitor, Measurement, WatchedImages, deviations_fallen


def test_cka_is_that_of_the_unbiased_estimate_of_the_papers():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(9, dim, generator=generator, dtype=torch.float64) for dim in (4, 6))
    second[:, :3] += first[:, :3]

    def hsic(x, y):  # 1211.4811, equation 5, in sums over indices
        k, l = (z @ z.T for z in (x, y))  # noqa: E741 (the paper's names)
        n = len(k)
        k, l = (m - torch.diag(m.diagonal()) for m in (k, l))  # noqa: E741
        last = sum(k[i].sum() * l[i].sum() for i in range(n))
        return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * last) / (n * (n - 3))

    expected = hsic(first, second) / (hsic(first, first) * hsic(second, second)).sqrt()
    assert linear_cka(first.float(), second.float()) == pytest.approx(expected.item(), abs=1e-5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(first, 3 * first @ turn + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(first[:3], second[:3]) != linear_cka(first[:3], second[:3])  # nan


def test_an_accuracy_has_fallen_where_chance_does_not_explain_it():
    before = torch.zeros(200, dtype=torch.bool)
    before[:150] = True
    after = before.clone()
    after[:20] = False  # 20 are lost
    after[150:155] = True  # 5 gained
    assert deviations_fallen(before, after) == pytest.approx(15 / 25**0.5)
    assert deviations_fallen(after, before) == -deviations_fallen(before, after)
    assert deviations_fallen(before, before) == 0


def images(labelled: bool, is_own: bool = False, count: int = 48) -> WatchedImages:
    splits = MIMDataset(rows(count), tiny_config(), DataArguments(), False)
    assert splits.labels is not None
    chosen = Splits(splits, splits, splits if labelled else None, "as made", data=DataArguments())
    return forgetting.choose_images("old", "the old images", chosen, tiny_config(), is_own)


def test_scores_are_those_of_features_and_labels():
    network = perturb(model()).mim
    watched, start = images(True), None
    measured = watched.measure(network, False)
    whole = watched.labelled[1][0].dataset
    pixels = torch.stack([forgetting.MIMCollator(network.config)(whole.__getitems__([i]))["pixel_values"][0]
                          for i in range(len(whole))])  # fmt: skip
    with torch.no_grad():
        features = network(pixels).last_hidden_state[:, 1:].mean(dim=1)
    torch.testing.assert_close(measured.features, features, rtol=1e-4, atol=1e-5)
    # k-NN by its definition: a vote of the 20 nearest by cosine, each weighing exp(cosine / 0.07).
    labels, right = whole.labels, []
    for i, vector in enumerate(features):
        similarity = torch.cosine_similarity(vector[None], features)
        nearest = similarity.argsort(descending=True)[:20]
        votes = torch.zeros(int(labels.max()) + 1)
        for j in nearest:
            votes[labels[j]] += (similarity[j] / 0.07).exp()
        right.append(votes.argmax() == labels[i])
    assert (measured.right["knn"] == torch.stack(right)).float().mean() > 0.95  # but for ties
    start = watched.measure(perturb(model(seed=1)).mim, False)
    scores = measured.scores(start)
    assert scores["knn"] == pytest.approx(100 * measured.right["knn"].float().mean().item())
    assert scores["cka"] == pytest.approx(linear_cka(start.features, features), abs=1e-4)
    assert images(False).measure(network, False).scores(start).keys() == {"cka"}


def watch(folder, network, watched, **options) -> tuple[ForgettingMonitor, list[str]]:
    """A short run, and its warnings."""
    said: list[str] = []
    trainer = make(folder, network, max_steps=2, **{"learning_rate": 0.0, **options})
    monitor = ForgettingMonitor(trainer, [watched], folder, 1, said.append)
    trainer.add_callback(monitor)
    return monitor, said


def test_what_is_forgotten_is_named_with_a_remedy(tmp_path, monkeypatch):
    network = model()
    monitor, said = watch(tmp_path, network, images(True), layer_decay=0.5)
    right = {"knn": torch.ones(48, dtype=torch.bool), "linear": torch.ones(48, dtype=torch.bool)}
    monitor.start = [Measurement(monitor.start[0].features, right)]
    monitor.trainer.train()
    linear, cka = ([text for text in said if sign in text] for sign in ("linear probe on", "CKA"))
    assert len(linear) == 1 and cka == []  # once; the features have not changed
    assert "forgets: at step 1, linear probe on the old images, as made has fallen from 100.0 to" in linear[0]
    assert "Lower training.base_learning_rate, keep near the start (model.keep=features), or train" in linear[0]
    assert "layer_decay" not in linear[0] and "see docs/adapting.md" in linear[0]  # it has that already
    assert set(monitor.standing) == {"old knn", "old linear"}
    points = forgetting.scores_over_steps(monitor.trainer.state.log_history, "old")
    assert [step for step, _ in points] == [0, 1, 2]


@pytest.mark.parametrize("is_own", [False, True])
def test_features_as_unlike_the_start_as_an_untrained_encoders_are_named(tmp_path, is_own):
    monitor, said = watch(tmp_path, model(), images(True, is_own))
    monitor.start = [Measurement(torch.randn(48, 16), monitor.start[0].right)]
    monitor.trainer.train()
    assert bool(said) != is_own  # the run's own images are meant to change: their accuracies say how
    assert is_own or "have a CKA of" in said[0] and "where an untrained encoder has" in said[0]


def test_training_does_not_notice_and_what_was_measured_is_written(source, tmp_path):  # noqa: F811
    words = ["data.max_eval_images=30", "model.encoder_config.drop_path_rate=0.2", "training.save_steps=4"]
    printed = run(source, tmp_path / "watched", "training.watch_every=2", "training.save_strategy=steps", *words)
    run(source, tmp_path / "alone", "training.watch_every=0", "training.save_strategy=steps", *words)
    assert equal(weights(tmp_path / "watched"), weights(tmp_path / "alone"))
    assert "measuring the start on the shipped images, split test" in printed
    assert "what became of the start" in printed and "forgetting.png" in printed
    assert min(PIL.Image.open(tmp_path / "watched" / "forgetting.png").size) > 300
    assert not (tmp_path / "alone" / "forgetting.png").exists()
    metrics = json.loads((tmp_path / "watched" / "metrics.json").read_text())["forgetting"]["own"]
    assert metrics["images"] == 30 and metrics["before"].keys() == {"knn", "linear", "cka"} == metrics["after"].keys()
    assert metrics["before"]["cka"] == pytest.approx(1, abs=1e-4) and metrics["after"]["cka"] < 1
    card = str(make_card(tmp_path / "watched", "me/adapted"))
    assert "## What became of the start" in card and "forgetting.png" in card and "started from" in card
    row = f"| k-NN, the shipped images, split test | {metrics['before']['knn']:.1f} | {metrics['after']['knn']:.1f} |"
    assert row in card
    assert "What became of the start" not in str(make_card(tmp_path / "alone", "me/alone"))


def test_own_images_are_watched_beside_the_shipped_and_others_in_their_place(tmp_path):
    config = tiny_config(num_channels=1)
    own = MIMDataset(rows(24), tiny_config(), DataArguments(), False)
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            PIL.Image.new("L", (16, 16), 10 * i).save(folder / name / f"{i}.png")
    chosen = DataArguments(dataset="mine")
    both = forgetting.watched_images(Splits(own, None, None, "no labels", data=chosen), config)
    assert [watched.name for watched in both] == ["own", "shipped"] and both[0].labelled is None
    assert both[0].title == "mine, training images (no labels)" and len(both[0]) == 24
    assert len(both[1]) == forgetting.TEST and both[1].labelled is not None
    chosen = DataArguments(dataset="mine", forgetting_dataset=str(folder))
    other = forgetting.watched_images(Splits(own, None, None, "no labels", data=chosen), config)[1]
    assert other.name == "other" and str(folder) in other.title and other.labelled is not None
    shipped = DataArguments()
    (alone,) = forgetting.watched_images(Splits(own, own, own, "split test", data=shipped), tiny_config())
    assert alone.is_own and alone.title == "the shipped images, split test"


@pytest.mark.parametrize("foreign", [False, True])
def test_the_recipe_adapt_starts_from_any_encoder(source, tmp_path, foreign):  # noqa: F811
    if foreign:
        options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
        Dinov2Model(Dinov2Config(**options, image_size=28, patch_size=7)).save_pretrained(tmp_path / "dinov2")
    words = [f"model.init_from={tmp_path / 'dinov2' if foreign else source}", f"training.output_dir={tmp_path / 'run'}"]
    words += ["data.max_train_images=64", "data.max_eval_images=20", "training.max_steps=2", "training.bf16=false"]
    out = io.StringIO()
    pretrain("adapt", [*words, "training.per_device_train_batch_size=8"], Console(file=out, width=300))
    assert "keeping: near the start's features, with weight 1" in out.getvalue()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["forgetting"]["own"]["after"]["cka"] > 0.9
    with pytest.raises(ValueError, match="this recipe starts from an encoder: set model.init_from=CHECKPOINT"):
        pretrain("adapt", words[1:], Console(file=out))
