"""What can go wrong on the way to the Hub and back is one line that says what to do."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants, errors
from transformers import AutoImageProcessor, AutoModel

from hf_mim import MIMConfig, cli
from hf_mim.hub.errors import HubError, explain
from hf_mim.hub.files import weight_files
from hf_mim.hub.push import hub_errors, push
from hf_mim.modeling.options import OptionError
from hf_mim.training.checkpoint import load_model
from hf_mim.training.common.errors import CheckpointError
from hf_mim.training.trainer.arguments import MIMTrainingArguments


CHECKPOINT = Path(__file__).parent / "fixtures" / "checkpoint_v1"


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint that a test may spoil."""
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def wrapped(error: Exception) -> Exception:
    """As transformers hands it on."""
    try:
        try:
            raise error
        except Exception as cause:
            raise OSError("We couldn't connect to the Hub to load the files.\nCheck your connection.") from cause
    except OSError as outer:
        return outer


def test_without_network_it_says_what_the_cache_holds(monkeypatch):
    monkeypatch.setattr("hf_mim.hub.errors.in_cache", lambda: "; in the cache: me/kept")
    missing = errors.LocalEntryNotFoundError("not there")
    for off, words in ((True, "is switched off (HF_HUB_OFFLINE=1)"), (False, "cannot be reached")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", off)
        assert cli.describe(wrapped(missing)).endswith(f"{words}; in the cache: me/kept")


def test_of_a_name_that_is_no_folder_both_places_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mim.hub.errors.in_cache", lambda: "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for outer in (CheckpointError("no", "me/model"), OptionError("no", "teacher", "me/model")):
        outer.__cause__ = errors.LocalEntryNotFoundError("not there")
        expected = f"there is no folder me/model, and the Hub at {constants.ENDPOINT} cannot be reached"
        assert cli.describe(outer) == expected
    (tmp_path / "me" / "model").mkdir(parents=True)  # a folder that needs something else of the Hub
    assert cli.describe(outer).startswith("the Hub at ")


def test_the_models_of_a_cache_are_listed(tmp_path, monkeypatch):
    from huggingface_hub.utils import _cache_manager

    from hf_mim.hub.errors import in_cache

    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert in_cache() == "; the cache holds no model"
    for name in ("models--me--kept", "datasets--me--photos"):
        (tmp_path / name / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("0" * 40)
    assert in_cache() == "; in the cache: me/kept"


def test_a_full_disk_names_the_place_and_the_space_left(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "blobs" / "weights.incomplete"))
    assert explain(wrapped(full)).startswith("the disk is full: ") and str(tmp_path) in explain(full)
    assert explain(RuntimeError("Xet: No space left on device (os error 28)")).startswith("the disk is full: ")


def test_a_checkpoint_without_a_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError) as caught:
        AutoImageProcessor.from_pretrained(folder)
    assert "has no image processor" in explain(caught.value)


def refused(status: int, message: str) -> errors.HfHubHTTPError:
    url = f"{constants.ENDPOINT}/api/models/me/x/commit/main"
    response = SimpleNamespace(status_code=status, url=url, headers={}, request=None)
    return errors.HfHubHTTPError(message, response=response, server_message=message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(403, "You have no right to write here."), "no right to write to me/x"),
        (refused(403, "Private repository storage limit reached."), "the storage of me/x is full or refused"),
        (refused(401, "Invalid"), "does not accept"),
        (OSError(errno.ENOSPC, "No space left on device", "/nowhere/x"), "the disk is full"),
    ],
)
def test_rights_and_storage_are_one_kind_of_error_with_their_own_reasons(error, message):
    """The server's texts are others': what is read in them is read here, in one place."""
    with pytest.raises(HubError, match=message) as caught, hub_errors("me/x"):
        raise error
    assert caught.value.repo == "me/x" and isinstance(caught.value, ValueError)


def test_what_xet_says_is_no_traceback(monkeypatch):
    """It raises plain `RuntimeError`s, from within the client."""

    client = {"__name__": "huggingface_hub.hf_api"}
    exec("def upload(*_): raise RuntimeError('Data processing error: CAS service error\\n  at somewhere')", client)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.whoami", client["upload"])
    reason = "the upload to me/x failed: Data processing error: CAS service error$"
    with pytest.raises(HubError, match=reason), hub_errors("me/x"):
        HfApi().whoami()
    with pytest.raises(RuntimeError, match="a bug of ours"), hub_errors("me/x"):
        raise RuntimeError("a bug of ours")


def test_errors_of_ours_are_left_alone():
    assert explain(ValueError("a size must be positive")) is None
    assert cli.describe(ValueError("a size must be positive")) == "a size must be positive"
    assert cli.describe(KeyError("ours")) is None


# ---- what a checkpoint must not be able to do ------------------------------------------------------------------------
class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    torch.save({"bomb": Bomb(tmp_path / "ran")}, folder / "training_args.bin")
    for load in (load_model, AutoModel.from_pretrained, weight_files, lambda path: push(path, "me/x")):
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "notes.txt"])
def test_an_index_cannot_name_files_outside(name, folder):
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "notes.txt")
    index = {"metadata": {}, "weight_map": {"mim.encoder.x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no safetensors file of this folder"):
        weight_files(folder)


def test_a_config_cannot_make_timm_read_files(tmp_path):
    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "weights.pth")
    for option in ({"checkpoint_path": str(tmp_path / "weights.pth")}, {"pretrained": True}):
        options = {"model_type": "timm", "model_name": "resnet18", **option}
        with pytest.raises(ValueError, match="load files"):
            MIMConfig(image_size=32, encoder="convnet", encoder_config=options)
    assert not (tmp_path / "ran").exists()


def test_a_token_cannot_stand_in_a_recipe(tmp_path):
    with pytest.raises(ValueError, match="hub_token is refused") as caught:
        MIMTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in str(caught.value)
