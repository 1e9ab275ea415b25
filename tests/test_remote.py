"""Runs and models at URLs: what arrives, in which order, what happens when it does not, and going on elsewhere."""

import io
import json
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from flaky import Flaky
from helpers import tiny_config
from rich.console import Console
from test_finetune import TINY as FINETUNE
from test_pretrain import FILES, TINY, equal, weights
from transformers import TrainerControl, TrainerState

from hf_mim import MIMForPreTraining, MIMModel
from hf_mim.training.checkpoint import load_encoder, load_model
from hf_mim.training.commands.finetune import finetune
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.errors import FolderError
from hf_mim.training.data import fetching, urls
from hf_mim.training.data.fetching import fetch_model
from hf_mim.training.trainer import remote, remote_lock
from hf_mim.training.trainer.remote import MARKER, RemoteRun, fetch_files
from hf_mim.training.trainer.saving import last_checkpoint
from hf_mim.training.trainer.trainer import MIMTrainer


URL = "flaky://bucket/run"
SMALL = [*TINY, "data.max_train_images=8", "data.max_eval_images=0", "training.watch_every=0"]
SMALL += ["training.per_device_train_batch_size=4", "training.max_steps=4"]
SMALL += ["training.save_strategy=steps", "training.save_steps=1"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty file system, and an empty cache: another machine."""
    Flaky.reset()
    monkeypatch.setattr(urls, "PAUSES", (0, 0))
    monkeypatch.setattr(fetching.constants, "HF_HOME", str(tmp_path / "cache"))
    yield
    Flaky.reset()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of the same run in a folder."""
    folder = tmp_path_factory.mktemp("runs") / "here"
    pretrain("quick", [*SMALL, f"training.output_dir={folder}"], Console(file=io.StringIO()))
    return weights(folder)


def run(*overrides, name="quick", base=SMALL, url=URL) -> str:
    out = io.StringIO()
    pretrain(name, [*base, *overrides, f"training.output_dir={url}"], Console(file=out, width=250))
    return out.getvalue()


def there(url=URL) -> set[str]:
    return set(urls.list_below(url))


def local() -> Path:
    return RemoteRun(URL).folder


# ---- whole runs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_run_at_a_url_is_the_run_in_a_folder(protocol, tmp_path, whole):
    url = f"{protocol}://{tmp_path}/bucket/run"
    text = run(url=url)
    assert f"output folder: {url}" in text and f"all of it is at {url}" in text and "NOT" not in text
    checkpoints = {name.partition("/")[0] for name in there(url) if name.startswith("checkpoint-")}
    assert there(url) >= FILES | {f"checkpoint-4/{MARKER}"} and checkpoints == {"checkpoint-4"}
    assert not any(name.endswith("training_args.bin") for name in there(url))
    assert f"hf-mim pretrain {url}/recipe.yaml" in urls.read_url(f"{url}/recipe.yaml").decode()
    assert equal(load_model(url).state_dict(), whole)
    if protocol == "memory":
        fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def test_another_machine_goes_on_exactly(tmp_path, monkeypatch, whole):
    step = MIMTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise ZeroDivisionError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MIMTrainer, "training_step", die)
    with pytest.raises(ZeroDivisionError):
        run()
    monkeypatch.undo()
    monkeypatch.setattr(fetching.constants, "HF_HOME", str(tmp_path / "elsewhere"))
    out = io.StringIO()
    pretrain(URL, ["training.resume=true"], Console(file=out, width=250))
    assert f"resuming from {tmp_path / 'elsewhere'}" in out.getvalue() and "checkpoint-2" in out.getvalue()
    assert equal(load_model(URL).state_dict(), whole)
    assert last_checkpoint(local()).name == "checkpoint-4"


