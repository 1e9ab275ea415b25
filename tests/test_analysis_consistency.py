"""Spatial consistency against loops, and at its ends."""

import numpy as np
import pytest
import torch
from analysis import TensorImages, full_pass
from helpers import perturb, tiny_config

from hf_mim import MIMModel
from hf_mim.analysis.consistency import ITERATIONS, Consistency, merge_half, neighbour_agreement
from hf_mim.analysis.measurement import Layer, Seen, Setting
from hf_mim.modeling.morphing import even_schedule, match_tokens


def reference(tokens, label, prototypes, grid, groups) -> dict[str, float]:
    """tokens (count, dim), prototypes (classes, dim), float64; groups: the group of every token, or None."""
    merged = tokens.copy()
    if groups is not None:
        for group in set(groups):
            members = [i for i, own in enumerate(groups) if own == group]
            merged[members] = tokens[members].mean(axis=0)

    def nearest(vector):
        return int(np.argmax([vector @ p / np.linalg.norm(p) for p in prototypes]))

    classes, mean = [nearest(token) for token in merged], tokens.mean(axis=0)
    agreements = []
    for row in range(grid[0]):
        for col in range(grid[1]):
            for other in ((row + 1, col), (row, col + 1)):
                if other[0] < grid[0] and other[1] < grid[1]:
                    agreements.append(classes[row * grid[1] + col] == classes[other[0] * grid[1] + other[1]])
    cosines = [t @ mean / np.linalg.norm(t) / np.linalg.norm(mean) for t in merged]
    return {
        "neighbour_agreement": np.mean(agreements),
        "image_agreement": np.mean([own == nearest(mean) for own in classes]),
        "token_accuracy": np.mean([own == label for own in classes]),
        "global_cosine": np.mean(cosines),
        "image_accuracy": float(nearest(mean) == label),
    }


def test_every_number_against_loops():
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(image_size=[16, 12]), add_pooling_layer=False)).eval()
    pixels, others = torch.randn(6, 3, 16, 12), torch.randn(9, 3, 16, 12)
    labels, other_labels = torch.tensor([0, 1, 2, 2, 1, 0]), torch.arange(9) % 3
    images = TensorImages(pixels, labels, (others, other_labels))
    scalars = full_pass(model, images, 4, ["consistency"])["consistency"]["scalars"]
    model.double()
    with torch.no_grad():
        pooled = model(others.double()).last_hidden_state[:, 1:].mean(dim=1).numpy()
        tokens = model(pixels.double()).last_hidden_state[:, 1:]
    prototypes = np.stack([pooled[other_labels == c].mean(axis=0) for c in range(3)])
    schedule = even_schedule(12, 6, ITERATIONS)
    for merge, matching in (("plain", None), ("morphed", "similar"), ("random", "random")):
        found = []
        for i, image in enumerate(tokens):
            generator, groups = torch.Generator().manual_seed(i), None
            if matching:
                groups = match_tokens(image[None], schedule, matching=matching, generator=generator).index[0].tolist()
                assert len(set(groups)) == 6
            found.append(reference(image.numpy(), labels[i], prototypes, (4, 3), groups))
        for name in found[0]:
            if name == "image_accuracy":
                assert scalars[name]["value"] == pytest.approx(np.mean([one[name] for one in found]))
                continue
            expected = np.mean([one[name] for one in found])
            assert scalars[f"{name}_{merge}"]["value"] == pytest.approx(expected, abs=1e-5), (name, merge)


def see(tokens: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, grid=(4, 4)) -> dict:
    measurement = Consistency(None, Setting(len(tokens), grid, grid, ["a", "b", "c"], prototypes))
    measurement.update(Seen(0, tokens, labels, tokens, Layer(tokens, grid)))
    return measurement.result()


def test_tokens_that_are_their_classes_prototype():
    labels = torch.tensor([2, 0, 1])
    tokens = torch.eye(3)[labels][:, None].expand(-1, 16, -1) * torch.rand(3, 16, 1).add(0.5)
    values = {name: scalar["value"] for name, scalar in see(tokens, labels, torch.eye(3))["scalars"].items()}
    assert len(values) == 13 and values.values() == pytest.approx([1.0] * 13)


def test_a_class_without_prototype_is_never_chosen():
    prototypes = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    tokens = -torch.rand(2, 16, 3)  # all known cosines are negative
    result = see(tokens, torch.tensor([1, 1]), prototypes)
    assert result["scalars"]["token_accuracy_plain"]["value"] == 0
    assert "1 of 3 classes had no image" in result["summary"]


def test_morphing_joins_what_is_alike_and_random_merging_does_not():
    torch.manual_seed(0)
    halves = torch.arange(16) % 2
    tokens = (torch.eye(8)[halves] + 0.01 * torch.randn(16, 8))[None]
    for matching, joined in (("similar", False), ("random", True)):
        merged = merge_half(tokens, matching, [3])
        assert len(merged[0].unique(dim=0)) == 8
        across = (merged[0, :, :2].amin(dim=1) > 0.2).any()
        assert bool(across) == joined
        torch.testing.assert_close(merged.mean(dim=1), tokens.mean(dim=1))


def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch():
    tokens = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(0))
    for matching in ("similar", "random"):
        together = merge_half(tokens, matching, [5, 6, 7, 8, 9])
        alone = torch.cat([merge_half(tokens[i : i + 1], matching, [5 + i]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_neighbours_on_a_grid():
    board = (torch.arange(3)[:, None] + torch.arange(4)) % 2
    assert neighbour_agreement(torch.stack([board, torch.zeros(3, 4)]).flatten(1), (3, 4)).tolist() == [0, 1]
    rows = torch.arange(3)[:, None].expand(3, 4).flatten()[None]
    assert neighbour_agreement(rows, (3, 4)).item() == pytest.approx(9 / 17)
    assert neighbour_agreement(torch.tensor([[1, 1, 2, 2]]), (1, 4)).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("grid", "prototypes", "words"),
    [
        ((4, 4), None, "no labels"),
        ((1, 2), torch.eye(3), "1x2 tokens"),
        ((4, 4), torch.tensor([[1.0, 0], [0, 0]]), "at least two classes"),
    ],
)
def test_where_it_cannot_be_measured_it_says_why(grid, prototypes, words):
    assert words in Consistency(None, Setting(2, grid, None, ["a"], prototypes)).absent
