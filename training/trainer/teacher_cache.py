"""What a frozen teacher makes of images that come again, kept on disk."""

import hashlib
import json
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.modeling.teachers import Teacher
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import DataError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.mapped_file import free_bytes
from hf_mim.training.evaluation.feature_statistics import teachers_of
from hf_mim.training.evaluation.feature_store import weights_hash


FORMAT = 1  # raised when what is in the files changes
DIGEST = 16  # bytes
SPARE = 4096  # rows for images that are not trained on: those of statistics, pictures and checks
KEY = "training.cache_teacher"


class TeacherCache:
    """Takes the place of `Teacher.maps`: maps of an image that was seen before come from a file, in float16.

    An image is known by its pixels, so a row never belongs to another crop, and images that change on disk are computed
    anew. The first call gives what the later ones give, rounded to float16: runs with a full and with an empty file are
    equal. `<key>.maps` holds the rows and `<key>.images` their images, written after them: what a crash cuts short is
    computed again. Several processes and runs may use the files at once. The key covers the teacher's weights, how it
    is asked, and the size of image and grid.

    Args:
        teacher: whose `maps` are kept; it is asked through the method of its class.
        folder: where the files lie; made if it is missing.
        image_size, grid: of the student's images, and rows and columns of the maps; other sizes are not kept.
        capacity: rows that the file may have; images beyond are computed each time.
    """

    def __init__(self, teacher: Teacher, folder: Path, image_size: Grid, grid: Grid, capacity: int):
        self.teacher, self.image_size, self.grid, self.capacity = teacher, image_size, grid, capacity
        self.dims = teacher.feature_dims()
        self.width = 2 * sum(self.dims) * grid[0] * grid[1]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"teacher-{self._key()}"
        self.maps, self.images = (self._open(path.with_suffix(suffix)) for suffix in (".maps", ".images"))
        self.lock = FileLock(path.with_suffix(".lock"))
        self.rows: dict[bytes, int] = {}
        with self.lock:
            self._read_images()
            self.images.truncate(len(self.rows) * DIGEST)
            self.maps.truncate(len(self.rows) * self.width)

    def _key(self) -> str:
        teacher, model = self.teacher, self.teacher.model(self.image_size[0] // self.grid[0])
        asked = [teacher.layers, teacher.match, teacher.input_size, teacher.project]
        pixels = [list(teacher.image_mean), list(teacher.image_std), self.image_size, self.grid]
        whole = json.dumps([FORMAT, weights_hash(model), *asked, *pixels])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def _open(self, path: Path) -> FileIO:
        path.touch()
        return FileIO(path, "r+b")

    def _read_images(self) -> None:
        """Learns of the whole rows that are new in the files: one for every image, in the same order."""
        self.images.seek(len(self.rows) * DIGEST)
        digests, count = self.images.read(), self.maps.seek(0, 2) // self.width
        for start in range(0, len(digests) - DIGEST + 1, DIGEST):
            if len(self.rows) < count:
                self.rows[digests[start : start + DIGEST]] = len(self.rows)

    @property
    def missing_bytes(self) -> int:
        return max(0, self.capacity - len(self.rows)) * self.width

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, grid: Grid) -> list[Tensor]:
        """As `Teacher.maps`."""
        if tuple(pixel_values.shape[2:]) != self.image_size or grid != self.grid:
            return Teacher.maps(self.teacher, pixel_values, grid)
        digests = [hashlib.blake2b(image.numpy(), digest_size=DIGEST).digest() for image in pixel_values.cpu()]
        unknown = [place for place, digest in enumerate(digests) if digest not in self.rows]
        rows = torch.empty(len(digests), self.width // 2, dtype=torch.float16)
        if unknown:
            # A copy: the teacher may keep its last batch, known by the tensor that it came in.
            maps = Teacher.maps(self.teacher, pixel_values[unknown].clone(), grid)
            rows[unknown] = torch.cat([stage.flatten(1) for stage in maps], dim=1).half().cpu()
            self._check(rows[unknown])
        for place, digest in enumerate(digests):
            if digest in self.rows:
                self._read(self.rows[digest], rows[place].numpy())
        if unknown and len(self.rows) < self.capacity:
            self._append({digests[place]: rows[place] for place in unknown})
        parts = rows.to(pixel_values.device).float().split([dim * grid[0] * grid[1] for dim in self.dims], dim=1)
        return [part.view(-1, dim, *grid) for part, dim in zip(parts, self.dims)]

    def _check(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            message = f"teacher {self.teacher.source} has features that are not finite in float16: set {KEY}=false"
            raise RecipeError(message, KEY)

    def _read(self, row: int, out: np.ndarray) -> None:
        self.maps.seek(row * self.width)
        self.maps.readinto(out.data)

    def _append(self, rows: dict[bytes, Tensor]) -> None:
        with self.lock:
            self._read_images()
            for digest, row in rows.items():
                if digest in self.rows or len(self.rows) >= self.capacity:
                    continue
                self.maps.seek(len(self.rows) * self.width)
                self.images.seek(len(self.rows) * DIGEST)
                self.maps.write(row.numpy().data)
                self.images.write(digest)
                self.rows[digest] = len(self.rows)


def cache_teachers(
    model: MIMForPreTraining,
    dataset: MIMDataset | Iterable,
    data: DataArguments,
    console: RunConsole,
) -> None:
    """Has the teachers of a target keep their maps, where `training.cache_teacher` says so; prints the size first.

    Raises:
        RecipeError: the images are others at each epoch.
        DataError: the disk is too small.
    """
    teachers = teachers_of(model.target)
    if not teachers:
        console.warn(f"warning: {KEY} has no effect: target {model.config.target} has no frozen teacher")
        return
    reasons = {
        "streamed images are not counted": not isinstance(dataset, MIMDataset),
        "random crops are others at each epoch (data.crop_scale)": data.crop_scale is not None,
        "random colours are others at each epoch (data.color_jitter)": data.color_jitter > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise RecipeError(f"{KEY} cannot be used: {reason}; set {KEY}=false", KEY)
    size, images = pair(model.config.image_size), len(dataset)  # type: ignore[arg-type]
    folder = Path(data.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_mim").expanduser()
    forms, mirrored = (2, ", as they are and mirrored") if data.horizontal_flip else (1, "")
    grid, capacity = model.mim.encoder.target_grid(*size), forms * images + SPARE
    for teacher in teachers:
        cache = TeacherCache(teacher, folder, size, grid, capacity)
        there, free = len(cache.rows), f"{free_bytes(folder) / 1e9:,.1f} GB are free"
        what = f"features of {teacher.source} for {images:,} images{mirrored}: {there:,} are kept already, up to "
        what += f"{cache.missing_bytes / 1e9:,.2f} GB more in {folder}, where {free}"
        if cache.missing_bytes > free_bytes(folder):
            raise DataError(f"{what}: set data.cache_dir, or {KEY}=false")
        console.log(what)
        teacher.maps = cache  # type: ignore[method-assign]
