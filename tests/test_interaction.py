"""Multi-order interactions (hf_mim/analysis/interaction.py): games whose interactions are known, and real images."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import tiny_config
from rich.console import Console
from scipy.special import logit

from hf_mim import MIMForImageClassification, MIMModel
from hf_mim.analysis.images import EncoderImages, choose_images
from hf_mim.analysis.interaction import (
    PAPER,
    Partial,
    Plan,
    choose_contexts,
    choose_pairs,
    hide_absent,
    interactions,
    interactions_of_image,
    log_odds,
    strengths,
    summarize,
)
from hf_mim.analysis.interaction_models import classifier_of, fit_probe, plan_of
from hf_mim.analysis.run import analyze
from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.data.arguments import DataArguments


FEW = Plan(images=1, pairs=8, contexts=50, orders=(0.0, 0.25, 0.5, 1.0), grid=(2, 3), reach=2)


def test_an_additive_game_has_no_interactions():
    weights = np.random.default_rng(0).normal(size=64)
    plan = Plan(pairs=20, contexts=7, grid=(8, 8))
    found, errors = interactions(lambda present: present @ weights + 3, plan, image=0)
    assert found.shape == (7, 20) and np.abs(found).max() < 1e-12 and np.nanmax(errors) < 1e-12
    assert not strengths(found[None] * 0).any()  # and no division by nothing


def test_the_product_of_two_players_interacts_at_every_order_and_no_other_pair_does():
    plan = Plan(pairs=200, contexts=5, grid=(3, 3), reach=2, orders=(0.0, 0.5, 1.0))
    pairs = choose_pairs(plan, np.random.default_rng((plan.seed, 4)))
    found, _ = interactions(lambda present: 2.5 * present[:, 1] * present[:, 5] + present[:, 0], plan, image=4)
    known = np.where([set(pair) == {1, 5} for pair in pairs], 2.5, 0.0)
    assert 0 < (known > 0).sum() < 200
    np.testing.assert_allclose(found, np.stack([known] * 3), atol=1e-12)


def enumerated(value, players: int, pair, size: int) -> float:
    """The definition, over every context."""
    i, j = pair
    others = [player for player in range(players) if player not in pair]
    changes = []
    for context in itertools.combinations(others, size):
        both, first, second = ({*context, *added} for added in ((i, j), (i,), (j,)))
        changes.append(value(both) - value(first) - value(second) + value(set(context)))
    return sum(changes) / len(changes)


def test_few_players_give_the_enumeration_of_all_contexts_and_sampling_comes_near():
    table = dict(zip(itertools.product([False, True], repeat=6), np.random.default_rng(1).normal(size=64), strict=True))
    by_row = lambda present: np.array([table[tuple(row)] for row in present.tolist()])  # noqa: E731
    by_set = lambda members: table[tuple(player in members for player in range(6))]  # noqa: E731
    pairs = choose_pairs(FEW, np.random.default_rng((0, 0)))
    known = np.array([[enumerated(by_set, 6, pair, size) for pair in pairs.tolist()] for size in (0, 1, 2, 4)])
    found, errors = interactions(by_row, FEW, image=0)
    np.testing.assert_allclose(found, known, atol=1e-12)
    assert not errors.any()
    # Five contexts drawn of the six of order 2, for many images: right on average.
    plan = Plan(images=400, pairs=1, contexts=5, orders=(0.5,), grid=(2, 3))
    misses = []
    for image in range(400):
        (pair,) = choose_pairs(plan, np.random.default_rng((0, image))).tolist()
        sampled, _ = interactions(by_row, plan, image)
        misses.append(sampled[0, 0] - enumerated(by_set, 6, pair, 2))
    assert abs(np.mean(misses)) < 4 * np.std(misses) / 20


def test_pairs_are_near_and_contexts_have_their_size():
    plan, rng = Plan(pairs=300, contexts=9, grid=(5, 7), reach=2), np.random.default_rng(0)
    pairs = choose_pairs(plan, rng)
    offset = np.abs(np.stack(np.divmod(pairs[:, 0], 7)) - np.stack(np.divmod(pairs[:, 1], 7)))
    assert pairs.shape == (300, 2) and (offset.max(axis=0) <= 2).all() and (offset.sum(axis=0) > 0).all()
    for size in plan.sizes:
        contexts = choose_contexts(plan, pairs[0], size, rng)
        assert (contexts.sum(axis=1) == size).all() and not contexts[:, pairs[0]].any()
        assert len(contexts) == (1 if size in (0, 33) else 9)


def test_the_paper_s_orders_are_rounded_down():
    plan = Plan(**PAPER)
    assert plan.sizes == [0, 9, 19, 38, 58, 77, 97, 116, 135, 155, 174, 184, 194] and plan.players == 196
    assert plan.rows_per_image == 4 * 50 * (11 * 50 + 2)


def test_strengths_average_to_one_and_the_interval_holds_them():
    found = np.random.default_rng(0).normal(size=(30, 7, 12)) * np.linspace(0.5, 2, 7)[:, None]
    report = summarize(found, np.full_like(found, 0.1))
    assert report["J"].mean() == pytest.approx(1) and report["J"].sum() == pytest.approx(7)
    np.testing.assert_allclose(report["J"], np.abs(found).mean((0, 2)) / np.abs(found).mean())
    assert (report["low"] < report["J"]).all() and (report["J"] < report["high"]).all()
    # One standard error of the mean of 360 half-normal values is about 3 percent of it.
    assert ((report["high"] - report["low"]) / report["J"]).mean() == pytest.approx(4 * 0.04, abs=0.06)
    np.testing.assert_allclose(report["from_contexts"], 0.1)
    one = summarize(found[:1], found[:1])
    np.testing.assert_allclose(one["low"], one["J"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, truth, covered = np.random.default_rng(3), np.array([0.5, 1.0, 1.5]), []
    for _ in range(60):
        level = rng.gamma(9, 1 / 9, size=(25, 1, 1))  # images differ in how much interacts
        found = level * truth[:, None] * rng.choice([-1, 1], size=(25, 3, 4)) * rng.gamma(4, 1 / 4, size=(25, 3, 4))
        report = summarize(found, found)
        covered.append((report["low"] <= truth) & (truth <= report["high"]))
    assert 0.85 < np.mean(covered) <= 1


def test_log_odds_are_those_of_the_softmax_and_stay_finite():
    logits = torch.randn(5, 4)
    expected = logit(logits.double().softmax(dim=1)[:, 2].numpy())
    np.testing.assert_allclose(log_odds(logits, 2).numpy(), expected, rtol=1e-9)
    assert log_odds(torch.tensor([[200.0, 0.0]]), 0).item() == pytest.approx(200)


@pytest.mark.parametrize("absent", ["zero", "mean"])
def test_absent_parts_are_replaced_also_where_the_grid_does_not_divide_the_image(absent):
    plan, image = Plan(grid=(3, 2), absent=absent), torch.randn(2, 8, 6)
    present = torch.tensor([[True] * 6, [False] * 6, [True, False, True, False, True, True]])
    shown = hide_absent(image, present, plan)
    wanted = torch.stack([image] * 3)
    fill = image.mean(dim=(1, 2)) if absent == "mean" else torch.zeros(2)
    for row, y, x in itertools.product(range(3), range(8), range(6)):
        if not present[row, (y * 3 // 8) * 2 + x * 2 // 6]:
            wanted[row, :, y, x] = fill
    torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-6)


def test_a_linear_classifier_of_pixels_has_zero_and_a_product_its_own_whatever_the_batch():
    torch.manual_seed(0)
    plan, image = Plan(pairs=6, contexts=4, grid=(4, 4)), torch.randn(1, 8, 8)
    weight = torch.randn(64)

    def linear(images):
        score = images.flatten(1) @ weight
        return torch.stack([score, torch.zeros_like(score)], dim=1)  # log-odds of class 0: the score

    found, _ = interactions_of_image(linear, image, 0, plan, position=0)
    assert np.abs(found).max() < 1e-4

    def squared(images):
        score = (images.flatten(1) @ weight).square()
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    shares = (image.flatten() * weight).view(4, 2, 4, 2).sum((1, 3)).flatten().numpy()
    pairs = choose_pairs(plan, np.random.default_rng((0, 3)))
    known = 2 * shares[pairs[:, 0]] * shares[pairs[:, 1]]  # of (sum of shares)^2, at every order
    counted = []
    for batch in (5, 128):
        found, _ = interactions_of_image(squared, image, 0, plan, 3, batch, counted.append)
        np.testing.assert_allclose(found, np.stack([known] * 7), rtol=1e-3, atol=1e-3)
    assert sum(counted) == 2 * plan.rows_per_image


def test_what_is_done_is_found_again_and_only_for_the_same_plan_and_model(tmp_path):
    plan = Plan(images=3, pairs=2, orders=(0.0, 0.5))
    partial = Partial(tmp_path, plan, "weights")
    partial.add(1, np.full((2, 2), 3.0), np.full((2, 2), 4.0))
    again = Partial(tmp_path, plan, "weights")
    assert again.done.tolist() == [False, True, False] and (again.found[1] == 3).all() and (again.errors[1] == 4).all()
    assert not Partial(tmp_path, plan, "other weights").done.any()
    assert not Partial(tmp_path, Plan(images=3, pairs=2, orders=(0.0, 0.25)), "weights").done.any()
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 0}, "interaction.pairs must be at least 1, not 0"),
        ({"orders": (0.5, 1.5)}, "shares from 0 to 1"),
        ({"orders": ()}, "shares from 0 to 1"),
        ({"grid": (1, 2)}, "at least 4 parts"),
        ({"absent": "noise"}, "zero or mean, not 'noise'"),
    ],
)
def test_a_bad_plan_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Plan(**changes)


# ---- of encoders ---------------------------------------------------------------------------------------------------
TINY = ["analyze.images=12", "analyze.examples=1", "analyze.measurements=[health]", "analyze.interaction.images=3"]
TINY += ["analyze.interaction.pairs=2", "analyze.interaction.contexts=2", "analyze.interaction.grid=[4, 4]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    MIMModel(tiny_config(image_size=28, num_channels=1)).save_pretrained(folder)
    return folder


def analyze_into(folder, checkpoint, *overrides) -> tuple[dict, str]:
    out = io.StringIO()
    analyze([str(checkpoint)], [*TINY, f"analyze.output_dir={folder}", *overrides], Console(file=out, width=200))
    return json.loads((folder / "report.json").read_text())["encoders"], out.getvalue()


def test_an_analysis_goes_on_where_it_was_interrupted_and_ends_the_same(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("hf_mim.analysis.interaction_models.PROBE_IMAGES", 100)
    whole, printed = analyze_into(tmp_path / "whole", checkpoint)
    assert "interactions: 528 masked images for 2 encoders, about" in printed and "done before" not in printed
    add, added = Partial.add, []

    def counting(partial, *arguments):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(arguments[0])
        add(partial, *arguments)

    monkeypatch.setattr(Partial, "add", counting)
    with pytest.raises(KeyboardInterrupt):
        analyze_into(tmp_path / "broken", checkpoint)
    assert added == [0, 1, 2, 0]
    monkeypatch.setattr(Partial, "add", add)
    assert not (tmp_path / "broken" / "report.html").exists()
    again, printed = analyze_into(tmp_path / "broken", checkpoint, "analyze.batch_size=7")
    assert "interactions: 176 masked images" in printed and "4 of 6 images were done before" in printed
    for label, entry in whole.items():
        one, other = (found["results"]["interaction"] for found in (entry, again[label]))
        assert one["images"] == 3 and "linear probe" in one["summary"] and "3 images, 2 pairs each" in one["summary"]
        assert np.mean(one["curves"]["strength"]["mean"]) == pytest.approx(1)
        for name in ("mean", "low", "high"):
            np.testing.assert_allclose(one["curves"]["strength"][name], other["curves"]["strength"][name], rtol=1e-3)
    assert "Interaction strength" in (tmp_path / "broken" / "report.html").read_text()


def test_the_probe_finds_classes_and_a_classifier_of_ours_is_used_as_it_is(tmp_path, checkpoint):
    data, config = DataArguments(), tiny_config(image_size=28, num_channels=1, num_labels=10)
    torch.manual_seed(0)
    trained = MIMForImageClassification(config).eval()
    trained.save_pretrained(tmp_path / "classifier")
    images = EncoderImages(choose_images(data, 60, 300), config, data)
    pixel_values, labels = next(images.batches(60))
    encoder = load_encoder(str(tmp_path / "classifier"))
    own, words = classifier_of(str(tmp_path / "classifier"), encoder, images)
    torch.testing.assert_close(own(pixel_values), trained(pixel_values).logits)
    assert "own head" in words
    probe, words = classifier_of(str(checkpoint), load_encoder(str(checkpoint)), images)
    assert "linear probe" in words and "300 images" in words
    assert (probe(pixel_values).argmax(dim=1) == labels).float().mean() > 0.35  # chance is a tenth
    weight, bias, count = fit_probe(encoder, images)
    assert weight.shape == (10, 16) and bias.shape == (10,) and count == 300


@pytest.mark.parametrize(
    ("option", "found"),
    [
        (False, None),
        (True, Plan(seed=3)),
        ("paper", Plan(**PAPER, seed=3)),
        ({"pairs": 4, "orders": [0, 0.5]}, Plan(pairs=4, orders=(0, 0.5), seed=3)),
    ],
)
def test_an_option_says_the_plan(option, found):
    assert plan_of(option, seed=3) == found


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("small", "must be true, false, paper or options, not 'small'"),
        ({"pears": 3}, "did you mean 'pairs'"),
        ({"pairs": "many"}, "analyze.interaction.pairs must be"),
        ({"grid": 14}, "analyze.interaction.grid must be"),
    ],
)
def test_a_bad_option_is_refused(option, words):
    with pytest.raises(ValueError, match=words):
        plan_of(option)
