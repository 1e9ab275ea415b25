"""Token diversity, Fourier spectrum and feature health per block, against float64 computations written here."""

import numpy as np
import pytest
import torch
from analysis import TensorImages, full_pass
from helpers import RESNET, perturb, tiny_config

from hf_mim import MIMModel
from hf_mim.analysis.fourier import diagonal_frequencies, diagonal_waves, relative_log_amplitude
from hf_mim.analysis.health import FeatureHealth, rank_of
from hf_mim.analysis.measurement import Averages, Layer, Seen, Setting
from hf_mim.analysis.token_diversity import TokenDiversity, subsample


SIZE = (24, 16)
PIXELS = torch.randn(7, 3, *SIZE, generator=torch.Generator().manual_seed(2))
NAMES = ["token_diversity", "fourier", "health"]
KINDS = {
    "vit": {"image_size": list(SIZE), "encoder_config": {"num_register_tokens": 1}},
    "convnet": {"image_size": [96, 64], "encoder": "convnet", "encoder_config": RESNET},
}


def make(kind: str):
    """-> the model, images, and its layers as maps (images, dim, rows, cols) float64; the last is the final one."""
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(**KINDS[kind]), add_pooling_layer=False)).eval()
    pixels = PIXELS if kind == "vit" else torch.randn(7, 3, 96, 64)
    with torch.no_grad():
        out = model.double()(pixels.double(), output_hidden_states=True)
    states = [*out.hidden_states, out.last_hidden_state]
    prefix, (rows, cols) = model.encoder.num_prefix_tokens, model.encoder.token_grid(*pixels.shape[2:])
    maps = [s if s.ndim == 4 else s[:, prefix:].transpose(1, 2).unflatten(2, (rows, cols)) for s in states]
    return model.float(), TensorImages(pixels), [tokens.numpy() for tokens in maps]


@pytest.fixture(scope="module", params=KINDS)
def measured(request):
    model, images, maps = make(request.param)
    return full_pass(model, images, 3, NAMES), maps


def spread(values) -> tuple:
    half = 1.959964 * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


def check_curve(curve: dict, expected: list, rel: float = 1e-4):
    """`expected`: per block the values of all images."""
    for key, values in zip(("mean", "low", "high"), zip(*map(spread, expected))):
        assert curve[key] == pytest.approx(list(values), rel=rel, abs=1e-5), key


