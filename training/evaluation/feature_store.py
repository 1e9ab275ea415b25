"""What a frozen encoder makes of every image, computed once and kept on disk."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_mim.training.common.errors import FolderError
from hf_mim.training.data.mapped_file import MappedFile


# Bytes of rows, of each file, after which pages that were read are given back: they count as the process's memory.
MAPPED_MOST = 2**25
FORMAT = 1  # raised when what is in the files changes


class FeatureStore:
    """Rows of one shape and type, one for every image, in one file that is mapped into memory.

    What is written is `<name>-<key>.rows` and, beside it, a record `.json` of what the rows are and how many are there.
    The record is written after its rows are on disk, and replaced as a whole: what was interrupted is continued. The
    key covers the whole description, so that rows of other weights, images or transforms lie in another file.

    Args:
        folder: where the files lie; made with the first row.
        name: the first part of the files' names, for people.
        description: what the rows are, as plain values.
        count: how many there will be.
        shape: of one row.
        dtype: of the values.
    """

    def __init__(
        self, folder: Path, name: str, description: dict, count: int, shape: tuple[int, ...], dtype: torch.dtype
    ):
        whole = {"format": FORMAT, **description, "count": count, "shape": list(shape), "dtype": str(dtype)}
        self.description = json.loads(json.dumps(whole))
        self.count, self.shape, self.dtype = count, tuple(shape), dtype
        key = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}-{key}.rows"
        self.file, self.width = MappedFile(self.path), int(np.prod(shape)) * dtype.itemsize
        self._rows: Tensor | None = None
        self._touched = 0  # bytes that were read since pages were given back
        self.reread()

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def complete(self) -> bool:
        return self.done == self.count

    @property
    def missing_bytes(self) -> int:
        return (self.count - self.done) * self.width

    def reread(self) -> None:
        """Looks at what is on disk now.

        Raises:
            FolderError: the files of this name hold something else.
        """
        self.done, self.bad = 0, []
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            recorded, done = record["description"], int(record["done"])
            bad, size = [int(index) for index in record["bad"]], self.file.size
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or half of one: everything is written anew
        if recorded != self.description:
            other = next((k for k in self.description if recorded.get(k) != self.description[k]), "")
            raise FolderError(
                f"{self.path} is the cache of another run ({other} differs): remove it, or set probe.cache",
                str(self.path.parent),
            )
        # A file that a crash or a copy left shorter than its record says: what is whole counts.
        self.done, self.bad = min(done, size // self.width), bad

    def append(self, rows: Tensor) -> None:
        """Writes rows (rows, *shape) behind those that are there; `commit` makes them count."""
        rows = rows.detach().to("cpu", self.dtype).contiguous()
        self.file.append(rows.view(torch.uint8).numpy().data, self.done * self.width)
        self.done += len(rows)

    def commit(self, bad: Iterable[int] = ()) -> None:
        """Makes what was appended outlast a crash; `bad` are positions of images that stand for others."""
        if not self.file.is_written:
            return
        self.file.sync()
        self.bad = sorted({*self.bad, *bad})
        unfinished = self.record.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"done": self.done, "bad": self.bad, "description": self.description}))
        os.replace(unfinished, self.record)

    def close(self) -> None:
        self.file.close()

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The rows (indices, *shape) at `indices`, a copy.

        Raises:
            FolderError: not all rows are there.
        """
        if self._rows is None:
            self._rows = self._map()
        rows = self._rows[indices].view(len(indices), *self.shape)
        self._touched += len(indices) * self.width
        if self._touched > MAPPED_MOST:
            self.file.release()
            self._touched = 0
        return rows

    def _map(self) -> Tensor:
        self.close()
        if not self.complete or self.file.size < self.count * self.width:
            there = min(self.done, self.file.size // self.width)
            message = f"{self.path} is cut short: {there} of {self.count} rows; run the command again"
            raise FolderError(message, str(self.path.parent))
        return self.file.read(self.count * self.width // self.dtype.itemsize, self.dtype).view(self.count, -1)


def weights_hash(model) -> str:
    """The same for the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def data_hash(dataset) -> str:
    """The same for the same images: the data set's fingerprint and, where they lie in files of their own, the files'
    names, sizes and times of change."""
    digest = hashlib.sha256(f"{dataset.files._fingerprint} {dataset.image_column} {len(dataset)}".encode())
    first = dataset.files[0][dataset.image_column]
    if not isinstance(first, dict) or first.get("bytes") is not None:
        return digest.hexdigest()[:32]
    for rows in dataset.files.iter(batch_size=1000):
        for file in rows[dataset.image_column]:
            if file["path"] and os.path.exists(file["path"]):
                status = os.stat(file["path"])
                digest.update(f"{file['path']} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
