"""Images that cannot be used: they are counted, named and replaced, and beyond `data.max_bad_images` the run stops."""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_mim.training.common.errors import DataError


SETTLED = 1000  # images of which a share of bad ones says something
HOPELESS = 3  # passes without one good image
MESSAGE_BYTES = 500
BAD_SLOTS = 2**20  # a bad file takes one by its checksum: workers need no lock, and two in one slot are rare


class TooManyBadImages(DataError):
    """More files than `data.max_bad_images` allows cannot be used."""


def name_file(file, name: str) -> dict:
    """An image of a data set as {"bytes", "path"}, for messages: with a name where it has no path."""
    file = {"bytes": file} if isinstance(file, bytes) else file
    if file is None or isinstance(file, dict) and file.get("path") is None:
        return {"bytes": (file or {}).get("bytes") or b"", "path": name}
    return file


def row_name(dataset, index: int) -> str:
    """The row of a table that a part of it has at `index`, counted from 0."""
    return f"row {index if dataset._indices is None else dataset._indices.column(0)[index].as_py()}"


@dataclass(frozen=True)
class BadImageReport:
    """How many images could not be used, as far as they were looked at, and what is wrong with the first in the data
    set's order; None where that is not known."""

    count: int = 0
    first: str | None = None

    def __add__(self, other: "BadImageReport") -> "BadImageReport":
        return BadImageReport(self.count + other.count, self.first if self.first is not None else other.first)

    def __str__(self) -> str:
        plural = "s" if self.count != 1 else ""
        first = f"; the first: {self.first}" if self.first else ""
        return f"skipped {self.count:,} image{plural} that cannot be used{first}"


class BadImages:
    """Which images of a data set cannot be used; each is replaced by the next one that can, whoever finds it first.

    Args:
        count: of the images.
        limit: `data.max_bad_images`.
        error_of: the index of a bad image -> what is wrong with it, naming the file.
        labelled: (count,), bool: a labelled image is replaced by another one. None where none has a label.
    """

    def __init__(self, count: int, limit: float, error_of: Callable[[int], str], labelled: torch.Tensor | None = None):
        self.count, self.limit, self.error_of = count, limit, error_of
        self.labelled = torch.zeros(count, dtype=torch.bool) if labelled is None else labelled
        self.flags = torch.zeros(count, dtype=torch.bool).share_memory_()  # the loader's workers write here too

    def add(self, index: int) -> None:
        """Raises:
        TooManyBadImages: that was one too many.
        """
        self.flags[index] = True
        self.check()

    def check(self) -> None:
        report = self.report()
        if report.count and (report.count > allowed(self.count, self.limit) or report.count == self.count):
            raise too_many(report.count, f"{self.count} images", self.limit, report.first)

    def report(self) -> BadImageReport:
        indices = self.flags.nonzero().flatten()
        return BadImageReport(len(indices), self.error_of(int(indices[0]))) if len(indices) else BadImageReport()

    def replace(self, indices: list[int]) -> list[int]:
        """Known bad images by the next good ones."""
        if not self.flags.any():
            return list(indices)
        return [self._good(int(index)) for index in indices]

    def _good(self, index: int) -> int:
        if not self.flags[index]:
            return index
        good = ~self.flags
        alike = good & (self.labelled == self.labelled[index])
        candidates = (alike if alike.any() else good).nonzero().flatten()
        place = int(torch.searchsorted(candidates, index))
        return int(candidates[place % len(candidates)])


class BadFiles:
    """What one worker that reads a stream has met that cannot be decoded.

    Args:
        slots: (BAD_SLOTS,), of all workers.
        first: of all workers, the message about a bad file; see `put_message`.
        limit: `data.max_bad_images`.

    Attributes:
        seen: how many images were looked at, by pass.
        any_good: whether one of them was good.
    """

    def __init__(self, slots: torch.Tensor, first: torch.Tensor, limit: float):
        self.slots, self.first, self.limit, self.any_good = slots, first, limit, False
        self.seen: Counter[int] = Counter()
        self.bad: set[int] = set()

    def add(self, file: dict | None, epoch: int, error: str) -> None:
        """Raises:
        TooManyBadImages: that was one too many, or there is no good one.
        """
        file = file or {}
        slot = zlib.crc32((file.get("path") or "").encode() + (file.get("bytes") or b"")) % BAD_SLOTS
        self.slots[slot] = True
        put_message(self.first, error)
        self.bad.add(slot)
        seen = max(self.seen.values())
        hopeless = not self.any_good and epoch >= min(self.seen) + HOPELESS
        if hopeless or len(self.bad) > allowed(max(seen, SETTLED), self.limit):
            raise too_many(len(self.bad), f"the first {seen} images", self.limit, error) from None


def put_message(memory: torch.Tensor, message: str) -> None:
    """Writes a text into shared memory (bytes,), uint8, unless there is one."""
    if not memory[0]:
        encoded = message.encode()[: len(memory)]
        memory[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def get_message(memory: torch.Tensor) -> str | None:
    return bytes(memory[memory > 0].tolist()).decode(errors="ignore") or None


def allowed(count: int, limit: float) -> int:
    """`data.max_bad_images` as a number of images: a share below 1, of which at least one image; else a number."""
    return int(limit) if limit >= 1 or limit == 0 else max(1, int(limit * count))


def too_many(bad: int, total: str, limit: float, error: str | None) -> TooManyBadImages:
    return TooManyBadImages(f"{bad} of {total} cannot be used, more than data.max_bad_images={limit} allows: {error}")
