"""Recipes: what they say, what overrides do to them, and how they fail."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_mim.analysis.run import AnalyzeArguments
from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import check_part, pair
from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.dense import DenseArguments
from hf_mim.training.commands.finetune_run import training_arguments
from hf_mim.training.commands.probe_setup import ProbeArguments
from hf_mim.training.common import recipe_keys
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments


NAMES = sorted(recipes.recipe_files())
PRETRAINING = [name for name in NAMES if recipes.command_of(recipes.read(name)) == "pretrain"]


def build(section: dict) -> MIMForPreTraining:
    with torch.device("meta"):
        return MIMForPreTraining(MIMConfig(**section))


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_recipe_is_valid_and_says_what_it_is(name, tmp_path):
    recipe = recipes.resolve(name)
    beside = recipe_keys.START_KEYS | recipe_keys.KEEP_KEYS
    section = {key: value for key, value in recipe["model"].items() if key not in beside}
    if "teacher" in str(section.get("target_config")):
        # A teacher would be downloaded to build the target: its options are checked, and another target is built.
        check_part("target", TARGETS, section["target"], section["target_config"])
        section = {**section, "target": "pixel", "target_config": {}}
    model = build(section)
    grid = model.mask_grid(*pair(model.config.image_size))
    masks = sample_masks(model.config, grid, [np.random.default_rng(0), np.random.default_rng(1)])
    assert 0 < masks.float().mean() < 1 or (model.config.masking == "none" and not masks.any())
    MIMTrainingArguments(output_dir=str(tmp_path), **recipe["training"])
    header = recipes.read_header(recipes.find(name))
    assert header["title"] and header["paper"].startswith("arXiv:")
    assert header["command"].startswith("hf-mim pretrain") and header["cost"]
    assert name == "quick" or name in header["command"].split()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PRETRAINING)))
def test_every_recipe_of_another_command_is_valid_and_says_what_it_is(name, tmp_path):
    recipe = recipes.resolve(name, command="finetune")
    FinetuneArguments(**recipe["finetune"])
    arguments = training_arguments({**recipe["training"], "output_dir": str(tmp_path)}, "accuracy")
    assert arguments.load_best_model_at_end and arguments.eval_strategy == arguments.save_strategy
    header = recipes.read_header(recipes.find(name))
    assert header["title"] and header.get("paper", "arXiv:").startswith("arXiv:") and header["cost"]
    assert header["command"].startswith("hf-mim finetune ") and name in header["command"].split()


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_where_its_learning_rate_ends(name):
    training = recipes.read(name)["training"]
    kind, floor = training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs") or {}
    has_floor = kind == "cosine_with_min_lr" and len(floor.keys() & {"min_lr", "min_lr_rate"}) == 1
    assert training.get("lr_drops") or kind in ("cosine", "linear") or has_floor


def test_a_floor_that_is_not_given_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs.min_lr_rate"):
        MIMTrainingArguments(output_dir=str(tmp_path), lr_scheduler_type="cosine_with_min_lr")
    assert MIMTrainingArguments(output_dir=str(tmp_path)).lr_scheduler_type == "cosine"


@pytest.mark.parametrize(("size", "dim", "depth"), [("small", 384, 12), ("large", 1024, 24), ("huge", 1280, 32)])
def test_mae_takes_other_sizes_by_one_override(size, dim, depth):
    model = build(recipes.resolve("mae", [f"model.encoder_config.size={size}"])["model"])
    assert model.mim.encoder.hidden_size == dim
    assert len(model.mim.encoder.stage_names) - 1 == depth


def test_mae_and_simmim_hide_what_the_papers_hide():
    mae, simmim = (recipes.resolve(name)["model"] for name in ("mae", "simmim"))
    mask = sample_masks(MIMConfig(**mae), (14, 14), [np.random.default_rng(0)])
    assert (~mask).sum() == 49
    mask = sample_masks(MIMConfig(**simmim), (14, 14), [np.random.default_rng(0)]).view(7, 2, 7, 2)
    whole = mask.float().mean(dim=(1, 3))
    assert set(whole.unique().tolist()) == {0.0, 1.0} and whole.sum() == 30  # 60 percent of 49 cells of 32 pixels


def test_swin_predicts_through_its_coarse_last_stage():
    section = recipes.resolve("simmim_swin", ["model.image_size=64"])["model"]
    section["encoder_config"] |= {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2}
    section["masking_config"] = {"ratio": 0.5, "unit": 4}
    model = MIMForPreTraining(MIMConfig(**section))
    out = model(torch.randn(2, 3, 64, 64))
    assert model.mask_grid(64, 64) == (16, 16) and out.loss.isfinite()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5e-4", 1.5e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("null", None),
        ("", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("1e", "1e"),
        ("'3'", "3"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    parsed = recipes.parse_overrides([f"model.x={text}"])["model"]["x"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.dataset=photos #2", "photos #2"),
        ("data.dataset=2026", "2026"),
        ("data.dataset=1e-4", "1e-4"),
        ("data.dataset=~", "~"),
        ("data.dataset=a: b", "a: b"),
        ("data.dataset=[x", "[x"),
        ("data.dataset=it's", "it's"),
        ("data.dataset=a=b", "a=b"),
        ("data.dataset='null'", "null"),
        ('data.dataset="null"', "null"),
        ("data.dataset=null", None),
        ("data.dataset=", None),
        ("data.dataset=été\n2", "été\n2"),
        ("model.encoder=null", "null"),
        ("training.run_name=007", "007"),
        ("training.max_steps=007", 7),
        ("data.crop_scale=[0.2, 1]", [0.2, 1]),
    ],
)
def test_the_value_of_a_key_that_holds_text_is_text(override, value):
    section, _, key = override.partition("=")[0].partition(".")
    parsed = recipes.parse_overrides([override])[section][key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("section", list(recipe_keys.SECTIONS))
def test_the_source_names_the_keys_that_the_classes_have(section):
    read, imported = recipe_keys.keys_of(section), recipe_keys.imported_keys_of(section)
    assert read.keys() == imported.keys()
    assert all(kind is Any or kind == imported[key] for key, kind in read.items())
    classes = {"data": DataArguments, "training": MIMTrainingArguments, "finetune": FinetuneArguments}
    if section in classes:
        assert imported == recipe_keys.fields_of(classes[section])
    else:
        fields = {key for key in MIMConfig.__dataclass_fields__ if not key.startswith("_")}
        assert (
            imported.keys() <= fields | recipe_keys.START_KEYS.keys() | recipe_keys.KEEP_KEYS.keys()
            and imported["target"] is str
        )


def test_the_source_names_the_keys_of_commands_without_a_recipe():
    for section, classes in {"probe": (ProbeArguments, DenseArguments), "analyze": (AnalyzeArguments,)}.items():
        names = {name for kind in classes for name in recipe_keys.fields_of(kind)}
        assert recipe_keys.keys_of(section).keys() == names


def test_an_error_names_its_key():
    for override, key in (("data.dataste=x", "data.dataste"), ("training.max_steps=x", "training.max_steps")):
        with pytest.raises(RecipeError) as caught:
            recipes.resolve("quick", [override])
        assert caught.value.key == key


def test_overrides_reach_nested_keys_and_nothing_else():
    plain = recipes.resolve("quick")
    changed = recipes.resolve("quick", ["model.masking_config.ratio=0.6", "training.learning_rate=1e-4"])
    assert changed["model"]["masking_config"]["ratio"] == 0.6
    assert changed["training"].pop("learning_rate") == 1e-4
    changed["model"]["masking_config"]["ratio"] = plain["model"]["masking_config"]["ratio"]
    assert changed == plain


def test_another_part_drops_the_recipes_options_of_that_part_only():
    plain = recipes.resolve("quick")["model"]
    changed = recipes.resolve("quick", ["model.decoder=cross_attention", "model.decoder_config.hidden_size=32"])[
        "model"
    ]
    assert changed["decoder_config"] == {"hidden_size": 32}
    assert changed["encoder_config"] == plain["encoder_config"]
    same = recipes.resolve("quick", ["model.decoder=transformer"])["model"]
    assert same["decoder_config"] == plain["decoder_config"]


def test_init_from_keeps_the_method_and_drops_what_describes_the_encoder():
    plain, overrides = recipes.resolve("quick"), ["model.init_from=somewhere", "model.masking_config.ratio=0.6"]
    resolved = recipes.resolve("quick", overrides)
    kept = ("image_size", "encoder", "masking", "decoder", "decoder_config", "target", "target_config")
    assert resolved["model"] == {
        **{key: plain["model"][key] for key in kept},
        "encoder_config": {"mask_style": "drop"},
        "masking_config": {"ratio": 0.6},
        "init_from": "somewhere",
    }
    assert resolved["training"] == plain["training"]


def test_init_from_keeps_the_channels_of_a_recipe_for_images_of_several(tmp_path):
    bands = {"num_channels": 5, "image_mean": [0.1] * 5, "image_std": [0.2] * 5}
    recipes.save({"model": {**bands, "encoder_config": {"hidden_size": 8}}}, tmp_path / "bands.yaml", "")
    resolved = recipes.resolve(str(tmp_path / "bands.yaml"), ["model.init_from=somewhere"])
    assert resolved["model"] == {**bands, "encoder_config": {}, "init_from": "somewhere"}
    saved = tmp_path / "again.yaml"
    recipes.save(resolved, saved, "")
    assert recipes.resolve(str(saved)) == resolved  # which is how a run resumes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.encoder=vit", ["modle", "did you mean 'model'"]),
        ("model.encodr=vit", ["encodr", "did you mean 'encoder'"]),
        ("training.num_train_epoch=3", ["did you mean 'num_train_epochs'"]),
        ("data.dataste=x", ["did you mean 'dataset'"]),
        ("training.num_train_epochs=abc", ["training.num_train_epochs must be a number", "'abc'"]),
        ("training.per_device_train_batch_size=2.5", ["whole number", "2.5"]),
        ("training.bf16=3", ["true or false or text", "3"]),
        ("training.save_strategy=epochs", ["did you mean 'epoch'"]),
        ("data.streaming=maybe", ["data.streaming must be true or false"]),
        ("data.crop_scale=0.2", ["data.crop_scale must be a list or null"]),
        ("data.crop_scale=[a, b]", ["data.crop_scale must be a list or null"]),
        ("model.encoder_config=3", ["model.encoder_config must be options or null"]),
        ("model=3", ["section.key=value"]),
        ("model.encoder", ["section.key=value"]),
        ("model..x=1", ["section.key=value"]),
        ("model.encoder_config=[1", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, words):
    with pytest.raises(ValueError) as caught:
        recipes.resolve("quick", [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="already has the value 3"):
        recipes.parse_overrides(["model.encoder_config=3", "model.encoder_config.size=tiny"])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'simmim'"):
        recipes.resolve("simmmim")
    with pytest.raises(ValueError, match=r"no recipe at there/is/none\.yaml"):
        recipes.resolve("there/is/none.yaml")


def test_a_broken_recipe_file_names_file_and_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  encoder: [vit\n")
    with pytest.raises(ValueError, match=r"mine\.yaml, line \d"):
        recipes.resolve(str(file))
    file.write_text("- a list\n")
    with pytest.raises(ValueError, match="must hold sections"):
        recipes.resolve(str(file))
    file.write_text("model: vit\n")
    with pytest.raises(ValueError, match="section 'model'"):
        recipes.resolve(str(file))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_resolves_to_itself(name, tmp_path):
    overrides = ["training.run_name='1e-4'", "training.optim_args='no'", "training.learning_rate=1.5e-05"]
    resolved = recipes.resolve(name, overrides)
    assert resolved["training"]["run_name"] == "1e-4"
    recipes.save(resolved, tmp_path / "recipe.yaml", "Run again:\nhf-mim pretrain recipe.yaml")
    assert recipes.resolve(str(tmp_path / "recipe.yaml")) == resolved
    assert recipes.resolve(str(tmp_path)) == resolved  # the folder of a run
    assert (tmp_path / "recipe.yaml").read_text().startswith("# Run again:\n# hf-mim pretrain recipe.yaml\n")


def test_a_header_may_continue_on_other_lines(tmp_path):
    (tmp_path / "x.yaml").write_text("# Title\n#\n# Paper: arXiv:1\n#   and more\n#\n# a remark\nmodel:\n# Cost: no\n")
    assert recipes.read_header(tmp_path / "x.yaml") == {"title": "Title", "paper": "arXiv:1 and more"}


def test_another_number_of_channels_takes_its_own_mean_and_std():
    """The quick recipe's are for grey; `model.num_channels=3` alone must work."""
    recipe = recipes.resolve("quick", ["model.num_channels=3"])
    assert "image_mean" not in recipe["model"] and MIMConfig(**recipe["model"]).image_mean == [0.485, 0.456, 0.406]
    kept = recipes.resolve("quick", ["model.num_channels=2", "model.image_mean=[0.1, 0.2]", "model.image_std=[1, 1]"])
    assert MIMConfig(**kept["model"]).image_mean == [0.1, 0.2]


