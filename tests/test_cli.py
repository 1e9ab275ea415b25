"""The command line: what it lists, and that an error is one line on stderr with a non-zero exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mim import cli, cpu
from hf_mim.training.recipe import recipe_files


ROOT = Path(__file__).parent.parent


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands_that_exist(capsys, arguments):
    code, out, err = call(capsys, *arguments)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out + err)
    registered = set(cli.typer.main.get_command(cli.app).commands)
    assert code in (0, 2) and set(re.findall(r"^│ (\w[\w-]*) ", plain, re.MULTILINE)) == registered
    assert registered >= {"pretrain", "recipes", "reconstruct"}


def test_recipes_lists_every_recipe_with_its_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # names and papers are whole in a narrow terminal too
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    for words in (*recipe_files(), "arXiv:2111.06377", "arXiv:2111.09886", "hf-mim pretrain RECIPE"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pretrian",), "unknown command 'pretrian': did you mean 'pretrain'? Choices: pretrain, "),
        (("pretrain", "maee"), "did you mean 'mae'"),
        (("pretrain", "mae", "modle.encoder=vit"), "did you mean 'model'"),
        (("pretrain", "training.num_train_epochs=abc"), "must be a number, not 'abc'"),
        (("pretrain", "mae", "quick"), "section.key=value"),
        (("pretrain", "data.dataset=./nowhere"), "no file or folder ./nowhere"),
        (("pretrain", "model.encoder=vti"), "did you mean 'vit'"),
        (("pretrain", "--fast"), "--fast"),
        (("reconstruct",), "checkpoint"),
        (("export", ".", "out", "--to", "keras"), "'keras' is not one of 'transformers', 'timm', 'onnx', 'official'"),
        (("embed", ".", "out", "--pooler", "mena"), "unknown pooler 'mena': did you mean 'mean'"),
        (("reconstruct", "./nowhere", "setup.py"), "no checkpoint at ./nowhere"),
        (("reconstruct", ".", "none.png"), "there is no image none.png"),
    ],
)
def test_an_error_is_one_line_and_a_code(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").touch()
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words.lower() in err.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["setup.py"]


def test_a_checkpoint_of_another_model_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    code, _, err = call(capsys, "pretrain", f"model.init_from={tmp_path}", f"training.output_dir={tmp_path / 'new'}")
    assert code == 2 and "'bert'" in err and err.count("\n") == 1


def test_the_first_word_is_a_recipe_only_if_it_is_no_override(monkeypatch):
    from hf_mim.hub import push as hub
    from hf_mim.training.commands import pretrain

    seen = []
    monkeypatch.setattr(hub, "push_run", lambda folder: None)
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments, preview: seen.append(arguments))
    for words in ([], ["mae"], ["data.split=1", "model.decoder=unet"], ["mae", "data.split=1"]):
        assert cli.main(["pretrain", *words]) == 0
    assert seen == [
        ("quick", []),
        ("mae", []),
        ("quick", ["data.split=1", "model.decoder=unet"]),
        ("mae", ["data.split=1"]),
    ]


def test_a_path_with_an_equals_sign_is_a_path_where_it_exists(monkeypatch, tmp_path):
    from hf_mim.hub import push as hub
    from hf_mim.training.commands import pretrain

    seen = []
    monkeypatch.setattr(hub, "push_run", lambda folder: None)
    monkeypatch.setattr(pretrain, "pretrain", lambda *arguments, preview: seen.append(arguments))
    file = tmp_path / "lr=3.yaml"
    file.write_text("model: {}\n")
    assert cli.main(["pretrain", str(file), "data.split=1"]) == 0 and seen == [(str(file), ["data.split=1"])]
    assert cli.main(["pretrain", str(tmp_path / "lr=4.yaml")]) == 2


def test_an_interrupt_has_its_own_code_and_a_mistake_of_ours_its_traceback(monkeypatch):
    from hf_mim.training.commands import pretrain

    def raising(error):
        def run(*arguments, preview):
            raise error

        return run

    monkeypatch.setattr(pretrain, "pretrain", raising(KeyboardInterrupt()))
    assert cli.main(["pretrain"]) == 130
    monkeypatch.setattr(pretrain, "pretrain", raising(TypeError("a bug")))
    with pytest.raises(TypeError):
        cli.main(["pretrain"])


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HF_MIM_DEBUG", "1")
    with pytest.raises(ValueError, match="did you mean 'mae'"):
        cli.main(["pretrain", "maee"])
    monkeypatch.setenv("HF_MIM_DEBUG", "0")
    assert cli.main(["pretrain", "maee"]) == 2


TUNED = """
import re, sys
from hf_mim import cli, cpu
cpu.GPUS = ("/nowhere",)
code = cli.main(sys.argv[1:])
import torch
tensor = torch.ones(2**24)  # the first to be computed by several threads, and large
place, inside = tensor.data_ptr() + 2**25, False
for line in open("/proc/self/smaps"):
    if region := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(region[1], 16) <= place < int(region[2], 16)
    elif inside and line.startswith("VmFlags"):
        print(code, " hg" in line)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says how memory was asked for")
