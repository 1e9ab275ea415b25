"""One owner for a folder: locks between processes, default names, folders that are removed."""

import io
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console
from test_pretrain import TINY, run

from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common import output_folder
from hf_mim.training.common.errors import FolderError
from hf_mim.training.common.output_folder import LOCK, FolderLock, OutputFolder, choose_folder, make_folder
from hf_mim.training.trainer.saving import last_checkpoint


OWNER = """
import sys, time
from pathlib import Path
from hf_mim.training.common.output_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that writes into the folder."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_owner_until_that_process_ends_however_it_does(tmp_path, owner):
    for attempt in (lambda: FolderLock(tmp_path), OutputFolder(tmp_path).open, OutputFolder(tmp_path).check_free):
        with pytest.raises(FolderError, match=f"process {owner.pid} on .* writes into {tmp_path}"):
            attempt()
    with pytest.raises(FolderError, match=f"process {owner.pid} on .* writes into {tmp_path}"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / LOCK).exists()  # left behind
    FolderLock(tmp_path).release()
    assert not any(tmp_path.iterdir())


def test_a_process_that_was_started_meanwhile_holds_no_lock(tmp_path):
    """A loader's worker may live on for seconds after the run was killed."""
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderError, match="this one"):
        FolderLock(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    lock.release()
    check = [sys.executable, "-c", OWNER.replace("time.sleep(60)", ""), str(tmp_path)]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout == "locked\n"
    child.kill()
    child.join()


def test_default_names_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output_folder.time, "strftime", lambda form: "now")
    folders = [choose_folder(None, "probe-x", (), "") for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(OutputFolder.open, folders))
    assert len({folder.path for folder in folders}) == 16
    assert folders[0].path.parent.resolve() == (tmp_path / "outputs").resolve()
    for folder in folders:
        folder.close()
    assert make_folder(tmp_path / "outputs" / "probe-x-now").name == "probe-x-now-17"


def test_a_run_that_somebody_finished_meanwhile_is_left_alone(tmp_path):
    folder = choose_folder(str(tmp_path / "run"), "", ("metrics.json",), "choose another")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(FolderError, match="holds another run .metrics.json.: choose another"):
        folder.open()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=f"cannot make the output folder {tmp_path}/file/run"):
        choose_folder(str(tmp_path / "file" / "run"), "", (), "").open()


def test_file_systems_without_locks_are_used_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(output_folder.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_folder.fcntl, "lockf", refuse)
    lock = FolderLock(tmp_path / "..")
    assert not lock.guards
    lock.release()
    printed = run(tmp_path / "run", "training.max_steps=1", "data.max_eval_images=0")
    assert f"there are no file locks in {tmp_path / 'run'}: start no second run in it" in printed
    monkeypatch.setattr(output_folder, "fcntl", None)  # Windows
    lock = FolderLock(tmp_path)
    assert not lock.guards
    lock.release()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_during_a_run_ends_it(tmp_path, monkeypatch, replaced):
    step, folder = commands.MIMTrainer.training_step, tmp_path / "run"

    def removing(self, *args, **kwargs):
        if self.state.global_step == 1:
            shutil.rmtree(folder)
            if replaced:
                folder.mkdir()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(commands.MIMTrainer, "training_step", removing)
    words = [*TINY, "training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4"]
    with pytest.raises(FolderError, match=f"the output folder {folder} was removed"):
        pretrain("quick", [*words, f"training.output_dir={folder}"], Console(quiet=True))
    assert last_checkpoint(folder) is None and not output_folder.HELD


def test_nothing_is_printed_about_a_folder_that_is_not_made(tmp_path):
    folder, out = tmp_path / "run", io.StringIO()
    with pytest.raises(ValueError):
        pretrain("quick", [*TINY, "data.dataset=/nowhere", f"training.output_dir={folder}"], Console(file=out))
    assert "output folder" not in out.getvalue() and not folder.exists()
