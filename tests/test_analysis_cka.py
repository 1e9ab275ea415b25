"""Linear CKA against the definition of the unbiased HSIC, and at its ends."""

import numpy as np
import pytest
import torch

from hf_mim.analysis.cka import CKA, WINDOW
from hf_mim.analysis.measurement import Layer, Seen, Setting


def hsic_by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """Song et al. (1211.4811), equation 5, of the Gram matrices of (images, dim) features."""
    n = len(first)
    k, m = first @ first.T, second @ second.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    ones = np.ones(n)
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def measure(layers: list[torch.Tensor], batch_size: int = 7) -> CKA:
    """layers: (images, dim) each, as encoders with a single token."""
    count = len(layers[0])
    measurement = CKA(None, Setting(count, (1, 1), None, []))
    for start in range(0, count, batch_size):
        for index, features in enumerate(layers):
            measurement.layer(index, Layer(features[start : start + batch_size, None], (1, 1)))
        measurement.update(Seen(start, layers[0][start : start + batch_size], None, None, None))
    return measurement


def values(measurement: CKA) -> np.ndarray:
    return np.array(measurement.result()["heatmaps"]["layers"]["values"], dtype=float)


def features(count: int = 150, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 6, generator=generator)
    second = first @ torch.randn(6, 9, generator=generator) + torch.randn(count, 9, generator=generator) + 5
    return [first, second, torch.randn(count, 4, generator=generator)]


def test_against_the_definition_by_windows():
    layers = features()
    found, windows = values(measure(layers)), [slice(0, 64), slice(64, 128), slice(128, 150)]
    double = [layer.double().numpy() for layer in layers]
    sums = np.zeros((3, 3))
    for window in windows:
        count = window.stop - window.start
        for i, one in enumerate(double):
            for j, other in enumerate(double):
                sums[i, j] += count * hsic_by_definition(one[window], other[window])
    own = np.sqrt(np.diag(sums))
    np.testing.assert_allclose(found, sums / own[:, None] / own, atol=2e-5)
    assert WINDOW == 64


def test_rotation_scale_and_shift_change_nothing():
    first = features()[0]
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3))).Q
    np.testing.assert_allclose(values(measure([first, 3 * first @ rotation - 2])), 1, atol=1e-4)


def test_unrelated_features_have_no_cka_on_average():
    """Unbiased: around zero, where the plain estimate of so few images would be far above."""
    found, plain = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        pair = [torch.randn(64, 100, generator=generator) for _ in range(2)]
        found.append(values(measure(pair))[0, 1])
        grams = [(x - x.mean(0)) @ (x - x.mean(0)).T for x in pair]
        plain.append(((grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm()).item())
    assert abs(np.mean(found)) < 0.01 and np.mean(plain) > 0.5


@pytest.mark.parametrize("batch_size", [1, 13, 64, 200])
def test_the_batch_size_does_not_matter(batch_size):
    layers = features(131)  # the last 3 images make no window
    np.testing.assert_allclose(values(measure(layers, batch_size)), values(measure(layers, 7)), atol=1e-6)


def test_between_encoders():
    layers, rotation = features(200), torch.linalg.qr(torch.randn(9, 9)).Q
    other = [layers[2], layers[1] @ rotation]
    result = CKA.compare({"a": measure(layers[:2]), "b": measure(other), "c": measure(features(200, seed=5)[:1])})
    assert set(result["heatmaps"]) == {"a / b", "a / c", "b / c"}
    heatmap = result["heatmaps"]["a / b"]
    assert heatmap["y_label"] == "block of a" and heatmap["x_label"] == "block of b"
    assert len(heatmap["values"]) == 2 and len(result["heatmaps"]["b / c"]["values"][0]) == 1
    assert heatmap["values"][1][1] == pytest.approx(1, abs=1e-4) and abs(heatmap["values"][1][0]) < 0.2
    joint = values(measure([*layers[:2], *other]))
    np.testing.assert_allclose(np.array(heatmap["values"]), joint[:2, 2:], atol=2e-5)
    for scalar in result["scalars"].values():
        assert scalar["low"] <= scalar["value"] <= scalar["high"]
    assert "a and b" in result["summary"]
    assert CKA.compare({"a": measure(layers)}) is None


def test_layers_that_do_not_vary_have_no_value():
    constant = measure([torch.ones(20, 3), features(20)[0]])
    result = constant.result()
    assert result["heatmaps"]["layers"]["values"][0] == [None, None] and "no CKA" in result["summary"]
    flat = measure([torch.ones(20, 3)])
    assert CKA.compare({"a": flat, "b": constant}) is None  # none of its last blocks can be compared


def test_too_few_images():
    assert "at least 4 images" in CKA(None, Setting(3, (2, 2), (2, 2), [])).absent
