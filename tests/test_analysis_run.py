"""The command analyze: one pass, results that do not depend on the batch size, and what it refuses."""

import copy
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from analysis import TensorImages, full_pass
from analysis import main as benchmark
from helpers import NATIVE_VIT, RESNET, VIT, perturb, tiny_config
from rich.console import Console
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from hf_mim import MIMModel
from hf_mim.analysis import MEASUREMENTS
from hf_mim.analysis.images import choose_images, in_turn
from hf_mim.analysis.run import analyze, common_grid, labels_for
from hf_mim.cli import main
from hf_mim.training.data.arguments import DataArguments


FEW = ["analyze.images=12", "analyze.prototype_images=20", "analyze.examples=2", "analyze.batch_size=5"]
RESNET_GREY = {"image_size": 64, "num_channels": 1, "encoder": "convnet", "encoder_config": RESNET}


def save(folder, seed=0, **fields) -> str:
    torch.manual_seed(seed)
    model = perturb(MIMModel(tiny_config(**{"image_size": 28, "num_channels": 1, **fields})))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def without_drawing():
    """What the page looks like is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mim.analysis.report.write_report", lambda folder, results: None)
        yield


def run(folder, sources, *overrides) -> dict:
    path = analyze(sources, [*FEW, f"analyze.output_dir={folder}", *overrides], Console(quiet=True))
    assert path == folder
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two of one config, and a ConvNet."""
    root = tmp_path_factory.mktemp("analyze")
    sources = [save(root / "one" / "run"), save(root / "two" / "run", seed=1), save(root / "resnet", **RESNET_GREY)]
    return run(root / "out", sources), root


# ---- the report ----------------------------------------------------------------------------------------------------
def test_every_encoder_has_its_untrained_twin(report):
    results, root = report
    encoders = results["encoders"]
    assert [label.removeprefix("untrained ").rpartition("/")[2] for label in encoders] == [
        *("run", "run", "resnet", "run", "resnet")
    ]
    trained = [entry for entry in encoders.values() if not entry["untrained"]]
    assert [entry["source"] for entry in trained] == [
        str(root / "one/run"),
        str(root / "two/run"),
        str(root / "resnet"),
    ]
    assert trained[0]["twin"] == trained[1]["twin"] != trained[2]["twin"]
    for entry in trained:
        twin = encoders[entry["twin"]]
        assert twin["untrained"] and twin["twin"] is None
        for same in ("encoder", "grid", "layers", "parameters", "image_size"):
            assert twin[same] == entry[same]
        assert twin["results"]["health"] != entry["results"]["health"]


def test_what_was_measured_is_written_down(report):
    results, root = report
    assert (
        results["command"].startswith(f"hf-mim analyze {root / 'one/run'}")
        and "analyze.images=12" in results["command"]
    )
    data = results["data"]
    assert data["images"] == 12 and data["prototype_images"] == 20 and len(data["classes"]) == 10
    assert data["from"] == "split test" and results["seed"] == 0 and results["versions"]["torch"]
    for name in results["examples"]:
        assert PIL.Image.open(root / "out" / name).size == (28, 28)
    assert len(results["examples"]) == 2 and not (root / "out" / "report.unfinished").exists()


def numbers(values) -> list[float]:
    if isinstance(values, list):
        return [number for value in values for number in numbers(value)]
    return [] if values is None else [values]


def test_results_keep_to_the_contract(report):
    results, _ = report
    entries = [entry["results"] for entry in results["encoders"].values()] + [results["between"]]
    assert all(set(entry) == set(MEASUREMENTS) for entry in entries[:-1]) and set(entries[-1]) == {"cka"}
    for result in (result for entry in entries for result in entry.values()):
        assert result["title"]
        if "absent" in result:
            assert set(result) == {"title", "absent"} and result["absent"].endswith(".")
            continue
        assert set(result) <= {"title", "summary", "normal", "images", "curves", "scalars", "heatmaps", "maps"}
        assert result["images"] == 12 and result["summary"].endswith(".") and "sign of trouble" in result["normal"]
        for curve in result.get("curves", {}).values():
            lengths = {len(curve[key]) for key in ("x", "mean", "low", "high") if curve[key] is not None}
            assert len(lengths) == 1 and curve["x_label"] and curve["y_label"] and curve["title"]
            assert np.isfinite(numbers([curve["mean"], curve["low"] or [], curve["high"] or []])).all()
        for scalar in result.get("scalars", {}).values():
            assert set(scalar) == {"title", "value", "low", "high", "unit", "normal"} and scalar["title"]
        for heatmap in result.get("heatmaps", {}).values():
            assert len(heatmap["values"]) == len(heatmap["y"]) and len(heatmap["values"][0]) == len(heatmap["x"])


