"""What a frozen teacher makes of images that come again, kept on disk."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sized
from io import FileIO
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.modeling.options import pair
from hf_mim.modeling.teachers import Teacher, TeacherModel, teachers_of
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import DataError, FolderError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.mapped_file import free_bytes
from hf_mim.training.data.pretraining import Splits
from hf_mim.training.evaluation.feature_store import weights_hash
from hf_mim.training.trainer.arguments import MIMTrainingArguments


FORMAT = 1  # raised when what is in the files changes
DIGEST = 16  # bytes
SPARE = 4096  # rows for images that are not trained on: those of statistics, pictures and checks
KEY, VERSION = "training.cache_teacher", "transformers_version"
WEIGHTS: WeakKeyDictionary[TeacherModel, str] = WeakKeyDictionary()  # the hash of a loaded teacher's weights


class TeacherCache:
    """Takes the place of `Teacher.maps`: maps of an image that was seen before come from a file, in float16.

    An image is known by its pixels, so a row never belongs to another crop, and images that change on disk are computed
    anew. The first call gives what the later ones give, rounded to float16: runs with a full and with an empty file are
    equal. `<key>.maps` holds the rows and `<key>.images` their images, written after them: what a crash cuts short is
    computed again. Several processes and runs may use the files at once. The key covers the data, the teacher's weights
    and config, how it is asked, the precision, and the size of image and grid.

    Args:
        teacher: whose `maps` are kept; it is asked through the method of its class.
        folder: where the files lie; made if it is missing.
        image_size, grid: of the student's images, and rows and columns of the maps; other sizes are not kept.
        capacity: rows that the file may have; images beyond are computed each time.
        data: what says whose images they are.
        device: where the images will be.
        bf16: whether the teacher computes under bfloat16 autocast, whatever the caller does.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: Path,
        image_size: Grid,
        grid: Grid,
        capacity: int,
        data: str = "",
        device: str = "cpu",
        bf16: bool = False,
    ):
        self.teacher, self.image_size, self.grid, self.capacity = teacher, image_size, grid, capacity
        self.device, self.bf16 = device, bf16
        self.dims = teacher.feature_dims()
        self.width = 2 * sum(self.dims) * grid[0] * grid[1]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"teacher-{self._key(data)}"
        self.maps, self.images = (self._open(path.with_suffix(suffix)) for suffix in (".maps", ".images"))
        self.lock = FileLock(path.with_suffix(".lock"))
        self.rows: dict[bytes, int] = {}
        with self.lock:
            self._read_images()
            self.images.truncate(len(self.rows) * DIGEST)
            self.maps.truncate(len(self.rows) * self.width)

    def _key(self, data: str) -> str:
        teacher, model = self.teacher, self.teacher.model(self.image_size[0] // self.grid[0])
        if model not in WEIGHTS:  # once: a GPU gets them in bfloat16 later
            WEIGHTS[model] = weights_hash(model)
        config = {name: value for name, value in model.description.items() if name not in ("_name_or_path", VERSION)}
        asked = [teacher.layers, teacher.match, teacher.input_size, teacher.project, self.device, self.bf16]
        pixels = [*teacher.image_mean, *teacher.image_std, *model.config.statistics(), self.image_size, self.grid]
        whole = json.dumps([FORMAT, data, WEIGHTS[model], config, *asked, *pixels], default=str, sort_keys=True)
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
            with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.bf16):
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
        if self.maps.readinto(out.data) != self.width:
            raise FolderError(
                f"{self.maps.name} was cut short while it was used: run the command again", str(self.maps.name)
            )

    def _append(self, rows: dict[bytes, Tensor]) -> None:
        with self.lock:
            self._read_images()
            for digest, row in rows.items():
                if digest in self.rows or len(self.rows) >= self.capacity:
                    continue
                self.maps.seek(len(self.rows) * self.width)
                self.images.seek(len(self.rows) * DIGEST)
                # Of a disk that is nearly full, a part may be written without an error.
                if self.maps.write(row.numpy().data) != self.width or self.images.write(digest) != DIGEST:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.maps.name))
                self.rows[digest] = len(self.rows)


def check_cache(model: MIMForPreTraining, dataset: MIMDataset | Iterable, data: DataArguments) -> None:
    """Raises:
    RecipeError: features of teachers cannot be kept, because the images are others at each epoch.
    """
    reasons = {
        "streamed images are not counted": not isinstance(dataset, MIMDataset),
        "random crops are others at each epoch (data.crop_scale)": data.crop_scale is not None,
        "random colours are others at each epoch (data.color_jitter)": data.color_jitter > 0,
    }
    for reason, holds in reasons.items():
        if holds and teachers_of(model.target):
            raise RecipeError(f"{KEY} cannot be used: {reason}; set {KEY}=false", KEY)


def cache_teachers(
    model: MIMForPreTraining,
    splits: Splits,
    data: DataArguments,
    arguments: MIMTrainingArguments,
    console: RunConsole,
) -> None:
    """Has the teachers of a target keep their maps of images that `check_cache` has let pass; prints the size first.

    Raises:
        DataError: the disk is too small.
    """
    if not teachers_of(model.target):
        console.warn(f"warning: {KEY} has no effect: target {model.config.target} has no frozen teacher")
        return
    size, images = pair(model.config.image_size), len(cast(Sized, splits.train))
    folder = Path(data.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_mim").expanduser()
    forms, mirrored = (2, ", as they are and mirrored") if data.horizontal_flip else (1, "")
    grid, capacity = model.mim.encoder.target_grid(*size), forms * images + SPARE
    settings: dict[str, Any] = {"data": splits.digest, "device": arguments.device.type, "bf16": bool(arguments.bf16)}
    missing, free = 0, free_bytes(folder)
    for teacher in teachers_of(model.target):
        cache = TeacherCache(teacher, folder, size, grid, capacity, **settings)
        missing += cache.missing_bytes
        what = f"features of {teacher.source} for {images:,} images{mirrored}: {len(cache.rows):,} are kept already, "
        what += f"up to {cache.missing_bytes / 1e9:,.2f} GB more in {folder}, where {free / 1e9:,.1f} GB are free"
        if missing > free:
            raise DataError(f"{what}: set data.cache_dir, or {KEY}=false")
        console.log(what)
        teacher.maps = cache  # type: ignore[method-assign]
