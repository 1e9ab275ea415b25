"""Token morphing against a dense float64 computation with membership matrices, and its exact properties."""

import numpy as np
import pytest
import torch
from helpers import random_masks, target_options, tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.modeling.morphing import draw_schedule, even_schedule, match_tokens
from hf_mim.modeling.parts import make_encoder
from hf_mim.modeling.target_morphing import TokenMorphingTarget


def dense_reference(values: np.ndarray, schedule: list[int], halves: str, means: str, orders: list[np.ndarray]):
    """One image (tokens, dim) in float64: -> membership (groups, tokens), weights of the means (groups, tokens).

    Straight from the description: a matrix per iteration, cosines of the actual means, one loop over proposals.
    """
    membership, weights = np.eye(len(values)), np.eye(len(values))
    for merged, order in zip(schedule, orders):
        current = weights @ values
        unit = current / np.linalg.norm(current, axis=1, keepdims=True)
        first, second = (
            (order[::2], order[1::2])
            if halves == "alternating"
            else (order[: len(order) // 2], order[len(order) // 2 :])
        )
        similarity = unit[first] @ unit[second].T
        best = similarity.max(axis=1)
        if halves == "alternating":
            best[0] = -np.inf
        proposals = np.argsort(-best, kind="stable")
        merge = np.zeros((len(second) + len(first) - merged, len(order)))
        left = len(first) - merged
        merge[left + np.arange(len(second)), second] = 1
        merge[np.arange(left), first[np.sort(proposals[merged:])]] = 1
        for proposal in proposals[:merged]:
            merge[left + similarity[proposal].argmax(), first[proposal]] = 1
        membership = merge @ membership
        mean_of_means = (merge / merge.sum(axis=1, keepdims=True)) @ weights
        weights = membership / membership.sum(axis=1, keepdims=True) if means == "size" else mean_of_means
    return membership, weights


@pytest.mark.parametrize("halves", ["random", "alternating"])
@pytest.mark.parametrize("means", ["size", "iterated"])
def test_groups_and_means_against_dense_matrices(halves, means):
    torch.manual_seed(0)
    values, schedule = torch.randn(3, 24, 8), [5, 5, 4, 2]
    groups = match_tokens(values, schedule, halves, means, generator=torch.Generator().manual_seed(7))
    generator, orders, left = torch.Generator().manual_seed(7), [], 24
    for merged in schedule:
        order = torch.randperm(left, generator=generator) if halves == "random" else torch.arange(left)
        orders.append(order.numpy())
        left -= merged
    for image in range(3):
        double = values[image].double().numpy()
        membership, weights = dense_reference(double, schedule, halves, means, orders)
        assert np.array_equal(membership.argmax(axis=0), groups.index[image].numpy())
        np.testing.assert_allclose(groups.means(values)[image].numpy(), weights @ double, rtol=0, atol=1e-5)
        assert np.array_equal(membership.sum(axis=1), groups.size[image].numpy())


@pytest.mark.parametrize("means", ["size", "iterated"])
def test_every_token_is_in_one_group_and_the_mean_is_kept(means):
    values = torch.randn(4, 49, 16)
    groups = match_tokens(values, even_schedule(49, 30, 5), means=means)
    assert groups.count == 49 - 30
    dense = torch.nn.functional.one_hot(groups.index, groups.count)
    assert (dense.sum(2) == 1).all() and (dense.sum(1) == groups.size).all() and (groups.size >= 1).all()
    torch.testing.assert_close(groups.means(torch.ones(4, 49, 1)), torch.ones(4, groups.count, 1))
    if means == "size":
        kept = (groups.means(values) * groups.size[..., None]).sum(1) / 49
        torch.testing.assert_close(kept, values.mean(1), rtol=1e-4, atol=1e-6)


def test_equal_tokens_are_merged_first_and_random_partners_differ():
    values = torch.randn(2, 16, 32)
    values[:, 8:] = values[:, :8]
    groups = match_tokens(values, [4, 3, 2], generator=torch.Generator().manual_seed(0))
    together = groups.index[:, :8] == groups.index[:, 8:]
    control = match_tokens(values, [4, 3, 2], matching="random", generator=torch.Generator().manual_seed(0))
    assert together.float().mean() > 0.5 > (control.index[:, :8] == control.index[:, 8:]).float().mean()


def test_schedules_end_with_a_token_and_are_drawn_as_the_released_code_does():
    """methods.md, section 3: on average 98.6 of 196 tokens are left, at least 8, and 0.5 percent are the identity."""
    generator = torch.Generator().manual_seed(0)
    left = [196 - sum(draw_schedule(196, 14, generator)) for _ in range(20_000)]
    assert np.mean(left) == pytest.approx(98.6, abs=1.5)
    assert 1 <= min(left) <= 12 and np.mean(np.array(left) == 196) == pytest.approx(0.005, abs=0.002)
    assert even_schedule(10, 0, 3) == [] and even_schedule(9, 9, 1) == [4]
    assert sum(even_schedule(196, 98, 7)) == 98


def morphing(folder=None, **options) -> TokenMorphingTarget:
    config = tiny_config(image_size=32, target="token_morphing")
    encoder = make_encoder(config)
    return TokenMorphingTarget(config, encoder, features={"name": "pixel", "normalize": False}, **options)


def test_no_merging_is_the_token_wise_loss():
    target = morphing(num_merged=0, num_iterations=1, loss="mse")
    predicted, wanted = torch.randn(2, 64, 48), torch.randn(2, 64, 48)
    loss = target.loss({"patches": predicted}, {"patches": wanted}, random_masks(2, 64, 30), (8, 8))
    torch.testing.assert_close(loss, (predicted - wanted).square().mean())


@pytest.mark.parametrize("group_weights", ["size", "uniform"])
def test_loss_against_a_float64_loop(group_weights):
    target = morphing(num_merged=40, num_iterations=5, num_draws=2, group_weights=group_weights, loss="smooth_l1")
    predicted, wanted = torch.randn(2, 64, 48), torch.randn(2, 64, 48)
    generator = torch.Generator().manual_seed(3)
    loss = target.loss({"patches": predicted}, {"patches": wanted}, random_masks(2, 64, 30), (8, 8), generator)
    generator, draws = torch.Generator().manual_seed(3), []
    for _ in range(2):
        groups, total, weights = target.morph(wanted, generator), 0.0, 0.0
        for image in range(2):
            for group in range(groups.count):
                members = groups.index[image] == group
                gap = (predicted[image, members].double().mean(0) - wanted[image, members].double().mean(0)).abs()
                cost = torch.where(gap < 2, gap**2 / 4, gap - 1).mean().item()
                weight = members.sum().item() if group_weights == "size" else 1
                total, weights = total + weight * cost, weights + weight
        draws.append(total / weights)
    assert loss.item() == pytest.approx(np.mean(draws), rel=1e-5)


def test_gradients_are_equal_within_a_group_and_stop_at_the_targets():
    target = morphing(num_merged=40, num_iterations=5, num_draws=1)
    predicted, wanted = torch.randn(1, 64, 48, requires_grad=True), torch.randn(1, 64, 48, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    values = {"patches": wanted.detach()}
    target.loss({"patches": predicted}, values, random_masks(1, 64, 30), (8, 8), generator).backward()
    groups = target.morph(wanted.detach(), torch.Generator().manual_seed(1))
    for group in range(groups.count):
        gradients = predicted.grad[0, groups.index[0] == group]
        torch.testing.assert_close(gradients, gradients[:1].expand_as(gradients))
    assert wanted.grad is None


def test_morphing_does_not_raise_token_diversity():
    def diversity(tokens):
        unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
        cosines = unit @ unit.transpose(1, 2)
        count = tokens.shape[1]
        return (1 - (cosines.sum((1, 2)) - count) / (count * (count - 1))).mean().item()

    values = torch.randn(8, 49, 16)
    groups = match_tokens(values, even_schedule(49, 25, 5))
    scattered = groups.means(values).gather(1, groups.index[..., None].expand(-1, -1, 16))
    assert diversity(scattered) <= diversity(values)


def test_draws_follow_the_generator():
    target = morphing()
    args = ({"patches": torch.randn(2, 64, 48)}, {"patches": torch.randn(2, 64, 48)}, random_masks(2, 64, 30), (8, 8))
    losses = [target.loss(*args, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_what_is_refused(tmp_path):
    config = {"image_size": 32, "encoder_config": {"patch_size": 8}, "target": "token_morphing"}
    discrete = {"name": "discrete_token", **target_options("discrete_token", tmp_path)}
    several = {"name": "teacher_features", **target_options("teacher_features", tmp_path)}
    for options, message in (
        ({"features": discrete}, "needs token features"),
        ({"features": several}, "takes one teacher: set features.name=teacher_feature"),
        ({}, "needs target_config.features"),
        ({"features": {"name": "hogg"}}, "did you mean 'hog'"),
        ({"features": {"name": "hog"}, "num_merged": 3}, "set both or neither"),
        ({"features": {"name": "hog"}, "halves": "odd"}, "halves 'odd'"),
    ):
        with pytest.raises(ValueError, match=message):
            MIMForPreTraining(tiny_config(**config, target_config=options))
