"""A file that is written from front to back, over as many starts as it takes, and then read as a part of memory."""

import mmap
import os
import shutil
import warnings
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


def free_bytes(folder: Path) -> int:
    """On the disk where a folder, existing or not, lies."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


class MappedFile:
    """Bytes that are appended, and mapped into memory once all of them are there.

    What counts is what the owner has recorded elsewhere after `sync`: what a crash left behind it is cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_written(self) -> bool:
        """Whether it is open for writing: since the first `append`."""
        return self._file is not None

    def append(self, data, start: int) -> None:
        """Writes bytes; those of the first call stand at `start`, and what was behind it is gone."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
            self._file.truncate(start)
            self._file.seek(start)
        self._file.write(data)

    def sync(self) -> None:
        """Makes what was appended outlast a crash."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, count: int, dtype: torch.dtype) -> Tensor:
        """The first `count` values (count,), a view of the file: not to be written to."""
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), count * dtype.itemsize, access=mmap.ACCESS_READ)
        with warnings.catch_warnings(action="ignore"):  # that it must not be written to
            return torch.frombuffer(self._map, dtype=dtype)

    def release(self) -> None:
        """Gives back the pages that were read, which count as the process's memory; they are read again if needed."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self):
        return MappedFile, (self.path,)  # a spawned worker maps the file anew instead of being sent it
