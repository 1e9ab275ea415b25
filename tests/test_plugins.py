"""Parts of one's own by a module that a recipe or the command line names, and what `hf-mim new` writes."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from helpers import tiny_config
from transformers import AutoModel

from hf_mim import MIMConfig, MIMForPreTraining, MIMModel, cli
from hf_mim.hub.card import plugin_notes
from hf_mim.hub.files import read_recipe
from hf_mim.modeling import parts
from hf_mim.modeling.modeling_upernet import MIMUperNetConfig
from hf_mim.new.write import FIELDS
from hf_mim.training import recipe as recipes
from hf_mim.training.common import plugins


SMALL = ("model.image_size=16", "data.max_train_images=40", "data.max_eval_images=10", "training.max_steps=2")
SMALL += ("training.per_device_train_batch_size=4", "training.watch_every=0", "training.output_dir=run")
MODULE = """
from hf_mim.modeling.target_pixel import PixelTarget
from hf_mim.modeling.targets import TARGETS


class Edge(PixelTarget):
    "Pixels."


TARGETS["edge"] = Edge
"""


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """What a plug-in adds goes with the test."""
    before, modules, path = (
        {kind: dict(table) for kind, table in parts.TABLES.items()},
        set(sys.modules),
        list(sys.path),
    )
    monkeypatch.setattr(plugins, "LOADED", loaded := {})
    monkeypatch.setattr(recipes, "LOADED", loaded)
    yield
    for kind, table in before.items():
        parts.TABLES[kind].clear()
        parts.TABLES[kind].update(table)
    for name in set(sys.modules) - modules:
        if name.endswith(("_target", "my_module", "broken")):
            del sys.modules[name]
    sys.path[:] = path


def run(*words, folder):
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in which a target was made, tested and trained by the command line, and nothing else."""
    folder = tmp_path_factory.mktemp("new")
    run("hf_mim", "new", "target", "edge", folder=folder)
    assert " passed" in run("pytest", "-q", "-p", "no:cacheprovider", "test_edge_target.py", folder=folder)
    run("hf_mim", "pretrain", "edge_target.yaml", *SMALL, folder=folder)
    return folder


@pytest.mark.slow  # three processes, two of them with torch
def test_what_new_writes_is_tested_and_trained_and_says_where_it_comes_from(written):
    config = MIMConfig.from_pretrained(written / "run")
    assert config.target == "edge" and config.plugins == ["edge_target"]
    assert recipes.read(str(written / "run"))["plugins"] == ["edge_target"]
    assert read_recipe(written / "run")["plugins"] == ["edge_target"]  # also where it is pushed
    assert plugin_notes(config) == [
        "edge_target (target edge) is code that is not uploaded: the encoder loads without it, and pretraining further "
        "needs it"
    ]


def test_the_notes_of_a_segmentation_model_are_those_of_its_encoder():
    backbone = tiny_config(plugins=["my_module"])
    config = MIMUperNetConfig(backbone_config=backbone, hidden_size=8)
    assert plugin_notes(config) == plugin_notes(backbone) != []