def test_what_holds_a_run_is_not_written_over(tmp_path, monkeypatch):
    Flaky().pipe("/bucket/run/checkpoint-3/model.safetensors", b"")
    with pytest.raises(ValueError, match=rf"{URL} holds another run \(checkpoint-3\)"):
        run()
    assert not local().exists()
    with pytest.raises(ValueError, match="training.output_dir holds a password or token") as caught:
        run(url="sftp://me:hunter2@host/run")
    assert "hunter2" not in str(caught.value)
    Flaky.always = {"write": PermissionError("Access Denied")}
    for _ in range(2):  # it leaves nothing behind that would be taken for a run
        with pytest.raises(OSError, match="^no permission to write flaky://bucket/other: Access Denied$"):
            run(url="flaky://bucket/other")


def test_a_fine_tuned_model_at_a_url(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.manual_seed(0)
    MIMForPreTraining(tiny_config(num_channels=1)).save_pretrained(tmp_path / "source")
    Flaky().put(f"{tmp_path / 'source'}/", "/bucket/source/", recursive=True)
    out = io.StringIO()
    finetune("flaky://bucket/source", None, [*FINETUNE, f"training.output_dir={URL}"], Console(file=out, width=250))
    assert there() >= {"config.json", "model.safetensors", "recipe.yaml", "metrics.json", "confusion.png"}
    assert "init_from: flaky://bucket/source" in urls.read_url(f"{URL}/recipe.yaml").decode()
    assert not Path("flaky:").exists()  # what a URL is as a path
    accuracy = json.loads(urls.read_url(f"{URL}/metrics.json"))["test"]["accuracy"]
    shutil.rmtree(local())  # another machine, after the end: the best checkpoint is found again
    finetune(URL, None, ["training.resume=true"], Console(file=out, width=250))
    assert json.loads(urls.read_url(f"{URL}/metrics.json"))["test"]["accuracy"] == accuracy


# ---- faults --------------------------------------------------------------------------------------------------------
def checkpoint(step: int, content: bytes = b"weights", best: str | None = None) -> None:
    folder = local() / f"checkpoint-{step}"
    (folder / "deeper").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "deeper" / "more.bin").write_bytes(b"x")
    (folder / MARKER).write_text(json.dumps({"global_step": step, "best_model_checkpoint": best}))


