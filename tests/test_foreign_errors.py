"""Errors of other libraries that are told by their text: each is raised by its library here, so that another wording
fails in this file first."""

import os
import signal

import pytest
import torch
from helpers import tiny_config

from hf_mim import MIMModel
from hf_mim.training.common.foreign_errors import is_lost_worker, is_torch_write_error, mismatch_reason


def test_weights_of_another_shape(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(4, 3).state_dict())
    assert mismatch_reason(caught.value).startswith("size mismatch for weight")
    MIMModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        MIMModel.from_pretrained(tmp_path, config=tiny_config(encoder_config={"size": "tiny", "patch_size": 8}))
    reason = mismatch_reason(caught.value)
    assert "mismatch" in reason.lower() and "\n" not in reason
    assert mismatch_reason(RuntimeError("first\nsecond")) == "first"


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_a_loader():
    with pytest.raises(RuntimeError) as caught:
        list(torch.utils.data.DataLoader(Deadly(), num_workers=1))
    assert is_lost_worker(caught.value) and not is_lost_worker(RuntimeError("CUDA out of memory"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_torch():
    with pytest.raises(Exception) as caught, open("/dev/full", "wb", buffering=0) as file:
        torch.save(torch.zeros(1_000_000), file)
    assert isinstance(caught.value, OSError) or is_torch_write_error(caught.value)
    assert not is_torch_write_error(RuntimeError("CUDA out of memory"))