@pytest.mark.slow
def test_without_the_module_it_is_asked_for_by_name(written, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(written / "run")
    assert type(AutoModel.from_pretrained(folder)) is MIMModel  # the encoder needs no target
    with pytest.raises(ValueError, match="'edge' comes from the plug-in edge_target, .*--plugin edge_target"):
        MIMForPreTraining.from_pretrained(folder)
    assert cli.main(["reconstruct", folder]) == 2
    assert "--plugin edge_target" in capsys.readouterr().err
    assert cli.main(["pretrain", folder, "training.resume=true"]) == 2
    assert "plug-in edge_target, named by recipe.yaml, is neither installed nor in" in capsys.readouterr().err


@pytest.mark.slow
def test_with_it_the_checkpoint_is_used(written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plugin = f"--plugin={written / 'edge_target.py'}"
    assert cli.main(["reconstruct", str(written / "run"), plugin]) == 0, capsys.readouterr().err
    assert (tmp_path / "reconstruction.png").is_file()
    assert cli.main(["options", "target.edge"]) == 0
    assert "mse, l1 or smooth_l1." in capsys.readouterr().out


@pytest.mark.slow  # as above, for the other kinds
@pytest.mark.parametrize("kind", [kind for kind in FIELDS if kind != "target"])
def test_new_writes_what_runs(kind, tmp_path):
    run("hf_mim", "new", kind, "mine", folder=tmp_path)
    assert " passed" in run("pytest", "-q", "-p", "no:cacheprovider", f"test_mine_{kind}.py", folder=tmp_path)
    run("hf_mim", "pretrain", f"mine_{kind}.yaml", *SMALL, folder=tmp_path)
    assert f'"mine_{kind}"' in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("targt", "edge"), "unknown kind of part 'targt': did you mean 'target'"),
        (("target", "hog"), "target 'hog' is one of hf_mim"),
        (("target", "Edge!"), "a part's name has small letters"),
    ],
)
def test_new_refuses_what_cannot_be_a_name(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_new_replaces_nothing_unasked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edge_target.yaml").write_text("mine")
    assert cli.main(["new", "target", "edge"]) == 2 and "exists already" in capsys.readouterr().err
    assert cli.main(["new", "target", "edge", "--force"]) == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_a_module_of_the_working_directory_is_found_and_named_once(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("plugins: [my_module]\nmodel: {target: edge}\n")
    plugins.load_plugins(["my_module"])
    assert recipes.resolve("mine.yaml", ["model.image_size=16"])["plugins"] == ["my_module"]
    assert recipes.resolve("quick", ["model.target=edge"])["plugins"] == ["my_module"]  # of --plugin
    assert parts.REGISTERED_BY[parts.TABLES["target"]["edge"]] == "my_module"


def test_a_module_beside_its_recipe_is_found_but_not_in_a_checkpoint(tmp_path, monkeypatch):
    for folder in ("parts", "run"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text("plugins: [my_module]\nmodel: {target: edge}\n")
        (tmp_path / folder / "my_module.py").write_text(MODULE)
    (tmp_path / "run" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plugins.PluginError, match=f"my_module, .* neither installed nor in {tmp_path}:"):
        recipes.resolve("run/mine.yaml")
    (tmp_path / "parts" / "other.yaml").write_text("plugins: [my_modul]\n")
    with pytest.raises(plugins.PluginError, match=f"nor in {tmp_path} or {tmp_path / 'parts'}:"):
        recipes.resolve("parts/other.yaml")
    assert recipes.resolve("parts/mine.yaml", ["model.image_size=16"])["plugins"] == ["my_module"]


def test_a_module_that_a_plugin_lacks_is_not_the_plugin(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("import my_mod\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plugins.PluginError, match="cannot be imported: ModuleNotFoundError: No module named 'my_mod'"):
        plugins.load_plugins(["my_module"])


def test_a_file_replaces_no_module(tmp_path, monkeypatch):
    for name in ("json", "tabnanny", "sys"):  # loaded, not loaded, built in
        (tmp_path / f"{name}.py").write_text(MODULE)
        before = sys.modules.get(name)
        with pytest.raises(plugins.PluginError, match=f"has the name of another module, {name} .*: rename it"):
            plugins.load_plugins([str(tmp_path / f"{name}.py")])
        assert sys.modules.get(name) is before
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    plugins.load_plugins(["my_module"])
    loaded = sys.modules["my_module"]
    plugins.load_plugins(["my_module.py", str(tmp_path / "my_module.py")])
    assert sys.modules["my_module"] is loaded


def test_a_plugin_that_fails_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "--plugin", "broken"]) == 2
    assert "plug-in broken, named by --plugin, cannot be imported: ZeroDivisionError" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("plugins: my_module\n")
    assert cli.main(["pretrain", "bad.yaml"]) == 2
    assert "plugins in bad.yaml must be a list of modules" in capsys.readouterr().err
    assert cli.main(["pretrain", "--plugin"]) == 2


def test_a_recipe_from_elsewhere_imports_nothing_unasked(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "mine.yaml").write_text("plugins: [my_module]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "find", lambda name: tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="names the plug-in my_module, whose code would run: add --plugin my_module"):
        recipes.resolve("https://example.org/mine.yaml")
    assert "my_module" not in sys.modules


def test_a_config_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    MIMConfig(target="edge", plugins=["my_module"])
    assert "my_module" not in sys.modules


def test_installed_packages_announce_plugins(tmp_path, monkeypatch, recwarn):
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint("edge", "my_module", plugins.GROUP), EntryPoint("gone", "no_such_module", plugins.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    plugins.load_installed()
    assert "edge" in parts.TABLES["target"]
    assert [str(warning.message) for warning in recwarn] == [
        "the plug-in gone (no_such_module) is left out: ModuleNotFoundError: No module named 'no_such_module'"
    ]
