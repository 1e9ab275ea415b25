"""Pictures: what stands where in the grid of reconstructions, and the curve of the loss."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import tiny_config

from hf_mim import MIMForPreTraining
from hf_mim.training.plots import charts, grid, pictures


def reconstruction(size=(16, 16), channels=1, count=5):
    torch.manual_seed(0)
    config = tiny_config(image_size=list(size), num_channels=channels)
    return MIMForPreTraining(config).eval().reconstruct(torch.randn(count, channels, *size))


@pytest.mark.parametrize(("size", "channels"), [((28, 28), 1), ((16, 32), 3), ((224, 160), 3), ((320, 640), 1)])
def test_tiles_are_large_enough_to_look_at_and_small_ones_unblurred(size, channels):
    images = torch.rand(2, channels, *size)
    tile = pictures.to_tiles(images)[0]
    assert min(tile.size) >= 112 and max(tile.size) <= max(grid.MOST, 8 * grid.SIDE)
    assert abs(tile.size[0] / tile.size[1] - size[1] / size[0]) < 0.02
    if max(size) <= grid.MOST:
        factor = tile.size[1] // size[0]
        small = np.asarray(tile)[::factor, ::factor]
        expected = (images[0].permute(1, 2, 0).numpy() * 255).round()
        assert np.array_equal(small, np.broadcast_to(expected, small.shape))


def test_the_grid_shows_every_image_in_its_place():
    shown = reconstruction()
    canvas = np.asarray(pictures.draw_reconstructions(shown, blocks=2))
    tiles = {name: pictures.to_tiles(shown[name]) for name in pictures.COLUMNS}
    places = {name: [find(canvas, np.asarray(tile)) for tile in tiles[name]] for name in tiles}
    # three rows on the left, two on the right; within a row: original, masked, prediction, combined
    for image in range(5):
        row = [places[name][image] for name in ("original", "masked", "prediction", "combined")]
        assert len({top for top, _ in row}) == 1 and [left for _, left in row] == sorted(left for _, left in row)
    originals = places["original"]
    assert originals[0][1] == originals[1][1] == originals[2][1] < originals[3][1] == originals[4][1]
    assert originals[0][0] == originals[3][0] < originals[1][0] == originals[4][0]


def find(canvas: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """The one place where `tile` stands in `canvas`."""
    height, width, _ = tile.shape
    rows, columns = canvas.shape[0] - height + 1, canvas.shape[1] - width + 1
    agrees = np.ones((rows, columns), dtype=bool)
    for y, x in np.random.default_rng(0).integers(0, (height, width), (8, 2)):
        agrees &= (canvas[y : y + rows, x : x + columns] == tile[y, x]).all(-1)
    places = np.argwhere(agrees).tolist()
    found = [(y, x) for y, x in places if np.array_equal(canvas[y : y + height, x : x + width], tile)]
    assert len(found) == 1
    return found[0]


def test_captions_and_note_are_drawn():
    shown = reconstruction(count=1)
    plain = pictures.draw_reconstructions(shown)
    shown["note"] = "A remark that people must read, because it is important. " * 6
    noted = pictures.draw_reconstructions(shown)
    assert noted.size[0] == plain.size[0] and noted.size[1] > plain.size[1]
    assert np.asarray(noted)[plain.size[1] :].min() < 100  # ink below
    assert np.asarray(plain)[: grid.FONT].min() < 100  # and above


def test_examples_take_the_classes_in_turn():
    class Labelled:
        labels = torch.tensor([1, 1, 0, 2, 0, 1, 2])

        def __len__(self):
            return 7

    assert pictures.examples(Labelled(), 3) == [2, 0, 3]
    assert pictures.examples(Labelled(), 5) == [2, 0, 3, 4, 1]
    assert sorted(pictures.examples(Labelled(), 10)) == list(range(7))
    assert pictures.examples([0] * 4, 10) == [0, 1, 2, 3]


@pytest.mark.parametrize("window", [0, 1, 4, 5, 50])
def test_the_running_mean_is_symmetric(window):
    values = np.random.default_rng(0).normal(size=23)
    expected = []
    for i in range(23):
        reach = min(window // 2, i, 22 - i)
        expected.append(values[i - reach : i + reach + 1].mean())
    np.testing.assert_allclose(charts.running_mean(values, window), expected)


def test_where_nothing_is_hidden_no_column_is_shown_twice(monkeypatch):
    columns = []
    monkeypatch.setattr(pictures, "draw_grid", lambda tiles, *_, **__: columns.append(list(tiles)))
    whole = MIMForPreTraining(tiny_config(masking="none", encoder_config={"mask_style": "token"})).eval()
    pictures.draw_reconstructions(whole.reconstruct(torch.randn(2, 3, 16, 16)))
    pictures.draw_reconstructions(reconstruction())
    assert columns[0] == ["original", "prediction"]
    assert columns[1] == ["original", "what the model sees", "prediction", "prediction with the visible patches"]


def test_the_loss_curve_is_drawn(tmp_path):
    history = [{"step": 10 * i, "loss": 1 / (i + 1), "learning_rate": 1e-3} for i in range(30)] + [{"train_loss": 1}]
    charts.draw_loss(history, tmp_path / "loss.png")
    with PIL.Image.open(tmp_path / "loss.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert image.size[0] > 600
    assert ((colours[:, 2].astype(int) - colours[:, 0]) > 80).sum() > 200  # a blue line


def test_the_loss_curve_survives_a_run_of_one_entry(tmp_path):
    charts.draw_loss([{"step": 1, "loss": 0.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