def test_another_schedule_or_optimizer_takes_its_own_options():
    """The quick recipe's floor is none that `warmup_stable_decay` knows."""
    words = ["training.lr_scheduler_type=warmup_stable_decay", "training.lr_scheduler_kwargs={num_decay_steps: 3}"]
    assert recipes.resolve("quick", words)["training"]["lr_scheduler_kwargs"] == {"num_decay_steps": 3}
    same = ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr=1e-5"]
    assert recipes.resolve("quick", same)["training"]["lr_scheduler_kwargs"] == {"min_lr_rate": 0.01, "min_lr": 1e-5}
    assert "muon_scale" not in recipes.resolve("quick", ["training.optimizer=null"])["training"]
    assert recipes.resolve("quick", ["training.optimizer=muon"])["training"]["muon_scale"] == 3


@pytest.mark.parametrize("key", [*recipe_keys.MORE_THAN_ZERO, recipe_keys.MAX_STEPS])
def test_nothing_of_what_must_be_more_than_zero_may_be_zero(key):
    section = key.partition(".")[0]
    with pytest.raises(RecipeError, match=f"{key} must be more than 0, not 0"):
        recipes.check_names([f"{key}=0"], section, [section])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.save_steps=5"], "training.save_steps has no effect: training.save_strategy is epoch"),
        (["training.save_steps=5", "training.save_strategy=steps"], None),
        (["model.encoder_config.size=tiny"], "model.encoder_config.size has no effect: patch_size, hidden_size"),
        (["model.encoder_config.size=tiny", "model.encoder_config.hidden_size=null"], None),
        (["training.learning_rate=0.1", "training.max_steps=5"], None),  # meant to win over what the recipe says
        (["data.shuffle_buffer=5"], "data.shuffle_buffer has no effect: data.streaming is false"),
        (["data.forgetting_dataset=x"], "data.forgetting_dataset has no effect: model.init_from is not set"),
        (["data.forgetting_dataset=x", "model.init_from=y"], None),
        (
            ["data.forgetting_dataset=x", "model.init_from=y", "training.watch_every=0"],
            "data.forgetting_dataset has no effect: training.watch_every is 0",
        ),
        (["training.lora_rank=4"], "training.lora_rank has no effect: training.lora is false"),
        (["training.lora_rank=4", "training.lora=true"], None),
    ],
)
def test_a_setting_without_effect_is_said(overrides, message):
    messages = recipes.without_effect(recipes.resolve("a2mim_vit_small", overrides))
    assert [text for text in messages if message and text.startswith(message)] or (message is None and not messages)