class Saves:
    """A run whose checkpoints are saved one by one, each of them copied before the next."""

    def __init__(self, limit=1):
        self.said, self.limit = [], limit
        self.remote = RemoteRun(URL, self.said.append)

    def save(self, step: int, wait=True):
        checkpoint(step)
        for path in sorted(local().glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[: -self.limit]:
            shutil.rmtree(path)
        state = TrainerState(global_step=step, is_world_process_zero=True)
        arguments = type("Arguments", (), {"save_total_limit": self.limit})
        self.remote.on_save(arguments, state, TrainerControl())
        if wait:
            self.remote.pool.submit(lambda: None).result()


def test_the_marker_comes_last_and_goes_first():
    saves = Saves()
    saves.save(1)
    written = [path for method, path in Flaky.calls if method == "write"]
    assert len(written) == 3 and written[-1] == f"/bucket/run/checkpoint-1/{MARKER}"
    Flaky.calls.clear()
    saves.save(2)
    removed = [path for method, path in Flaky.calls if method == "remove"]
    assert removed[0] == f"/bucket/run/checkpoint-1/{MARKER}"
    assert {name.partition("/")[0] for name in there()} == {"checkpoint-2"}
    assert [method for method, _ in Flaky.calls].index("remove") > 2  # not before the new one is there
    assert not any((local() / remote.OUTGOING).iterdir()) and saves.said == []


@pytest.mark.parametrize("part", ["model.safetensors", "more.bin", MARKER])
def test_what_fails_once_is_said_and_copied_at_the_next_save(part):
    Flaky.faults = [("write", f"checkpoint-1/{'deeper/' * (part == 'more.bin')}{part}", TimeoutError("too slow"))]
    saves = Saves(limit=2)
    saves.save(1)
    assert saves.said == [f"cannot copy checkpoint-1 to {URL}: too slow; it will be tried again"]
    assert RemoteRun(URL)._complete_there() == []
    saves.save(2)
    assert RemoteRun(URL)._complete_there() == [2, 1]
    saves.remote.finish()
    assert saves.said[-1].startswith(f"all of it is at {URL}") and saves.remote.failed == {}


def test_a_disk_without_links_or_room(monkeypatch):
    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr(remote.os, "link", full)
    saves = Saves()
    saves.save(1)  # copied instead
    monkeypatch.setattr(remote.shutil, "copyfile", full)
    saves.save(2)
    assert RemoteRun(URL)._complete_there() == [2] and saves.said == []


def test_what_stays_away_is_named_at_the_end(tmp_path):
    saves = Saves()
    saves.save(1)
    Flaky.always = {"write": OSError("no space left")}
    saves.save(2)
    (local() / "metrics.json").write_text("{}")
    saves.remote.finish()
    assert saves.said[-1].startswith(f"NOT at {URL}: checkpoint-2, metrics.json (no space left). They are in {local()}")
    assert RemoteRun(URL)._complete_there() == [1]  # which stays as long as there is no later one


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path, monkeypatch):
    saves = Saves(limit=2)
    saves.save(1)
    saves.save(2)
    Flaky().pipe({f"/bucket/run/checkpoint-{i}/model.safetensors": b"half" for i in (3, 4, 5)})
    Flaky().pipe({f"/bucket/run/checkpoint-{i}/{MARKER}": text for i, text in ((4, b'{"global_st'), (5, b"[1]"))})
    monkeypatch.setattr(fetching.constants, "HF_HOME", str(tmp_path / "elsewhere"))
    other = Saves(limit=3)
    other.remote.fetch_last()
    assert last_checkpoint(local()).name == "checkpoint-2" and len(list(local().glob("checkpoint-*"))) == 1
    other.save(3)
    other.save(6)  # checkpoint-1 is not on this machine; with 2, 3 and 6 there is no room for it
    assert {name.partition("/")[0] for name in there()} == {"checkpoint-2", "checkpoint-3", "checkpoint-6"}


def test_a_url_has_one_writer_and_a_dead_one_does_no_harm(monkeypatch):
    monkeypatch.setattr(remote_lock, "BEAT", 0.05)
    monkeypatch.setattr(remote_lock, "PATIENCE", 0.6)
    said = []
    first, second = (remote_lock.RemoteLock(URL, said.append) for _ in range(2))
    first.take()
    with pytest.raises(FolderError, match=f"process .* writes to {URL}: wait for its end"):
        second.take()
    assert "was in use by process" in said[0]
    first.ended.set()  # killed: nothing is renewed, nothing removed
    first.thread.join()
    assert remote_lock.NAME in there()
    third = remote_lock.RemoteLock(URL, said.append)
    third.take()
    first.release()  # of another one's nothing is removed
    assert remote_lock.NAME in there()
    third.release()
    assert remote_lock.NAME not in there()


def test_a_damaged_checkpoint_at_a_url_is_passed_over(tmp_path, monkeypatch, whole):
    run("training.save_steps=2", "training.save_total_limit=3")
    name = "checkpoint-4/model.safetensors"
    Flaky().pipe(f"/bucket/run/{name}", urls.read_url(f"{URL}/{name}")[:-10])
    monkeypatch.setattr(fetching.constants, "HF_HOME", str(tmp_path / "elsewhere"))
    out = io.StringIO()
    pretrain(URL, ["training.resume=true"], Console(file=out, width=400))
    printed = out.getvalue()
    assert "checkpoint-4 cannot be used: model.safetensors is damaged" in printed
    assert f"resuming from {local() / 'checkpoint-2'}" in printed and remote_lock.NAME not in there()
    assert equal(load_model(URL).state_dict(), whole)