# ---- token diversity -----------------------------------------------------------------------------------------------
def nearest(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(dim, rows, cols) -> the cells whose centres are nearest to those of a coarser grid."""
    picks = []
    for wanted, there in zip(grid, tokens.shape[1:]):
        centres = (np.arange(wanted) + 0.5) / wanted * there
        picks.append([min(int(centre), there - 1) for centre in centres])
    return tokens[:, picks[0]][:, :, picks[1]]


def cosine_diversity(tokens: np.ndarray) -> float:
    """tokens (count, dim), pair by pair."""
    pairs = [(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    return 1 - np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])


def test_diversity_of_every_layer_against_loops(measured):
    results, maps = measured
    curves, grid = results["token_diversity"]["curves"], maps[-1].shape[2:]
    expected = {"raw": [], "centred": [], "residual": []}
    for layer in maps[:-1]:
        found = {name: [] for name in expected}
        for image in layer:
            tokens = nearest(image, grid).reshape(len(image), -1).T
            centred = tokens - tokens.mean(axis=0)
            found["raw"].append(cosine_diversity(tokens))
            found["centred"].append(cosine_diversity(centred))
            found["residual"].append(np.linalg.norm(centred) / np.linalg.norm(tokens))
        for name, values in found.items():
            expected[name].append(values)
    for name, values in expected.items():
        check_curve(curves[name], values)


def test_encoders_are_compared_at_equal_numbers_of_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(4, 8 * 6, 5)
    measurement = TokenDiversity(None, Setting(4, (8, 6), (4, 3), []))
    measurement.layer(0, Layer(tokens, (8, 6)))
    measurement.layer(1, subsample(Layer(tokens, (8, 6)), (4, 3)))
    assert measurement.averages.mean("raw", 0) == measurement.averages.mean("raw", 1)
    measurement.update(Seen(0, tokens, None, tokens, None))
    assert "at 4x3 tokens, taken from 8x6" in measurement.result()["summary"]


def test_subsampling_takes_tokens_and_averages_nothing():
    cells = Layer(torch.arange(30.0).view(1, 30, 1), (5, 6))
    assert subsample(cells, (5, 6)) is cells
    taken = subsample(cells, (2, 3))
    assert taken.grid == (2, 3) and taken.tokens.flatten().tolist() == [7, 9, 11, 19, 21, 23]
    assert subsample(cells, (9, 2)).grid == (5, 2)  # never finer than it is


def test_diversity_at_its_ends():
    same, orthogonal = torch.ones(2, 6, 8), torch.eye(8)[:6].expand(2, -1, -1)
    measurement = TokenDiversity(None, Setting(2, (2, 3), (2, 3), []))
    for index, tokens in enumerate((same, orthogonal)):
        measurement.layer(index, Layer(tokens, (2, 3)))
    assert measurement.averages.mean("raw", 0) == pytest.approx(0, abs=1e-6)
    assert measurement.averages.mean("residual", 0) == pytest.approx(0, abs=1e-6)
    assert measurement.averages.mean("raw", 1) == pytest.approx(1, abs=1e-6)
    assert measurement.averages.mean("centred", 1) == pytest.approx(6 / 5, abs=1e-6)  # tokens / (tokens - 1)


def test_an_encoder_that_ends_in_a_few_tokens_has_no_diversity():
    assert "1x1 tokens" in TokenDiversity(None, Setting(2, (1, 1), None, [])).absent


# ---- Fourier -------------------------------------------------------------------------------------------------------
def half_diagonal(image: np.ndarray) -> np.ndarray:
    """(dim, rows, cols) -> ln|F| from the centre of the shifted spectrum to its corner, mean over dim, less its first
    value. On grids that are not square the nearest bins."""
    spectrum = np.fft.fftshift(np.abs(np.fft.fft2(image)), axes=(1, 2))
    rows, cols = image.shape[1:]
    steps, values = min(rows, cols), []
    for k in range(steps // 2 + 1):
        # The corner is at both ends of an even axis; fftshift puts it at the beginning.
        row, col = (side // 2 - round(k * side / steps) for side in (rows, cols))
        values.append(np.log(spectrum[:, row, col] + 1e-6).mean())
    return np.array(values) - values[0]


def test_fourier_of_every_layer_against_numpy(measured):
    results, maps = measured
    curves = results["fourier"]["curves"]
    maps = [layer for layer in maps[:-1] if min(layer.shape[2:]) > 1]
    spectra = [[half_diagonal(image) for image in layer] for layer in maps]
    check_curve(curves["highest"], [[s[-1] for s in layer] for layer in spectra], rel=1e-3)
    check_curve(curves["half_diagonal"], list(np.array(spectra[-1]).T), rel=1e-3)
    check_curve(curves["variance"], [layer.var(axis=(2, 3)).mean(axis=1) for layer in maps])
    steps = min(maps[-1].shape[2:])
    assert curves["half_diagonal"]["x"] == [2 * k / steps for k in range(steps // 2 + 1)]


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (4, 6), (9, 3), (2, 2)])
def test_a_wave_is_found_at_its_frequency(grid):
    rows, cols = np.meshgrid(*map(np.arange, grid), indexing="ij")
    for k, (u, v) in enumerate(diagonal_frequencies(grid)):
        wave = 1 + np.cos(2 * np.pi * (u * rows / grid[0] + v * cols / grid[1]))
        tokens = torch.from_numpy(wave.reshape(1, -1, 1)).float()
        relative = relative_log_amplitude(tokens, diagonal_waves(grid))[0]
        others = [i for i in range(1, len(relative)) if i != k]
        assert relative[0] == 0 and (relative[others] < -9).all()
        own = 0.0 if (2 * u % grid[0], 2 * v % grid[1]) == (0, 0) else np.log(0.5)  # half of it is at -k
        assert k == 0 or relative[k].item() == pytest.approx(own, abs=1e-4)
    assert len(relative) == min(grid) // 2 + 1


def test_a_checkerboard_is_the_highest_frequency_and_its_variance_is_one():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    tokens = board.view(1, 64, 1).expand(2, -1, 3)
    relative = relative_log_amplitude(tokens + 1, diagonal_waves((8, 8)))
    assert relative[0, -1] == pytest.approx(0, abs=1e-5)
    assert Layer(tokens, (8, 8)).centred_norms.square().mean() / 3 == 1


# ---- feature health ------------------------------------------------------------------------------------------------
def entropy_rank(features: np.ndarray, eps: float = 0.0) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + eps
    shares = shares[shares > 0]
    return np.exp(-(shares * np.log(shares)).sum())


def test_health_of_every_layer_against_numpy(measured):
    results, maps = measured
    health = results["health"]
    pooled = [layer.mean(axis=(2, 3)) for layer in maps]
    ranks = [entropy_rank(features - features.mean(axis=0)) for features in pooled]
    assert health["curves"]["effective_rank"]["mean"] == pytest.approx(ranks[:-1], rel=1e-3)
    assert health["scalars"]["effective_rank"]["value"] == pytest.approx(ranks[-1], rel=1e-3)
    assert health["scalars"]["rankme"]["value"] == pytest.approx(entropy_rank(pooled[-1], 1e-7), rel=1e-3)
    norms = [np.linalg.norm(layer, axis=1).reshape(len(layer), -1) for layer in maps[:-1]]
    # torch's median of an even number is the lower of the two in the middle.
    relative = [n / np.sort(n, axis=1)[:, (n.shape[1] - 1) // 2, None] for n in norms]
    check_curve(health["curves"]["largest_norm"], [r.max(axis=1) for r in relative])
    check_curve(health["curves"]["norm_outliers"], [(r > 3).mean(axis=1) for r in relative])


def test_the_deviation_of_channels_against_numpy():
    torch.manual_seed(0)
    tokens, measurement = torch.randn(6, 4, 5) + 100, FeatureHealth(None, Setting(6, (2, 2), (2, 2), []))
    tokens[..., 3] = 7.5
    for part in tokens.split(4):
        measurement.layer(0, Layer(part, (2, 2)))
        measurement.update(Seen(0, part, None, part, Layer(part, (2, 2))))
    expected = tokens.double().flatten(0, 1).std(dim=0, correction=0)
    torch.testing.assert_close(measurement.deviations(), expected, atol=1e-4, rtol=1e-4)
    scalars = measurement.result()["scalars"]
    assert scalars["dead_dimensions"]["value"] == 1 and scalars["dead_dimensions"]["unit"] == "of 5"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_features_of_equal_strength_along_some_directions_have_that_rank(count):
    assert rank_of(torch.cat([torch.full((count,), 3.0), torch.zeros(4)])) == pytest.approx(count)
    assert rank_of(torch.zeros(3)) == 0


def test_a_token_of_large_norm_is_found():
    tokens = torch.ones(3, 16, 4)
    tokens[0, 5] *= 20
    measurement = FeatureHealth(None, Setting(3, (4, 4), (4, 4), []))
    measurement.layer(0, Layer(tokens, (4, 4)))
    assert measurement.averages.mean("norm_outliers", 0) == pytest.approx(1 / 48)
    assert measurement.averages.mean("largest_norm", 0) == pytest.approx((20 + 1 + 1) / 3)


# ---- confidence ----------------------------------------------------------------------------------------------------
def test_the_interval_holds_the_true_mean_about_95_times_in_100():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        averages = Averages()
        values = torch.rand(60, generator=generator)
        averages.add("x", 0, values[:11])
        averages.add("x", 0, values[11:])
        mean, low, high = averages.interval("x", 0)
        assert mean == pytest.approx(values.double().mean().item(), rel=1e-12)
        inside += low < 0.5 < high
    assert 0.91 < inside / 400 < 0.98
