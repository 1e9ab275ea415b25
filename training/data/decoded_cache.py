"""Decoded images on disk: a file is decoded once, and then only cropped."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from hf_mim.modeling.resizing import resize
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.mapped_file import MappedFile, free_bytes


SAMPLE = 32  # images from which the size of the cache is estimated
FLUSH = 256  # images after which a crash loses nothing that was written before


class DecodedCache:
    """Images as uint8, one after another in one file, mapped into memory.

    At full resolution (`short_side` None) its images are those of the files, so that crops made from them are the same
    to the last bit. Images shrunk to a `short_side` take less room and are faster to crop, but the pixels differ from
    uncached ones: a crop is then resampled twice, comes out softer, and where it is smaller than the output it is
    enlarged from less than the file holds. Nothing tells when that costs accuracy but a run of both.

    What is written is `<key>.pixels` and `<key>.table`, a row (offset, channels, height, width) for every image. A row
    is written after its pixels are on disk: what was interrupted is continued, by whichever process comes first. The
    key covers the data set's fingerprint, `num_channels` and `short_side`; the fingerprint of a folder covers the names
    of the files and not what is in them: delete the cache after changing files in place.

    Args:
        folder: where the files lie; made if it is missing.
        fingerprint: of the data set, with its column.
        count: how many images there are.
        read: the index of an image -> its pixels (num_channels, height, width), uint8.
        num_channels: of the images.
        short_side: pixels to which the shorter side is shrunk, where it is longer; None keeps the size.
        report: what is told of the size and the progress.

    Raises:
        ValueError: the disk is too small, or an image cannot be decoded.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        count: int,
        read: Callable[[int], np.ndarray],
        num_channels: int,
        short_side: int | None = None,
        report: Callable[[str], None] = print,
    ):
        key = hashlib.sha256(repr((fingerprint, count, num_channels, short_side)).encode()).hexdigest()[:16]
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self.count, self.short_side = count, short_side
        self.file, self.rows = MappedFile(folder / f"{key}.pixels"), MappedFile(folder / f"{key}.table")
        with FileLock(folder / f"{key}.lock"):  # of several processes one writes, the others wait
            self._complete(read, report)
        self._map()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        """(channels, height, width), uint8, channels innermost in memory. A view of the file: not to be written to."""
        start, channels, height, width = self.table[index].tolist()
        pixels = self.pixels[start : start + channels * height * width]
        return pixels.view(height, width, channels).permute(2, 0, 1)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pixels": None}  # a spawned worker maps the file anew instead of being sent it

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self._map()

    def _map(self):
        self.table = self._rows()
        self.pixels = self.file.read(end_of(self.table), torch.uint8)

    def _rows(self) -> np.ndarray:
        """What is finished: (images, 4), int64."""
        rows = np.fromfile(self.rows.path, dtype=np.int64) if self.rows.size else np.empty(0, np.int64)
        return rows[: len(rows) // 4 * 4].reshape(-1, 4)

    def _complete(self, read: Callable[[int], np.ndarray], report: Callable[[str], None]):
        rows = self._rows()
        if len(rows) == self.count:
            return
        self._estimate(read, report, len(rows))
        end, fresh = end_of(rows), []
        try:
            for index in range(len(rows), self.count):
                image = self._shrunk(read(index))
                self.file.append(image.transpose(1, 2, 0).tobytes(), end)
                fresh.append((end, *image.shape))
                end += image.size
                if len(fresh) == FLUSH or index == self.count - 1:
                    self.file.sync()
                    self.rows.append(np.array(fresh, np.int64).tobytes(), rows.nbytes)
                    self.rows.sync()
                    fresh = []
        finally:
            self.file.close()
            self.rows.close()

    def _estimate(self, read: Callable[[int], np.ndarray], report: Callable[[str], None], done: int):
        chosen = np.linspace(0, self.count - 1, min(SAMPLE, self.count)).astype(int)
        size = np.mean([self._shrunk(read(int(index))).size for index in chosen])
        folder = self.file.path.parent
        needed, free = size * (self.count - done), free_bytes(folder)
        what = f"decoding {self.count - done:,} of {self.count:,} images once: about {needed / 1e9:,.2f} GB"
        report(f"{what} in {folder}, where {free / 1e9:,.1f} GB are free")
        if needed > free:
            raise DataError(f"{what} do not fit into {folder}; set data.cache_size or data.cache_dir")

    def _shrunk(self, image: np.ndarray) -> np.ndarray:
        short = min(image.shape[1:])
        if self.short_side is None or short <= self.short_side:
            return image
        size = tuple(max(1, round(length * self.short_side / short)) for length in image.shape[1:])
        return resize(torch.from_numpy(image), size).numpy()


def end_of(rows: np.ndarray) -> int:
    """The byte behind the pixels of the last of these rows."""
    return int(rows[-1, 0] + rows[-1, 1:].prod()) if len(rows) else 0
