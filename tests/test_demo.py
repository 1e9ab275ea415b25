"""The demo: what it shows, the Space that it writes, and the page that runs in a browser without a network."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from hf_mim import MIMConfig, MIMForPreTraining, cli
from hf_mim.demo import app, looks, page
from hf_mim.demo.looks import Demo
from hf_mim.demo.painted import PaintedModel, to_onnx
from hf_mim.training.common import choices


SMALL = ("data.split=test", "data.max_eval_images=20")
ENCODER = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {
    "dropped": {"encoder_config": ENCODER, "decoder_config": DECODER, "target_config": {"normalize": False}},
    "rotary": {"encoder_config": {**ENCODER, "position_embedding": "rotary"}, "decoder_config": DECODER},
    "relative": {
        "encoder_config": {**ENCODER, "position_embedding": ["sincos", "relative"], "num_register_tokens": 2},
        "decoder_config": DECODER,
    },
    "token": {"encoder_config": {**ENCODER, "mask_style": "token"}, "decoder": "linear"},
    "hog": {"encoder_config": {**ENCODER, "mask_style": "add"}, "decoder": "linear", "target": "hog"},
}


def make_model(kind: str, **fields) -> MIMForPreTraining:
    torch.manual_seed(0)
    model = MIMForPreTraining(MIMConfig(**{"image_size": 16, "num_channels": 1, **KINDS[kind], **fields})).eval()
    for parameter in model.parameters():  # no weight may stay 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("dropped").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(256, size=(20, 24), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


# ---- the page ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_painted_model_predicts_what_the_model_does_under_any_mask(kind):
    model = make_model(kind)
    pixel_values, generator = torch.randn(1, 1, 16, 16), torch.Generator().manual_seed(0)
    expected, masks = [], []
    for hidden in (1, 5, 12, 15):
        mask = torch.zeros(1, 16, dtype=torch.bool)
        mask[0, torch.randperm(16, generator=generator)[:hidden]] = True
        expected.append(model.reconstruct(pixel_values, mask).prediction)
        masks.append(mask)
    painted = PaintedModel(model)
    with torch.no_grad():
        for mask, prediction in zip(masks, expected):
            torch.testing.assert_close(painted(pixel_values, mask), prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # the exporter takes ten seconds
def test_the_graph_computes_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, pixel_values = make_model("dropped"), torch.randn(1, 1, 16, 16)
    mask = torch.arange(16)[None] % 3 > 0
    expected = model.reconstruct(pixel_values, mask).prediction
    session = onnxruntime.InferenceSession(to_onnx(PaintedModel(model)))
    (prediction,) = session.run(None, {"pixel_values": pixel_values.numpy(), "hidden": mask.numpy()})
    np.testing.assert_allclose(prediction, expected.numpy(), atol=1e-5)


def test_what_a_page_cannot_show_is_said(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    assert cli.main(["demo", str(checkpoint), "--page", str(tmp_path / "page")]) == 2
    assert "a page needs onnx, onnxscript: pip install 'hf-mim[onnx]'" in capsys.readouterr().err
    monkeypatch.setattr(choices, "find_spec", lambda name: name)
    assert cli.main(["demo", str(checkpoint), "--page", str(tmp_path / "page"), "--runtime", str(tmp_path)]) == 2
    assert "is no onnxruntime-web: there is no ort.wasm.min.js" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a ViT with decoder transformer"):
        PaintedModel(make_model("dropped", decoder="cross_attention"))
    make_model("dropped", num_channels=5).save_pretrained(tmp_path / "five")
    assert cli.main(["demo", str(tmp_path / "five"), "--page", str(tmp_path / "page")]) == 2
    assert not (tmp_path / "page").exists()


def runtime() -> Path | None:
    """The package, where npm gives it."""
    folder = Path(__file__).parent.parent / "build" / "onnxruntime-web"
    if not list(folder.glob("*.tgz")) and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError):
            page.fetch_runtime(folder)
    return next(iter(folder.glob("*.tgz")), None)


@pytest.mark.slow  # a browser, and 14 MB of WebAssembly
def test_the_page_predicts_in_a_browser_without_a_network(checkpoint, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("onnxscript")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    package = runtime()
    if browser is None or package is None:
        pytest.skip("needs Chromium, and npm with its registry")
    assert cli.main(["demo", str(checkpoint), *SMALL, "--page", str(tmp_path), "--runtime", str(package)]) == 0
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        window = chromium.new_context(offline=True, color_scheme="dark").new_page()
        errors: list[str] = []
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto((tmp_path / "index.html").as_uri())
        window.wait_for_function("document.body.dataset.predictions > 0", timeout=120_000)
        assert window.inner_text("#status").startswith("12 of 16 patches hidden")
        window.click("#clear")
        window.wait_for_function("document.getElementById('status').textContent.startsWith('0 of 16')")
        paint_across(window)
        window.wait_for_function("document.getElementById('status').textContent.startsWith('4 of 16')")
        window.focus("#paint")
        window.keyboard.press("ArrowDown")
        window.keyboard.press("Space")
        window.wait_for_function("document.getElementById('status').textContent.startsWith('5 of 16')")
        seen = window.evaluate("[Array.from(state.pixels), Array.from(state.hidden), Array.from(state.prediction)]")
        chromium.close()
    assert not errors
    check_prediction(checkpoint, *map(np.array, seen))


def paint_across(window) -> None:
    """Drags the mouse over the first row of patches."""
    box = window.locator("#paint").bounding_box()
    window.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] / 8)
    window.mouse.down()
    window.mouse.move(box["x"] + box["width"] * 7 / 8, box["y"] + box["height"] / 8, steps=12)
    window.mouse.up()


def check_prediction(checkpoint, pixels: np.ndarray, hidden: np.ndarray, prediction: np.ndarray) -> None:
    """What the page drew is what the model says, to a grey level."""
    assert hidden.tolist() == [1, 1, 1, 1, 0, 0, 0, 1] + 8 * [0]
    model = MIMForPreTraining.from_pretrained(checkpoint).eval()
    image = torch.from_numpy(pixels.reshape(16, 16, 4)[None, None, :, :, 0] / 255).float()
    mean, std = (values[0] for values in model.config.statistics())
    mask = torch.from_numpy(hidden)[None].bool()
    expected = model.reconstruct((image - mean) / std, mask).prediction[0, 0].numpy() * 255
    assert np.abs(prediction.reshape(16, 16, 4)[:, :, 0] - expected).max() <= 1


# ---- the app -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo(checkpoint):
    return Demo.load(str(checkpoint), ["data.split=test"], searched=50)


def test_more_is_hidden_at_a_higher_ratio_and_the_seed_says_what(demo, image):
    assert demo.ratio == 0.75 and len(demo.reconstruct(image, 0.5)) == 4

    def masked(ratio, seed=0) -> np.ndarray:
        return np.array(dict(map(reversed, demo.reconstruct(image, ratio, seed)))["what the model sees"])

    grey = [(masked(ratio) == 128).mean() for ratio in (0.25, 0.5, 0.75)]
    assert grey == sorted(grey) and grey[2] == pytest.approx(0.75, abs=0.02)
    assert np.array_equal(masked(0.5), masked(0.5)) and not np.array_equal(masked(0.5), masked(0.5, seed=1))


def test_the_attention_has_a_map_for_each_head(demo, image):
    assert [caption for _, caption in demo.attention(image)] == ["mean of the heads", "head 0", "head 1"]


def test_an_image_of_the_data_is_its_own_nearest_neighbour(demo, tmp_path):
    index = demo.chosen[7]
    pixels = demo.images.__getitems__([index])[0].images[0, 0].numpy()
    PIL.Image.fromarray(pixels).save(tmp_path / "same.png")
    label = demo.images.classes[int(demo.images.labels[index])]
    assert demo.neighbours(tmp_path / "same.png", 3)[0][1] == f"{label}, 1.00"


def test_an_encoder_of_transformers_has_no_reconstruction(tmp_path, image):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(tmp_path)
    demo = Demo.load(str(tmp_path), ["data.split=test"], searched=10)
    assert demo.reconstruct(image, 0.5) == [] and len(demo.neighbours(image)) == 8


def test_the_whole_model_is_where_the_images_are(checkpoint, monkeypatch):
    monkeypatch.setattr(looks, "best_device", lambda: torch.device("meta"), raising=False)
    model = looks.load_predictor(str(checkpoint))
    assert model is not None and model.device.type == "meta"


def test_without_gradio_it_says_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    assert cli.main(["demo", str(checkpoint)]) == 2
    assert "pip install 'hf-mim[demo]'" in capsys.readouterr().err


@pytest.fixture
def written_for(monkeypatch):
    """`write_space` where gradio seems to be installed: it is not imported."""
    monkeypatch.setattr(choices, "find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "6.0")
    return app.write_space


def test_a_space_holds_no_path_of_this_machine_and_names_plugins(checkpoint, tmp_path, written_for, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config |= {"target_config": {"teacher": "/home/me/private/teacher"}, "plugins": ["my_module"]}
    (folder / "config.json").write_text(json.dumps(config))
    (old := tmp_path / "space" / "model").mkdir(parents=True)
    (old / "model-00001-of-00002.safetensors").write_bytes(b"old")
    written_for(str(folder), tmp_path / "space", force=True)
    assert sorted(path.name for path in old.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((old / "config.json").read_text())["target_config"] == {"teacher": "teacher"}
    assert str(tmp_path) not in (tmp_path / "space" / "README.md").read_text()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "my_module (a part) is code that is not uploaded" in said and "import it there" in said
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        written_for(str(old), tmp_path / "space", force=True)
    assert (old / "model.safetensors").is_file()


def test_a_space_of_a_model_on_the_hub(tmp_path, written_for, monkeypatch, capsys):
    config = MIMConfig(plugins=["my_module"]).to_dict()
    monkeypatch.setattr(app, "read_config", {"me/tiny": config}.__getitem__)
    (old := tmp_path / "space" / "model").mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (old / name).write_bytes(b"old")
    written_for("me/tiny", tmp_path / "space", force=True)
    assert "`hf-mim demo me/tiny --space .`" in (tmp_path / "space" / "README.md").read_text()
    assert not list(old.iterdir())
    assert "my_module (a part) is code that is not uploaded" in " ".join("".join(capsys.readouterr()).split())


def test_a_space_of_nothing_is_not_written(tmp_path, written_for):
    with pytest.raises(ValueError, match="absent was not found|no checkpoint at .*absent"):
        written_for(str(tmp_path / "absent"), tmp_path / "space")
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "s", "data.split=test"], "demo --space does not use data settings: it is for demo --page"),
        (["--page", "p", "--port", "80"], "demo --page does not use --port: it is for the app"),
        (["--page", "p", "--space", "s"], "demo --page does not use --space: choose one of the two"),
        (["--runtime", "r"], "the app of demo does not use --runtime: it is for demo --page"),
        (["--force"], "the app of demo does not use --force: it is for demo --page and demo --space"),
    ],
)
def test_what_a_demo_does_not_use_is_refused(words, message, capsys):
    assert cli.main(["demo", "me/tiny", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow  # gradio is imported
def test_a_space_is_written_and_its_app_looks_at_an_image(checkpoint, image, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    space = tmp_path / "space"
    assert cli.main(["demo", str(checkpoint), "--space", str(space)]) == 0
    assert sorted(path.name for path in space.iterdir()) == ["README.md", "app.py", "model", "requirements.txt"]
    assert sorted(path.name for path in (space / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (space / "app.py").read_text() + (space / "README.md").read_text()
    monkeypatch.chdir(space)
    names: dict = {"__name__": "space"}
    exec(compile((space / "app.py").read_text(), "app.py", "exec"), names)
    function = next(iter(names["app"].fns.values())).fn
    pictures, attention, near = function(str(image), 0.5, 0)
    assert len(pictures) == 4 and len(attention) == 3 and len(near) == 8