def test_a_convnet_is_measured_where_it_can_be(report):
    results, _ = report
    entry = next(entry for entry in results["encoders"].values() if entry["encoder"] == "convnet resnet")
    absent = {name for name, result in entry["results"].items() if "absent" in result}
    assert absent == {"attention_flow"} and entry["grid"] == [2, 2]
    first = next(iter(results["encoders"].values()))["results"]["token_diversity"]
    assert "at 2x2 tokens, taken from 7x7" in first["summary"]


# ---- one pass ------------------------------------------------------------------------------------------------------
def test_results_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    model = perturb(MIMModel(tiny_config(), add_pooling_layer=False)).eval()
    images = TensorImages(
        torch.randn(70, 3, 16, 16), torch.arange(70) % 3, (torch.randn(9, 3, 16, 16), torch.arange(9) % 3)
    )
    small, large = (full_pass(model, images, batch_size) for batch_size in (3, 64))
    assert set(small) == set(MEASUREMENTS)

    def same(one, other, path=""):
        assert type(one) is type(other), path
        if isinstance(one, dict):
            assert set(one) == set(other), path
            for key in one:
                same(one[key], other[key], f"{path}.{key}")
        elif isinstance(one, list):
            assert len(one) == len(other), path
            for i, pair in enumerate(zip(one, other)):
                same(*pair, f"{path}[{i}]")
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=1e-4, abs=2e-5), path
        else:
            assert one == other, path

    same(small, large)


@pytest.mark.parametrize("fields", [{}, {"encoder": "native", "encoder_config": NATIVE_VIT}])
def test_every_image_is_encoded_once(fields, monkeypatch):
    model = MIMModel(tiny_config(**fields), add_pooling_layer=False).eval()
    encoded, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda pixels, **options: encoded.append(len(pixels)) or forward(pixels, **options)
    )
    images = TensorImages(
        torch.randn(10, 3, 16, 16), torch.arange(10) % 2, (torch.randn(4, 3, 16, 16), torch.arange(4) % 2)
    )
    full_pass(model, images, 4)
    assert encoded == [4, 4, 4, 2]  # the prototypes', then the measured ones
    encoded.clear()
    full_pass(model, images, 4, ["cka", "health"])
    assert encoded == [4, 4, 2]


def test_the_benchmark_at_a_reduced_size(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert benchmark(["--quick", "--each", "--out", str(page)]) > 0
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in ("plain", "all measurements", *MEASUREMENTS))
    assert "all measurements over a plain pass" in page.read_text()


def test_half_precision_checkpoints_are_measured_in_float32(tmp_path):
    MIMModel(tiny_config(image_size=28, num_channels=1)).bfloat16().save_pretrained(tmp_path / "bf16")
    results = run(tmp_path / "out", [str(tmp_path / "bf16")], "analyze.measurements=[health]")
    assert results["encoders"]["bf16"]["results"]["health"]["images"] == 12


