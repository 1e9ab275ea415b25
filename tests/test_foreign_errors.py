"""Errors of other libraries that are told by their text: each is raised by its library here, so that another wording
fails in this file first."""

import os
import signal

import pytest
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError

from hf_mim import MIMConfig
from hf_mim.training.common.foreign_errors import decoder_reason, field_reason, is_lost_worker, is_torch_write_error


def test_a_field_of_a_wrong_type():
    with pytest.raises(StrictDataclassError) as caught:
        MIMConfig(image_size={"a": "x" * 1000})
    reason = field_reason(caught.value)
    assert reason.startswith("Field 'image_size' with value {'a': 'xxx") and len(reason) <= 300


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_a_loader():
    with pytest.raises(RuntimeError) as caught:
        list(torch.utils.data.DataLoader(Deadly(), num_workers=1))
    assert is_lost_worker(caught.value) and not is_lost_worker(RuntimeError("CUDA out of memory"))


def test_a_broken_file_under_torchvision():
    jpeg = torch.frombuffer(bytearray(b"\xff\xd8\xff\xe0" + b"x" * 100), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"\.cpp:\d+") as caught:
        torchvision.io.decode_jpeg(jpeg)
    assert decoder_reason(caught.value) == "Image is incomplete or truncated"
    assert decoder_reason(OSError("image file is truncated (3 bytes, 4 left)\nmore")) == (
        "image file is truncated (3 bytes, 4 left)"
    )
    assert decoder_reason(MemoryError()) == "MemoryError"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_torch():
    with pytest.raises(Exception) as caught, open("/dev/full", "wb", buffering=0) as file:
        torch.save(torch.zeros(1_000_000), file)
    assert isinstance(caught.value, OSError) or is_torch_write_error(caught.value)
    assert not is_torch_write_error(RuntimeError("CUDA out of memory"))
