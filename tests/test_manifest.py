"""What a resume looks at: files that are damaged, and what differs from the run that wrote the checkpoint."""

import io
import json
import random
import resource
import shutil

import PIL.Image
import pytest
import torch
import yaml
from rich.console import Console
from test_pretrain import TINY, equal, weights

from hf_mim.training.commands import pretrain as commands
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.resources import ResourceError, explain_shortage
from hf_mim.training.trainer import manifest
from hf_mim.training.trainer.manifest import (
    differences,
    find_damage,
    last_whole_checkpoint,
    read_manifest,
    write_manifest,
)
from hf_mim.training.trainer.saving import last_checkpoint


STEPS = ["training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=3"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images."""
    folder, numbers = tmp_path_factory.mktemp("photos"), random.Random(0)
    for i in range(24):
        PIL.Image.frombytes("RGB", (16, 16), numbers.randbytes(768)).save(folder / f"{i:02}.png")
    return folder


def run(folder, photos, *words, recipe="quick") -> str:
    out = io.StringIO()
    base = (
        [] if recipe != "quick" else [*TINY, *STEPS, "training.per_device_train_batch_size=8", "model.num_channels=3"]
    )
    words = [*base, f"data.dataset={photos}", f"training.output_dir={folder}", *words]
    pretrain(recipe, words, Console(file=out, width=400))
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, photos)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(folder, photos, *words) -> str:
    return run(folder, photos, "training.resume=true", *words, recipe=str(folder))


def test_an_untouched_checkpoint_is_whole_and_nothing_is_said(finished, photos, copied):
    assert last_whole_checkpoint(finished) == (finished / "checkpoint-6", [])
    shutil.rmtree(copied / "checkpoint-6")
    printed = resume(copied, photos)
    assert f"resuming from {copied / 'checkpoint-4'}\n" in printed
    assert not any(word in printed for word in ("instead of", "other", "changed", "cannot be used"))
    assert equal(weights(copied), weights(finished))


@pytest.mark.parametrize("has_manifest", [True, False])
def test_any_file_that_is_cut_changed_or_missing_is_found(copied, has_manifest):
    """A checkpoint of an older version has no manifest: what cannot be read is found all the same."""
    folder, numbers = copied / "checkpoint-6", random.Random(1)
    known = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in manifest.LEFT_OUT]
    if not has_manifest:
        (folder / manifest.MANIFEST).unlink()
        known = [path for path in known if path.suffix in (".json", ".safetensors", ".pt", ".pth")]
    assert len(known) > 5 and find_damage(folder) is None
    for path in known:
        content = path.read_bytes()
        path.write_bytes(content[: numbers.randrange(len(content))])
        assert find_damage(folder) == f"{path.relative_to(folder)} is damaged"
        if has_manifest:
            changed = bytearray(content)
            changed[numbers.randrange(len(content))] ^= 0x10
            path.write_bytes(changed)
            assert find_damage(folder) == f"{path.relative_to(folder)} is damaged"
            path.unlink()
            assert find_damage(folder) == f"{path.relative_to(folder)} is missing"
        path.write_bytes(content)
    assert find_damage(folder) is None
    (folder / "model.safetensors").write_bytes(b"")
    whole, (message,) = last_whole_checkpoint(copied)
    assert whole == copied / "checkpoint-4" == last_checkpoint(copied) and (copied / "damaged-checkpoint-6").is_dir()
    assert message.startswith(f"{folder} cannot be used: model.safetensors is damaged")


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_ends_with_the_same_weights(finished, photos, copied):
    path = copied / "checkpoint-6" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    printed = resume(copied, photos)
    assert f"{copied / 'checkpoint-6'} cannot be used: optimizer.pt is damaged; it is damaged-checkpoint-6" in printed
    assert f"resuming from {copied / 'checkpoint-4'}" in printed
    assert equal(weights(copied), weights(finished))


def test_what_differs_at_a_resume_is_said_with_what_it_means(photos, copied, tmp_path):
    grown = shutil.copytree(photos, tmp_path / "photos")
    PIL.Image.new("RGB", (16, 16)).save(grown / "one_more.png")
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["training"]["weight_decay"] = 0.5
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))  # edited
    path = copied / "checkpoint-6" / manifest.MANIFEST
    stored = json.loads(path.read_text())
    stored["versions"]["torch"] = "2.0.0"
    stored["processes"] = 4
    path.write_text(json.dumps(stored))
    printed = resume(copied, grown, "training.per_device_train_batch_size=4", "training.max_steps=7")
    assert "training data have changed (images: 25 instead of 24)" in printed
    assert "will not end as it would have without a break" in printed
    assert "total batch is 4 instead of 8" in printed and "number of processes is 1 instead of 4" in printed
    assert f"torch: {torch.__version__} instead of 2.0.0" in printed
    assert "training.weight_decay" in printed and "training.max_steps" in printed


def test_as_many_images_that_are_others():
    before = {"data": {"images": 24, "sample": "a"}}
    (message,) = differences(before, {"data": {"images": 24, "sample": "b"}})
    assert "as many, but not the same" in message
    assert differences(before, before) == [] and differences({}, before) == []


def test_a_manifest_is_what_is_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    write_manifest(tmp_path, {"processes": 2})
    assert read_manifest(tmp_path)["files"]["folder/file"]["size"] == 1 and read_manifest(tmp_path)["processes"] == 2


# ---- full disks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [300, 3_000, 40_000])
def test_a_disk_that_is_full_loses_nothing_whichever_library_meets_it(finished, photos, tmp_path, monkeypatch, size):
    """No file may grow beyond `size`, which stops another library each time; then there is room again."""
    step, before = commands.MIMTrainer.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self, *args, **kwargs):
        if self.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(commands.MIMTrainer, "training_step", filling)
    folder = tmp_path / "run"
    try:
        with pytest.raises(ResourceError) as caught:
            run(folder, photos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert "\n" not in message and "is full" in message and str(folder) in message
    assert f"last complete checkpoint is {folder / 'checkpoint-2'}" in message
    assert message.endswith(f"resume with: hf-mim pretrain {folder} training.resume=true")
    monkeypatch.undo()
    resume(folder, photos)
    assert equal(weights(folder), weights(finished))


def test_memory_that_is_short_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(10**15)
    assert "this machine is out of memory: lower training.per_device" in explain_shortage(caught.value)
    assert "out of memory" in explain_shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert "out of memory" in explain_shortage(MemoryError())
    assert explain_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain_shortage(FileNotFoundError(2, "No such file")) is None