def test_the_commands_that_compute_are_tuned_for_the_cpu():
    def run(*words, **settings) -> tuple[str, str]:
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **settings}
        done = subprocess.run([sys.executable, "-c", TUNED, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        spin = next((line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line), None)
        if spin is None:
            pytest.skip("this torch does not come with GNU's OpenMP")
        return spin, done.stdout.split()[-2:]

    wrong = ("data.dataset=/nowhere",)  # found out when torch is there
    spin, (code, large_pages) = run("pretrain", *wrong)
    assert spin == "1000" and code == "2" and large_pages == "True"
    spin, (code, large_pages) = run("pretrain", *wrong, GOMP_SPINCOUNT="7", THP_MEM_ALLOC_ENABLE="0")
    assert spin == "7" and large_pages == "False"


def test_settings_for_the_cpu_are_left_where_there_is_a_gpu_or_torch(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(cpu, "GPUS", ("/nowhere", "/dev/null"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    cpu.tune_for_cpu()
    monkeypatch.setattr(cpu, "GPUS", ("/nowhere",))
    monkeypatch.setitem(sys.modules, "torch", None)
    cpu.tune_for_cpu()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cpu.tune_for_cpu()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1" and "GOMP_SPINCOUNT" not in os.environ


WITHOUT_TORCH = """
import io
import sys
from hf_mim import cli, cpu
from hf_mim.command_table import SECTIONS
for words, message in {
    ("pretrain", "maee"): "did you mean 'mae'",
    ("pretrain", "mae", "model.masking_config.ratio"): "looks like section.key=value",
    ("pretrain", "modell.target=hog"): "did you mean 'model'",
    ("pretrain", "data.dataste=x"): "Unknown key data.dataste: did you mean 'dataset'",
    ("pretrain", "training.num_train_epoch=1"): "did you mean 'num_train_epochs'",
    ("pretrain", "training.base_learning_rate=abc"): "training.base_learning_rate must be a number, not 'abc'",
    ("pretrain", "finetune_mae"): "finetune_mae is a fine-tuning recipe: run hf-mim finetune MODEL finetune_mae",
    ("finetune", "somewhere", "mae"): "mae is a pretraining recipe: run hf-mim pretrain mae",
    ("finetune", "somewhere", "finetun.lora=true"): "did you mean 'finetune'",
    ("finetune", "somewhere", "task=segmentation", "finetune.head_sise=8"): "did you mean 'head_size'",
    ("probe", "somewhere", "probe.layrs=1"): "did you mean 'layers'",
    ("probe", "somewhere", "task=dense", "probe.layr=1"): "did you mean 'layer'",
    ("analyze", "somewhere", "analyze.image=1"): "did you mean 'images'",
    ("doctor", "somewhere", "model.encoder=vit"): "unknown section 'model'",
    ("teacher", "somewhere", "data.dataste=x"): "Unknown key data.dataste",
    ("finetune", "somewhere", "task=segmentatoin"): "unknown finetune.task 'segmentatoin': did you mean 'segmentation'",
    ("finetune", "somewhere", "finetune.optimizer=muon"): "unknown finetune.optimizer 'muon'",
    ("probe", "somewhere", "task=dens"): "did you mean 'dense'",
    ("probe", "somewhere", "probe.poolers=[mena]"): "unknown pooler 'mena': did you mean 'mean'",
    ("probe", "somewhere", "probe.poolers=[my]", "probe.pooler_config.my={pooler: abmil}"): "unknown pooler 'abmil'",
    ("probe", "somewhere", "probe.pooler_config.abmlip.depth=2"): "unknown pooler 'abmlip': did you mean 'abmilp'",
    ("probe", "./no", "probe.poolers=[my]", "probe.pooler_config.my={pooler: abmilp}"): "no checkpoint at ./no",
    ("pretrain", "model.target=hgo"): "unknown target 'hgo': did you mean 'hog'",
    ("pretrain", "training.lr_scheduler_type=cosinus"): "unknown training.lr_scheduler_type 'cosinus': did you mean",
    ("pretrain", "training.save_strategy=epochs"): "did you mean 'epoch'",
    ("pretrain", "data.interpolation=bicubik"): "did you mean 'bicubic'",
    ("pretrain", "training.figures=jpg"): "unknown training.figures 'jpg': did you mean 'png'",
    ("analyze", "somewhere", "analyze.measurements=[heath]"): "did you mean 'health'",
    ("doctor", "outputs/nowhere"): "no checkpoint at outputs/nowhere: there is no such folder, nor a folder outputs",
    ("doctor", "nowhere/"): "no checkpoint at nowhere/: there is no such folder",
    ("push", "somewhere", "me/x"): "no checkpoint at somewhere: there is no such folder",
    ("analyze", "somewhere", "./nowhere"): "no checkpoint at ./nowhere: there is no such folder",
    ("distill", "lite0", "some/model/here"): "no checkpoint at some/model/here",
}.items():
    sys.argv, sys.stderr = ["hf-mim", *words], io.StringIO()
    code, printed, sys.stderr = cli.main(), sys.stderr.getvalue(), sys.__stderr__
    assert code == 2 and message in printed, (words, printed)
LIGHT = (["--help"], ["-h"], ["--version"], ["recipes"], ["recipes", "mae"], ["options"], ["options", "training"])
LIGHT += (["options", "target.hog"], ["options", "crop_scale"], *([name, "-h"] for name in SECTIONS))
for words in ([], *LIGHT):
    assert cli.main(words) == (2 if not words else 0), words
assert not {"torch", "numpy"} & sys.modules.keys()
"""


def test_wrong_words_are_found_and_help_is_given_before_torch_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], env={**cli.os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "hf_mim", "pretrain", "maee"]
    done = subprocess.run(command, cwd=tmp_path, env={**cli.os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and not done.stdout


def test_an_error_stays_a_line_that_can_be_read(monkeypatch, capsys):
    def fail(*_):
        raise ValueError("x" * 100_000)

    monkeypatch.setattr(cli.command_words, "check_command", fail)
    assert cli.main(["doctor", "x"]) == 2
    printed = capsys.readouterr().err
    assert len(printed) < 2100 and printed.count("\n") == 1
