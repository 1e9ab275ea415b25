"""Two processes are one with the doubled batch, whatever the target; what is printed when one of them was killed."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import processes_worker as worker
import psutil
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file, save_file
from test_ddp import ENVIRONMENT
from test_pretrain import ROOT, equal, weights

from hf_mim.training.checkpoint import load_encoder, load_model
from hf_mim.training.trainer import processes
from hf_mim.training.trainer.processes import PeerWatchdog
from hf_mim.training.trainer.saving import last_checkpoint


def start(folder) -> SimpleNamespace:
    """What one process found, and what two did, started once for all that is asked of them."""
    codes = torch.rand(5, 27, generator=torch.Generator().manual_seed(0))
    save_file({"codes": codes}, folder / "codes.safetensors")
    one = worker.as_one(folder / "1")  # first: it writes the teacher
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "processes_worker.py"), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    tensors = [load_file(folder / f"tensors-{rank}.safetensors") for rank in (0, 1)]
    return SimpleNamespace(folder=folder, one=one, found=found, tensors=tensors)


def assert_close(name: str, found: torch.Tensor, wanted: torch.Tensor, atol: float):
    """But for rounding: gradients are summed in another order. Attention does not depend on the bias of the keys, so
    that its gradient is nothing but rounding, which AdamW makes into whole steps: it is left out."""
    if name.endswith("qkv.bias"):
        found, wanted = (torch.stack(bias.chunk(3))[[0, 2]] for bias in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol, msg=lambda text: f"{name}: {text}")


def the_moving_average_is_the_same_in_all_processes_and_as_of_one(two):
    names = [name for name in two.one["tensors"] if name.startswith(("teacher.", "resumed."))]
    assert len(names) > 20
    for name in names:
        assert torch.equal(two.tensors[0][name], two.tensors[1][name]), name
        assert_close(name, two.tensors[0][name], two.one["tensors"][name], 1e-6)
        twin = name.replace("resumed.", "teacher.")
        assert torch.equal(two.tensors[1][name], two.tensors[1][twin]), name


def looks_see_what_they_see_with_one_process(two):
    looks = [[entry for entry in log if "watch_knn" in entry] for log in (two.one["found"]["log"], two.found[0]["log"])]
    assert [entry["step"] for entry in looks[0]] == [3, 6]
    for alone, together in zip(*looks, strict=True):
        assert alone.keys() == together.keys()
        assert alone["watch_knn"] == together["watch_knn"]
        for name in ("watch_effective_rank", "watch_spread", "watch_mean_loss"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3)
    assert not [entry for entry in two.found[1]["log"] if "watch_knn" in entry]


def codes_are_counted_over_all_processes(two):
    alone = [entry for entry in two.one["found"]["codes"] if "watch_code_perplexity" in entry]
    assert len(alone) == 2 and 1 < alone[0]["watch_code_perplexity"] <= 5
    assert [entry for entry in two.found[0]["codes"] if "watch_code_perplexity" in entry] == alone


def one_process_fits_the_codebook_and_the_others_wait(two):
    assert two.found[0]["fit"] == two.one["found"]["fit"] and two.found[0]["fit"]["perplexity"] > 1
    assert two.found[1]["fit"] == {}
    fitted = [load_file(two.folder / name / "fitted.safetensors") for name in ("1", "2")]
    assert equal(*fitted)


def masks_are_those_of_the_images_and_no_two_are_the_same(two):
    masks = torch.cat([tensors["masks"] for tensors in two.tensors], dim=1)
    assert torch.equal(masks, two.one["tensors"]["masks"])
    own = torch.cat([tensors["noise_masks"] for tensors in two.tensors], dim=1)
    for drawn in (masks, own):
        flat = drawn.flatten(0, 1)
        assert flat.shape == (worker.BATCH * worker.STEPS, 64) and len(flat.unique(dim=0)) == len(flat)
    # What a target draws follows from (seed, process, step): other numbers at each, and the first process' are one's.
    seeds = [found["seeds"] for found in two.found]
    assert len({*seeds[0], *seeds[1]}) == 2 * worker.STEPS and seeds[0] == two.one["found"]["seeds"]


def weights_sharded_by_fsdp2_train_as_those_of_one(two):
    losses, whole = worker.sharded_steps(False)
    assert losses[-1] < losses[0]
    assert two.found[0]["losses"] == pytest.approx(losses, rel=1e-5)
    found = load_file(two.folder / "whole.safetensors")
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def a_run_that_saves_shards_ends_whole_can_be_resumed_and_merged(two):
    folder = two.folder / "sharded"
    finished, last = weights(folder), last_checkpoint(folder)
    worker.fsdp_run(two.folder / "one")
    alone = weights(two.folder / "one")
    assert finished.keys() == alone.keys()
    for name, value in alone.items():
        assert_close(name, finished[name], value, 1e-5)
    assert equal(finished, weights(two.folder / "broken"))
    results = [json.loads((path / "metrics.json").read_text())["trained"] for path in (folder, two.folder / "one")]
    assert results[0]["knn_mean"] == pytest.approx(results[1]["knn_mean"], abs=4)  # of 64 images, a few may tip over
    assert not list(folder.glob("_fsdp*.py")) and (folder / "modeling_mim.py").is_file()
    assert (last / "pytorch_model_fsdp_0" / ".metadata").is_file() and not (last / "model.safetensors").exists()
    merge = f"accelerate merge-weights {last / 'pytorch_model_fsdp_0'} {last}"
    for load in (load_encoder, load_model):
        with pytest.raises(ValueError, match="sharded over several processes") as error:
            load(str(last))
        assert str(error.value).endswith(merge) and "pickle" in str(error.value)
    merge_fsdp_weights(str(last / "pytorch_model_fsdp_0"), str(last))
    assert equal(weights(last), finished)
    encoder = load_encoder(str(last)).state_dict()
    assert all(torch.equal(value, finished[f"mim.{name}"]) for name, value in encoder.items())


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    two = start(tmp_path)
    the_moving_average_is_the_same_in_all_processes_and_as_of_one(two)
    looks_see_what_they_see_with_one_process(two)
    codes_are_counted_over_all_processes(two)
    one_process_fits_the_codebook_and_the_others_wait(two)
    masks_are_those_of_the_images_and_no_two_are_the_same(two)
    weights_sharded_by_fsdp2_train_as_those_of_one(two)
    a_run_that_saves_shards_ends_whole_can_be_resumed_and_merged(two)


# ---- when one was killed --------------------------------------------------------------------------------------------
@pytest.fixture
def child():
    """A process beside this one."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def watchdog(monkeypatch, child, store=None, other=None) -> PeerWatchdog:
    """That of process 0 of two, the other of which is `child`, here or at another place."""
    store = store or torch.distributed.HashStore()
    monkeypatch.setattr(processes, "store", lambda: store)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(
        processes, "gather_object", lambda mine: [*mine, (other or processes.pid_namespace(), child.pid)]
    )
    monkeypatch.setattr(processes, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    monkeypatch.setattr(processes, "SETTLE", 0.2)
    return PeerWatchdog(2, lambda: "resume with: this")


def test_a_process_that_waits_in_vain_ends_with_one_message(monkeypatch, child, capsys):
    ended = threading.Event()
    monkeypatch.setattr(processes.os, "_exit", lambda code: ended.set())
    with watchdog(monkeypatch, child) as watching:
        assert not ended.wait(0.3) and watching.gone() == []
        child.kill()  # not waited for: its entry stays, as that of a process whose launcher is busy
        assert ended.wait(10) and watching.gone() == [1]
    error = capsys.readouterr().err
    assert error == f"error: process 1 of 2 (pid {child.pid}) was killed (out of memory?); resume with: this\n"


def test_a_broken_connection_is_put_into_words_and_other_errors_are_not(monkeypatch, child, capsys):
    broken = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    with pytest.raises(SystemExit) as end, watchdog(monkeypatch, child, other=("elsewhere", "")):
        raise broken
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "one of 2 processes, perhaps on another machine, was killed or does not answer" in error
    assert "Connection closed by peer" in error and error.count("\n") == 1
    for other in (ValueError("a bad word"), RuntimeError("a mistake of ours")):
        store = torch.distributed.HashStore()
        with pytest.raises(type(other), match=str(other)), watchdog(monkeypatch, child, store):
            raise other
        with pytest.raises(SystemExit) as end, watchdog(monkeypatch, child, store):  # what another has said by now
            raise other
    assert end.value.code == 1 and capsys.readouterr().err == ""


def test_an_error_on_another_machine_ends_those_who_wait_here(monkeypatch, child, capsys):
    store, codes = torch.distributed.HashStore(), []
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    with watchdog(monkeypatch, child, store):
        store.add(processes.CLAIM, 1)  # it has been said there
        until = time.monotonic() + 10
        while not codes and time.monotonic() < until:
            time.sleep(0.02)
    assert codes == [1] and capsys.readouterr().err == ""


def test_one_process_alone_is_left_alone():
    with pytest.raises(RuntimeError, match="gloo"), PeerWatchdog(1, lambda: ""):
        raise RuntimeError("/gloo/")
    assert processes.is_alive(psutil.Process(os.getpid()))
