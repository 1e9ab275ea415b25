"""The comparisons that start processes, grow models or want a GPU, at a reduced size: that they run. Never how fast."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_attention
import gpu_processes
import gpu_steps
import growth
import long_run
import numpy as np
import pytest
import start_up
import torch


def test_growth(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    results = growth.main(["--quick", "--out", str(page)])
    assert set(results) == set(growth.QUANTITIES)
    for name, entries in results.items():
        assert [entry["amount"] for entry in entries] == sorted(entry["amount"] for entry in entries), name
        assert all(entry["seconds"] > 0 and entry["memory"] > 0 for entry in entries)
        assert entries[0]["time_over_linear"] == entries[0]["memory_over_linear"] == 1
    # Twice the images are twice the activations, beside gradients of the same size; two processes hold twice as much.
    assert 0.5 < results["images"][1]["memory_over_linear"] < 1.1
    assert results["processes"][1]["memory"] > 1.5 * results["processes"][0]["memory"]
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "growth, processes 1 to 2: time over linear" in page.read_text()


def test_over_linear_is_the_growth_over_that_of_the_quantity():
    entries = growth.compared([2, 4, 8], [(1.0, 10.0), (2.0, 10.0), (8.0, 10.0)])
    assert [entry["time_over_linear"] for entry in entries] == [1, 1, 2]
    assert [entry["memory_over_linear"] for entry in entries] == [1, 0.5, 0.25]


@pytest.fixture(scope="module")
def gpu_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    words = ["--device", "cpu", "--tiny", "--steps", "1", "--rounds", "2", "--state", str(folder / "state")]
    return folder, words, gpu.main([*words, "--out", str(folder / "benchmarks.md")])


def test_gpu_runs_reduced_on_a_processor(gpu_rows):
    folder, _, found = gpu_rows
    assert set(found) == set(gpu.PARTS)
    for name, (*_, arms) in gpu.ROWS.items():
        assert set(found[name]["images_per_second"]) == set(found[name]["memory"]) == set(arms)
        assert all(0 < low <= middle <= high for low, middle, high in found[name]["images_per_second"].values())
        assert not found[name]["mfu"] and all(value > 0 for value in found[name]["memory"].values())
    assert 0 < found[gpu_steps.DTM]["morphing"][1] < 1
    assert found[gpu.LOADER]["workers"]["1"] > 0
    assert all(0 < by["sdpa"]["gradient_error"] < 0.01 for by in found[gpu.ATTENTION].values())  # 8 bits
    assert 0 < found[gpu.QUICK]["as it is"]["seconds"] < found[gpu.QUICK]["as it is"]["whole_seconds"]
    page = (folder / "benchmarks.md").read_text()
    assert "to see that it runs" in page and "Morphing alone takes" in page and "the loader is the limit" in page


def test_gpu_goes_on_where_it_was_stopped(gpu_rows, monkeypatch, capsys):
    _, words, found = gpu_rows
    monkeypatch.setattr(gpu, "measure_row", lambda name, *args: pytest.fail(f"{name} ran again"))
    monkeypatch.setattr(gpu, "measure_loader", lambda args: pytest.fail("the loader ran again"))
    assert gpu.main(words) == found
    assert gpu.main([*words, "--only", gpu_steps.DTM, "--again", "--minutes", "-1"]) == {}
    assert "the same command goes on from there" in capsys.readouterr().err


def test_gpu_measures_steps_where_datasets_are_missing(tmp_path, monkeypatch, capsys):
    absent = ("datasets", "pyarrow", "evaluate", "peft", "accelerate")
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in absent), "import gpu", "print(len(gpu.ROWS))"]
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(lines)], cwd=Path(gpu.__file__).parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(len(gpu.ROWS)), done.stderr

    def missing(args):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(gpu, "measure_loader", missing)
    assert gpu.main(["--device", "cpu", "--only", gpu.LOADER, "--state", str(tmp_path)]) == {}
    assert "loader: left out, this machine has no datasets" in capsys.readouterr().err


def test_gpu_says_what_is_reached():
    medians = {gpu.OURS: 100.0, gpu.SHORT: 104.0, gpu.CROSS: 105.0, gpu.PEER: 95.0}
    speeds = {name: [90.0, median, 110.0] for name, median in medians.items()}
    ratios = {f"{gpu.OURS} / {gpu.PEER}": [1.2, 1.31, 1.4], f"{gpu.CROSS} / {gpu.PEER}": [1.4, 1.5, 1.6]}
    ratios[f"{gpu.SHORT} / {gpu.PEER}"] = [1.3, 1.4, 1.5]
    entry = {"images_per_second": speeds, "ratios": ratios, "mfu": {gpu.OURS: 0.38, gpu.PEER: 0.3}}
    rows = gpu.rows_of({gpu.MAE_BASE: entry, gpu.LOADER: {}})
    assert [gpu.row(**one)["goal"] for one in rows] == [1.3, None, None, 0.4]
    assert "| at least 1.3 | 1.31 | reached |" in gpu.verdicts(rows)
    assert "| at least 0.4 | 0.38 | **not reached** |" in gpu.verdicts(rows)
    loader = {
        gpu.MAE_BASE: {"images_per_second": {gpu.OURS: [1, 150, 200]}},
        gpu.LOADER: {"workers": {"1": 80, "2": 160}},
    }
    assert "takes 150: 2 workers keep up" in gpu.loader_words(loader)
    loader[gpu.LOADER]["workers"].pop("2")
    assert "1 do not keep up" in gpu.loader_words(loader)


def test_gpu_arms_run_in_processes_of_their_own(tmp_path):
    words = ["--device", "cpu", "--tiny", "--steps", "1", "--rounds", "2", "--state", str(tmp_path)]
    args = gpu.arguments([*words, "--profile", gpu_steps.DTM])
    started = gpu.start_rows([gpu_steps.DTM], args)[gpu_steps.DTM]
    found = gpu.measure(gpu_steps.DTM, args, started)
    assert set(found["images_per_second"]) == set(started) == {gpu.OURS, gpu.STORED}
    assert found["morphing"][1] > 0 and len(list(tmp_path.glob("DTM*.txt"))) == 2
    for served in started.values():
        served.process.join(60)
        assert not served.process.is_alive()


def test_gpu_leaves_out_an_arm_that_fails(tmp_path, capsys):
    """One that stops while it is made, and one that is killed; without that of hf_mim there is no row."""
    words = ["--device", "cpu", "--tiny", "--steps", "1", "--rounds", "1", "--state", str(tmp_path)]
    args = gpu.arguments(words)
    nothing = gpu_processes.Served(gpu_steps.Runner, gpu_steps.DTM, "nothing", SimpleNamespace(tiny=True))
    started = gpu.start_rows([gpu_steps.DTM], args)[gpu_steps.DTM]
    assert gpu_processes.answers({"nothing": nothing.ready}) == {}
    assert "AttributeError" in capsys.readouterr().err
    started[gpu.STORED].process.kill()
    found = gpu_steps.measure_row(gpu_steps.DTM, args, started)
    assert found["left_out"] == [gpu.STORED] and set(found["memory"]) == {gpu.OURS} and found["ratios"] == {}
    assert f"left out: {gpu_steps.DTM}, {gpu.STORED}: its process ended with code -9" in capsys.readouterr().err
    assert f"Left out, since they failed: {gpu.STORED}." in gpu.report({gpu_steps.DTM: found}, args)
    started[gpu.OURS].process.kill()
    with pytest.raises(RuntimeError, match="the arm hf_mim failed"):
        gpu_steps.measure_row(gpu_steps.DTM, args, started)


def test_gpu_leaves_out_attention_that_is_wrong(capsys):
    facts = {gpu.OURS: {"first": (1.0, 2.0)}, gpu.SHORT: {"first": (1.01, 2.02)}}
    assert gpu_steps.without_wrong(facts) == facts
    facts[gpu.SHORT]["first"] = (1.0, 2.2)
    assert set(gpu_steps.without_wrong(facts)) == {gpu.OURS}
    assert "loss and norm of the gradient are (1.0, 2.2), not (1.0, 2.0)" in capsys.readouterr().err
    figures = {"forward": 1.0, "both": 2.0, "gradient_error": float("nan")}
    assert "mim_short computes a wrong gradient: few" in gpu.attention_words({"few": {"mim_short": figures}})
    figures["gradient_error"] = 0.003
    assert "wrong" not in gpu.attention_words({"few": {"mim_short": figures}})


def test_gpu_part_in_a_process_of_its_own_says_what_is_missing(tmp_path):
    args = gpu.arguments(["--device", "cpu", "--tiny", "--steps", "1", "--rounds", "1", "--state", str(tmp_path)])
    assert set(gpu_processes.in_own_process(gpu.measure_attention, args)) == set(gpu_attention.SHAPES)
    with pytest.raises(ModuleNotFoundError) as told:
        gpu_processes.in_own_process(importlib.import_module, "no_such_package")
    assert told.value.name == "no_such_package"


def test_gpu_waits_for_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    results = iter([torch.OutOfMemoryError("held"), torch.OutOfMemoryError("held"), 3])

    def compute():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    assert gpu_steps.when_there_is_memory(compute, pause=0.0) == 3
    results = iter([torch.OutOfMemoryError("held")] * 2)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_steps.when_there_is_memory(compute, tries=2, pause=0.0)


def test_gpu_a_teacher_sees_every_step():
    args = gpu.arguments(["--device", "cpu", "--tiny", "--steps", "2", "--rounds", "1"])
    runner = gpu_steps.Runner(gpu_steps.DTM, gpu.OURS, args)
    (teacher,) = gpu_steps.teachers_of(runner.made.model.target)
    seen = []
    teacher.model().encoder.register_forward_hook(lambda *given: seen.append(1))
    runner.seconds()
    assert len(seen) == 1 + args.steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_refuses_a_machine_without_one():
    with pytest.raises(SystemExit, match="needs a GPU with CUDA"):
        gpu.main([])


def test_start_up_compares_what_it_says(monkeypatch, tmp_path):
    cheap = {"hf-mim --help": ["--help"]}
    monkeypatch.setattr(start_up, "PAIRS", ((start_up.IMPORT, "import json"),))
    monkeypatch.setattr(start_up, "COMMANDS", cheap)
    page = tmp_path / "benchmarks.md"
    seconds = start_up.main(["--rounds", "2", "--out", str(page)])
    assert set(seconds) == {start_up.IMPORT, "import json", *cheap}
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert "start-up: `import hf_mim` over `import json`" in page.read_text()


def test_processor_time_of_a_process_is_measured():
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    assert 0.45 < start_up.processor_seconds(["-c", burn]) < 0.8
    assert start_up.processor_seconds(["-c", "import time; time.sleep(0.5)"]) < 0.2


@pytest.mark.slow
def test_long_run(tmp_path):
    """Few steps: what their memory does says nothing, so that every slope is within the bound."""
    page, samples = tmp_path / "benchmarks.md", tmp_path / "samples.json"
    small = ["data.max_train_images=16", "training.per_device_train_batch_size=4", "training.bf16=false"]
    words = [
        "--minutes",
        "5",
        "--steps",
        "40",
        "--every",
        "0.1",
        "--save-steps",
        "2",
        "--watch-every",
        "1000",
        "--bound",
        "1e9",
    ]
    code = long_run.main([*words, "--workers", "0", "--json", str(samples), "--out", str(page), *small])
    assert code == 0 and "MB per 1,000 steps after the warm-up, within the bound" in page.read_text()
    found = json.loads(samples.read_text())
    assert found["steps"] == sorted(found["steps"]) and found["steps"][-1] > 2
    assert max(found["own"]) > 200 and (tmp_path / "long_run.png").stat().st_size > 5_000


def test_the_line_of_a_long_run_finds_a_leak():
    steps = np.repeat(np.arange(0, 10_001, 100), 3)
    noise = np.random.default_rng(0).normal(0, 1, len(steps))
    filling = 500 * np.exp(-steps / 300)  # the warm-up
    for leak in (0.0, 2.5):
        found = {"steps": steps.tolist(), "megabytes": (1000 - filling + leak * steps / 1000 + noise).tolist()}
        line = long_run.fit(found)
        assert line["slope"] == pytest.approx(leak, abs=0.2) and 0.2 * len(steps) <= line["first"] < 0.25 * len(steps)
    with pytest.raises(RuntimeError, match="let it run for longer"):
        long_run.fit({"steps": [0, 0, 5, 5], "megabytes": [1.0, 2.0, 3.0, 3.0]})


def test_a_long_run_that_ends_by_itself_is_an_error(tmp_path):
    args = SimpleNamespace(
        minutes=1, steps=9, every=0.2, save_steps=2, workers=0, watch_every=0, json=None, settings=["modell.x=1"]
    )
    with pytest.raises(RuntimeError, match=r"exit code 2: error: unknown section.*'modell'"):
        long_run.sample(args)


def test_resident_memory_counts_what_was_started():
    holder = (
        "import sys; data = bytearray(80_000_000); data[::1000] = bytes(80_000); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        total, own = long_run.resident(long_run.psutil.Process())
        child.stdin.close()
    assert total - own > 80