def test_additions_without_lora_are_said_of_a_fine_tuning_too():
    messages = recipes.without_effect(recipes.resolve("finetune_small", ["finetune.lora_layers=[qkv]"], "finetune"))
    assert messages == ["finetune.lora_layers has no effect: finetune.lora is false"]


def test_a_recipe_that_is_not_utf8_is_refused_and_not_altered(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("data: {dataset: /photos/été}\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"mine.yaml is not UTF-8 text: save it as UTF-8"):
        recipes.read(str(path))


@pytest.mark.parametrize("name", recipes.recipe_files())
def test_no_shipped_recipe_says_what_has_no_effect(name):
    assert recipes.without_effect(recipes.resolve(name)) == []


def test_the_header_of_a_changed_recipe_does_not_credit_its_paper_alone():
    assert recipes.credited_paper("mae", recipes.resolve("mae")) == recipes.read_header(recipes.find("mae"))["paper"]
    paper = recipes.credited_paper("mae", recipes.resolve("mae", ["model.target=hog", "model.masking=block"]))
    assert paper.endswith("; changed in this run: masking block in place of random, target hog in place of pixel")
    paper = recipes.credited_paper("mae", recipes.resolve("mae", ["model.target=hog", "model.init_from=somewhere"]))
    assert paper.endswith("; changed in this run: target hog in place of pixel")