def test_a_model_of_transformers_with_three_channels_at_another_size(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(**{**VIT, "intermediate_size": 32}, image_size=16)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    results = run(tmp_path / "out", [str(tmp_path / "vit")], "analyze.image_size=[24, 16]")
    entry = results["encoders"]["vit"]
    assert entry["grid"] == [6, 4] and entry["encoder"] == "native vit"
    assert not [name for name, result in entry["results"].items() if "absent" in result]


def test_a_measurement_of_ones_own(tmp_path, monkeypatch):
    from hf_mim.analysis.measurement import Measurement

    class Brightness(Measurement):
        title = "Brightness"

        def __init__(self, model, setting):
            super().__init__(model, setting)
            self.total = 0.0

        def update(self, seen):
            self.total += seen.pixel_values.mean(dim=(1, 2, 3)).sum().item()

        def result(self):
            summary = f"{self.total / self.setting.images:.3f}"
            return {"title": self.title, "summary": summary, "normal": "", "images": self.setting.images}

    monkeypatch.setitem(MEASUREMENTS, "brightness", Brightness)
    results = run(tmp_path / "out", [save(tmp_path / "run")], "analyze.measurements=[brightness]")
    assert -1 < float(results["encoders"]["run"]["results"]["brightness"]["summary"]) < 1


# ---- images --------------------------------------------------------------------------------------------------------
def write_images(folder, count: int, classes: int = 0, size=(12, 12)):
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(place / f"{i}.png")
    return folder


def test_without_labels_consistency_is_absent(tmp_path):
    folder = write_images(tmp_path / "photos", 9)
    results = run(tmp_path / "out", [save(tmp_path / "run")], f"data.dataset={folder}")
    assert "no labels" in results["encoders"]["run"]["results"]["consistency"]["absent"]
    assert results["data"]["images"] == 9 and results["data"]["classes"] == []


def test_images_for_prototypes_are_not_measured(tmp_path):
    folder = write_images(tmp_path / "photos", 40, classes=4)
    choice = choose_images(DataArguments(dataset=str(folder)), 500, 8)
    measured, others = ({row["path"] for row in part["image"]} for part in (choice.measured, choice.others))
    assert len(measured) == 20 and len(others) == 8 and not measured & others
    assert choice.others["label"][:].count("class0") == 2 and "half of split train" in choice.note


def test_prototypes_take_the_classes_in_turn():
    labels = [0] * 50 + [1] * 3 + [2] + [None, -1]
    chosen = [labels[i] for i in in_turn(labels, 8)]
    assert sorted(chosen[:3]) == [0, 1, 2] and chosen.count(1) == 3 and chosen.count(2) == 1 and len(chosen) == 8
    assert len(in_turn(labels, 1000)) == 54


def test_two_images_are_enough(tmp_path):
    folder = write_images(tmp_path / "photos", 2)
    results = run(tmp_path / "out", [save(tmp_path / "run")], f"data.dataset={folder}")["encoders"]["run"]["results"]
    assert "at least 4 images" in results["cka"]["absent"] and results["attention_flow"]["images"] == 2


def test_the_smallest_grid():
    assert common_grid([(7, 7), (4, 9), (1, 1)]) == (4, 7) and common_grid([(1, 2)]) is None


def test_labels_are_short_and_different():
    assert labels_for(["a/b/x", "c/b/x", "y/"]) == ["a/b/x", "c/b/x", "y"]
    assert labels_for(["me/one", "me/two"]) == ["one", "two"]


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("run")
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)).save_pretrained("bert")
    one, bad = str(write_images(tmp_path / "one", 1)), ("run", "data.dataset=./none")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.html").touch()
    before = {path.name for path in tmp_path.iterdir()}
    for words, expected in (
        ((), "checkpoint"),
        (("analyze.images=5",), "which encoder?"),
        (("./nowhere",), "no checkpoint at ./nowhere"),
        (("bert",), "'bert' model, which takes no images"),
        (("run", "./run/"), "./run/ is given twice"),
        (("run", "analyze.image_size=30"), "30x30 is not divisible by the patch 4x4; 32x32 would be"),
        (("run", f"data.dataset={one}"), "at least 2 images, and"),
        (bad, "no file or folder ./none"),
        (("run", "analyze.imags=3"), "did you mean 'images'"),
        (("run", "model.encoder=vit"), "unknown section 'model'"),
        (("run", "analyze.images=1"), "analyze.images must be at least 2"),
        (("run", "analyze.measurements=[ckaa]"), "did you mean 'cka'"),
        (("run", "data.streaming=true"), "data.streaming must be false"),
        (("run", "analyze.output_dir=old"), "old holds another run"),
    ):
        code = main(["analyze", *words])
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, words
        assert expected.lower() in error.lower(), (words, error)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_command_prints_its_folder_when_it_begins_and_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("run")
    assert main(["analyze", "run", *FEW, "analyze.measurements=[cka]"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"output folder: outputs/analyze-run-[\d-]+", lines[-1]) and lines.count(lines[-1]) == 2
    assert (tmp_path / lines[-1].removeprefix("output folder: ") / "report.json").is_file()


def test_encoders_that_cannot_be_analysed_are_refused():
    from hf_mim.analysis.run import check_tokens

    model = MIMModel(tiny_config(), add_pooling_layer=False).eval()
    other = copy.deepcopy(model)
    other.encoder.num_prefix_tokens = 5
    check_tokens("good", model, (16, 16))
    broken = copy.deepcopy(model)
    broken.encoder.layers[1].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="broken gives values that are not finite"):
        check_tokens("broken", broken, (16, 16))
    with pytest.raises(ValueError, match="18x16 is not divisible"):
        check_tokens("good", model, (18, 16))
    with pytest.raises(ValueError, match="bad cannot be analysed: it gives 17 tokens, where a 4x4 grid and 5"):
        check_tokens("bad", other, (16, 16))
