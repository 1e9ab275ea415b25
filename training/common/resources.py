"""Disks that are full and memory that is short: what each library raises then, and what to say."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hf_mim.training.common.foreign_errors import foreign_errno, is_cpu_memory_error, is_torch_write_error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LITTLE = 64 * 2**20  # free bytes of a disk that counts as full
BATCH = "lower training.per_device_train_batch_size (training.gradient_accumulation_steps keeps the total batch)"


class ResourceError(OSError):
    """A disk that is full or memory that is short; the message is one line that says which."""


def explain_shortage(error: BaseException, folders: Sequence[Path] = ()) -> str | None:
    """What is short; None where an error has another cause.

    Args:
        folders: that may have been written into, where the error names none.
    """
    for cause in causes(error):
        if isinstance(cause, ResourceError):
            return str(cause)
        if isinstance(cause, torch.OutOfMemoryError):
            return f"the device is out of memory: {BATCH}"
        if isinstance(cause, MemoryError) or is_cpu_memory_error(cause) or foreign_errno(cause) == errno.ENOMEM:
            return f"this machine is out of memory: {BATCH}, training.dataloader_num_workers or data.memory_limit_mb"
        if foreign_errno(cause) in FULL:
            return describe_disk(place_of(cause, folders), foreign_errno(cause) != errno.ENOSPC)
        if is_torch_write_error(cause):  # torch does not say why
            return describe_disk(place_of(cause, folders), limit=True)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def place_of(error: BaseException, folders: Sequence[Path]) -> Path:
    """The file that an error names, else the folder, cache or temporary folder whose disk is full."""
    name = getattr(error, "filename", None)
    if isinstance(name, str | os.PathLike):
        return Path(name)
    places = (*folders, *other_folders())
    return next((place for place in places if free_bytes(place) < LITTLE), places[0])


def other_folders() -> tuple[Path, ...]:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE), Path(tempfile.gettempdir()), Path("/dev/shm")


def free_bytes(folder: Path) -> int:
    """On the disk where a folder is or would be."""
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError:
        return 2**62


def existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def describe_disk(place: Path, limit: bool) -> str:
    free = free_bytes(place)
    if limit and free > LITTLE:
        return f"cannot write {place}: its disk or a limit of it is full ({free / 2**30:.1f} GiB are free on the disk)"
    return f"the disk of {place} is full ({free / 2**20:.0f} MiB free)"
