"""The command doctor: every fault is found where it was put, and none in what is healthy."""

import io
import json

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from helpers import tiny_config
from rich.console import Console
from safetensors.torch import save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_mim import MIMForPreTraining, MIMModel, cli
from hf_mim.conversion import convert
from hf_mim.doctor import checks
from hf_mim.doctor.checks import compare_with_twin, doctor, examine
from hf_mim.doctor.weights import Check, look_at_weights, read_weights, state_of_table
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.errors import CheckpointError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.sources import SHIPPED
from hf_mim.training.recipe import read_sections


SMALL = {"patch_size": 7, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
QUICK = [
    *(f"model.encoder_config.{name}={value}" for name, value in SMALL.items()),
    *("model.decoder_config.hidden_size=32", "model.decoder_config.intermediate_size=64"),
    *("data.max_train_images=5000", "data.max_eval_images=0", "training.max_steps=250", "training.watch_every=0"),
    *("training.bf16=false", "training.save_strategy=no"),
]


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A checkpoint of the recipe quick, shorter and smaller."""
    folder = tmp_path_factory.mktemp("doctor") / "quick"
    return pretrain("mae_small", [*QUICK, f"training.output_dir={folder}"], Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """An override: some of the shipped images, quicker to read than all."""
    folder = tmp_path_factory.mktemp("images")
    for path in SHIPPED.glob("*.parquet"):
        split = "train" if "train" in path.stem else "test"
        rows = datasets.Dataset.from_parquet(str(path)).shuffle(seed=0).select(range(600 if split == "train" else 300))
        rows.to_parquet(folder / f"{split}.parquet")
    return f"data.dataset={folder}"


def checks_of(folder, *overrides) -> dict[str, Check]:
    (data,) = read_sections(overrides, data=DataArguments)
    return {check.name: check for check in examine(str(folder), data)}


def damaged(source, folder, change):
    """A copy of a checkpoint whose model `change` has altered."""
    model = MIMForPreTraining.from_pretrained(source)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def faults(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.state == "fault"]


# ---- silent on what is healthy -------------------------------------------------------------------------------------
def test_a_checkpoint_of_the_quick_recipe_is_healthy(quick):
    out = io.StringIO()
    assert doctor(str(quick), ["data.max_train_images=1500"], Console(file=out, width=100)) == 0
    assert "no known fault found" in out.getvalue() and "fault:" not in out.getvalue()
    states = {name: check.state for name, check in checks_of(quick, "data.max_train_images=1500").items()}
    # So short a run is too little to tell the encoder from its untrained twin on these images, which is no fault.
    assert states.pop("better than untrained") in ("ok", "unclear")
    names = ("weights", "positions", "pixels", "target", "predictions", "decoder", "loss", "features")
    assert states == dict.fromkeys(names, "ok")


def test_a_vit_of_timm_is_healthy(tmp_path, data):
    torch.manual_seed(0)
    peer = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=2)
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    saved = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "depth": 2}}
    (tmp_path / "config.json").write_text(
        json.dumps({**saved, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    convert(str(tmp_path), tmp_path / "ours")
    checks = checks_of(tmp_path / "ours", data)
    assert not faults(checks) and checks["positions"].seen.startswith("1 stored")
    assert checks["training"].state == "note" and checks["features"].state == "skipped"


def test_an_untrained_model_is_said_to_be_one_and_not_ill(tmp_path, data):
    MIMForPreTraining(tiny_config(image_size=28, num_channels=1)).save_pretrained(tmp_path)
    checks = checks_of(tmp_path, data)
    assert not faults(checks) and checks["target"].state == "ok"
    assert {"training", "predictions", "features"} <= {n for n, c in checks.items() if c.state in ("note", "skipped")}


# ---- the faults ----------------------------------------------------------------------------------------------------
def vit_mae(fill: bool) -> ViTMAEForPreTraining:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in small.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(**small, **decoder, image_size=32, patch_size=8))
    if fill:
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.data.normal_()
    return model


def test_the_zero_position_tables_of_vit_mae_are_found(tmp_path, data, capsys):
    vit_mae(fill=False).save_pretrained(tmp_path / "built")
    found = checks_of(tmp_path / "built", data)["positions"]
    assert found.state == "fault" and "sin-cos" in found.remedy
    for name in ("vit.embeddings.position_embeddings (1, 17, 32)", "decoder.decoder_pos_embed (1, 17, 32)"):
        assert f"{name} is all zero" in found.seen
    assert cli.main(["doctor", str(tmp_path / "built"), data]) == 1
    out = capsys.readouterr().out
    assert "1 fault found" in out and "sin-cos" in out
    vit_mae(fill=True).save_pretrained(tmp_path / "filled")
    assert not faults(checks_of(tmp_path / "filled", data))


def test_positions_that_are_all_the_same_are_found(tmp_path, data):
    torch.manual_seed(0)
    model = MIMModel(tiny_config(image_size=28, num_channels=1, encoder_config={"position_embedding": "learned"}))
    model.save_pretrained(tmp_path / "fine")
    assert checks_of(tmp_path / "fine", data)["positions"].state == "ok"
    model.encoder.learned_positions.table.data[1:] = 0.5
    model.save_pretrained(tmp_path / "same")
    assert "the same for every position" in checks_of(tmp_path / "same", data)["positions"].seen


def test_relative_biases_of_zero_are_normal_only_before_training(tmp_path, data):
    model = MIMModel(tiny_config(image_size=28, num_channels=1, encoder_config={"position_embedding": "relative"}))
    model.save_pretrained(tmp_path / "new")
    assert checks_of(tmp_path / "new", data)["positions"].state == "ok"
    model.encoder.final_norm.weight.data += 0.1
    model.save_pretrained(tmp_path / "trained")
    assert checks_of(tmp_path / "trained", data)["positions"].state == "fault"


def test_weights_that_are_not_finite_are_named_and_nothing_is_computed_with_them(quick, tmp_path, data):
    def change(model):
        model.decoder.head.weight[0, :3] = float("nan")
        model.mim.encoder.patch_embedding.bias[1] = float("inf")

    checks = checks_of(damaged(quick, tmp_path / "nan", change), data)
    assert faults(checks) == ["weights"] and "4 values in 2 of" in checks["weights"].seen
    assert "decoder.head.weight" in checks["weights"].seen and "target" not in checks


@pytest.fixture
def tiny(tmp_path):
    MIMForPreTraining(tiny_config()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_file_of_weights_that_ends_too_early_is_damage(tiny):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    check = checks_of(tiny)["checkpoint"]
    assert check.state == "fault" and "copy it again" in check.remedy


def test_what_is_only_missing_here_is_no_damage(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checks, "load_encoder", failing(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            checks_of(tiny)
        patch.setattr(checks, "load_encoder", failing(CheckpointError("cannot load it"), ImportError("no timm")))
        with pytest.raises(CheckpointError):
            checks_of(tiny)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "target": "edge", "plugins": ["edge_target"]}))
    with pytest.raises(ValueError, match="--plugin edge_target"):
        checks_of(tiny)


def failing(error, cause=None):
    def fail(*args, **options):
        raise error from cause

    return fail


def test_tokens_that_all_predict_the_same_are_found(quick, tmp_path, data):
    checks = checks_of(damaged(quick, tmp_path / "same", lambda model: model.decoder.head.weight.mul_(1e-6)), data)
    assert faults(checks) == ["predictions"] and "12 hidden tokens in each of 64 images" in checks["predictions"].seen


def test_a_decoder_that_ignores_the_visible_tokens_is_found(quick, tmp_path, data):
    checks = checks_of(damaged(quick, tmp_path / "deaf", lambda model: model.decoder.embed.linear.weight.zero_()), data)
    assert faults(checks) == ["decoder"] and checks["decoder"].seen.startswith("predictions change by 0 ")


def test_features_that_have_collapsed_are_found_and_worse_than_untrained(quick, tmp_path, data):
    checks = checks_of(damaged(quick, tmp_path / "c", lambda m: m.mim.encoder.patch_embedding.weight.mul_(1e-5)), data)
    assert {"features", "better than untrained"} <= set(faults(checks))
    assert "effective rank" in checks["features"].seen and "k-NN" in checks["better than untrained"].seen


def test_the_loss_is_compared_with_that_of_the_mean(quick, tmp_path, data):
    learnt = checks_of(quick, data)["loss"]
    share = float(learnt.seen.split(" percent")[0])
    assert learnt.state == "ok" and 5 < share < 100 and "of the target's variance is explained, on" in learnt.seen

    def forget(model):  # no learning rate was too high here: nothing at all is predicted
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()

    forgot = checks_of(damaged(quick, tmp_path / "forgot", forget), data)["loss"]
    assert forgot.state == "unclear" and "not distinguishable from predicting the mean" in forgot.seen
    assert "train longer, or raise the learning rate" in forgot.remedy


def test_a_constant_target_is_found(quick, tmp_path):
    for i in range(20):
        path = tmp_path / "blank" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((28, 28), 40, dtype=np.uint8)).save(path)
    found = checks_of(quick, f"data.dataset={tmp_path / 'blank'}")["target"]
    assert found.state == "fault" and "constant" in found.seen


@pytest.mark.parametrize(("far", "state"), [(3, "ok"), (12, "fault")])
def test_dead_codes_are_found(tmp_path, data, far, state):
    torch.manual_seed(0)
    codes = 0.3 * torch.rand(16, 27)
    codes[:far] += 100.0
    save_file({"codes": codes}, tmp_path / "codes.safetensors")
    options = {"features": {"name": "hog", "cell_size": 4}, "codebook": str(tmp_path / "codes.safetensors")}
    model = MIMForPreTraining(tiny_config(image_size=28, target="discrete_token", target_config=options))
    model.save_pretrained(tmp_path / "model")
    checks = checks_of(tmp_path / "model", data)
    assert checks["codes"].state == state
    assert int(checks["codes"].seen.split()[0]) >= far and " of 16 are never used" in checks["codes"].seen
    (tmp_path / "codes.safetensors").unlink()
    assert checks_of(tmp_path / "model", data)["target"].state == "skipped"


# ---- its parts -----------------------------------------------------------------------------------------------------
def test_chance_alone_raises_no_alarm_and_a_true_loss_does():
    rng, images = np.random.default_rng(0), 300
    shares = 100 * rng.binomial(images, 0.6, size=(1000, 2)) / images + 2 * rng.normal(size=(1000, 2)) / np.sqrt(2)
    alarms = [compare_with_twin(*pair, images).state == "fault" for pair in shares]
    assert np.mean(alarms) < 0.01
    assert compare_with_twin(0.0, 5.0, 20).state == "unclear"  # nothing can be told from so few
    assert "not distinguishable from untrained" in compare_with_twin(61.0, 60.0, images).seen
    better = [compare_with_twin(*pair, images).state == "ok" for pair in shares]
    assert np.mean(better) < 0.05  # one side of 95 percent
    assert (
        compare_with_twin(30.0, 60.0, images).state == "fault" and compare_with_twin(60.0, 30.0, images).state == "ok"
    )


def test_a_table_with_an_empty_row_for_the_class_token_is_fine():
    table = torch.randn(1, 17, 8)
    table[0, 0] = 0
    assert state_of_table(table) == "fine"
    assert state_of_table(torch.zeros(1, 17, 8)) == "zero"
    assert state_of_table(torch.ones(1, 4, 4, 8)) == "constant"


def test_every_tensor_of_a_checkpoint_in_several_files_is_read(tmp_path):
    model = vit_mae(fill=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    read = dict(read_weights(str(tmp_path)))
    state = model.state_dict()
    assert len(read) == len(state) and sum(v.numel() for v in read.values()) == sum(v.numel() for v in state.values())
    looked = look_at_weights(iter(read.items()))
    assert len(looked.tables) == 2 and looked.tensors == len(state) and looked.has_decoder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere"], "no checkpoint at ./nowhere"),
        (["QUICK", "training.seed=1"], "unknown section 'training'. Choices: data"),
        (["QUICK", "data.streaming=true"], "set data.streaming=false"),
        (["QUICK", "data.dataste=x"], "did you mean 'dataset'"),
    ],
)
def test_an_error_is_one_line_and_code_2(quick, capsys, arguments, words):
    assert cli.main(["doctor", *(str(quick) if word == "QUICK" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_no_limit_is_below_0_or_above_100_percent():
    assert "(at fault below 31.7, better above 62.0)" in compare_with_twin(50.0, 50.0, 150).seen
    few = compare_with_twin(40.0, 30.0, 5).seen
    assert "on 5 images (better above 88.9)" in few and "below" not in few
    assert "(at fault below 94.0, no accuracy would tell it better)" in compare_with_twin(100.0, 100.0, 30).seen