def test_the_best_checkpoint_is_fetched_with_the_last(tmp_path, monkeypatch):
    first = Saves(limit=3)
    for step in (1, 2):
        first.save(step)
    checkpoint(3, best="/home/somebody/run/checkpoint-1")
    first.remote.finish()
    monkeypatch.setattr(fetching.constants, "HF_HOME", str(tmp_path / "elsewhere"))
    RemoteRun(URL).fetch_last()
    assert {path.name for path in local().iterdir()} == {"checkpoint-1", "checkpoint-3"}
    state = TrainerState.load_from_json(str(local() / "checkpoint-3" / MARKER))
    assert state.best_model_checkpoint == str(local() / "checkpoint-1")


def test_a_slow_copy_is_overtaken_and_never_torn(monkeypatch):
    """While one is copied its files are rotated away, and of those that wait only the last is copied."""
    started, gate, put = threading.Event(), threading.Event(), Flaky.put_file

    def slow(self, *args, **kwargs):
        started.set()
        assert gate.wait(10)
        put(self, *args, **kwargs)

    monkeypatch.setattr(Flaky, "put_file", slow)
    saves = Saves()
    saves.save(1, wait=False)
    assert started.wait(10)
    saves.save(2, wait=False)
    saves.save(3, wait=False)
    assert [path.name for path in local().glob("checkpoint-*")] == ["checkpoint-3"]
    gate.set()
    saves.remote.finish()
    copied = {path.split("/")[3] for method, path in Flaky.calls if method == "write" and path.endswith(MARKER)}
    assert copied == {"checkpoint-1", "checkpoint-3"} and RemoteRun(URL)._complete_there() == [3]


def test_a_place_that_forbids_removal_keeps_all():
    saves = Saves()
    saves.save(1)
    Flaky.always = {"remove": PermissionError("retention")}
    saves.save(2)
    assert RemoteRun(URL)._complete_there() == [2, 1] and saves.remote.failed == {}
    assert saves.said == [f"old checkpoints stay at {URL}: retention"]


# ---- what is fetched -----------------------------------------------------------------------------------------------
def put_model(seed: int) -> MIMModel:
    torch.manual_seed(seed)
    model = MIMModel(tiny_config(), add_pooling_layer=False)
    folder = local().parent / f"made-{seed}"
    model.save_pretrained(folder)
    Flaky().put(f"{folder}/", "/bucket/model/", recursive=True)
    return model


def test_a_model_is_fetched_once_and_again_when_it_changes():
    extra = {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"\x80", "checkpoint-1/config.json": b"{}"}
    Flaky().pipe({f"/bucket/model/{name}": content for name, content in extra.items()})
    for seed in (0, 1):
        made = put_model(seed)
        assert equal(load_encoder("flaky://bucket/model").state_dict(), made.state_dict())
        folder = fetch_model("flaky://bucket/model")
        assert fetch_model("flaky://bucket/model/") == folder
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_what_is_no_model_is_refused():
    for url, message in {
        "flaky://bucket/nothing": "no checkpoint at flaky://bucket/nothing: there is nothing",
        "flaky://bucket/bin": "no checkpoint at flaky://bucket/bin: it has no weights as safetensors",
        "flaky://bucket/parts": "names weights that are not there: '../../evil.safetensors'",
        "https://me:hunter2@host/model": r"holds a password or token \(https://\*\*\*@host/model\)",
    }.items():
        Flaky().pipe({"/bucket/bin/config.json": b"{}", "/bucket/bin/model.bin": b"", "/bucket/parts/config.json": b""})
        index = {"weight_map": {"a": "../../evil.safetensors", "b": "model-1.safetensors"}}
        Flaky().pipe("/bucket/parts/model.safetensors.index.json", json.dumps(index).encode())
        Flaky().pipe("/bucket/parts/model-1.safetensors", b"")
        with pytest.raises(ValueError, match=message):
            load_encoder(url)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "link/evil", "a//b"])
def test_nothing_is_fetched_out_of_the_folder(name, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="leads elsewhere"):
        fetch_files("flaky://bucket", [name], tmp_path / "inside")
    assert list((tmp_path / "outside").iterdir()) == []
