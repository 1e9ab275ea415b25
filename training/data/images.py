"""`MIMDataset`: the images of a data set, decoded, cropped and flipped."""

import copy
from pathlib import Path

import datasets
import numpy as np
import torch

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.modeling.resizing import fit_whole
from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport, BadImages, name_file, row_name
from hf_mim.training.data.base import ImageDataset
from hf_mim.training.data.batches import ImageBatch
from hf_mim.training.data.color import check_jitter, jitter_colors
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoded_cache import DecodedCache
from hf_mim.training.data.decoding import Decoder, Undecodable
from hf_mim.training.data.labels import Labels, read_labels
from hf_mim.training.data.transforms import UNIFORMS, crop, crop_batch, crop_boxes, flip_batch, sample_rng


class MIMDataset(ImageDataset):
    """Images of a `datasets.Dataset`, decoded, and cropped and flipped for training.

    A batch is fetched as a whole, through `__getitems__`. Images of one size that fit into memory are decoded once;
    with `data.cache_decoded` the others too, into a file.

    Args:
        dataset: rows with an undecoded image column.
        config: gives size and channels.
        data: gives crops and flips; see `DataArguments`.
        train: with crops and flips, which follow from (seed, epoch, index); else the whole images: see `fit_whole`.
        classes: names of the classes, in the order of their numbers, where labels are text; None takes all in sight.

    Raises:
        DataError: there is no image, the first has other channels than the config, or too many cannot be decoded.
    """

    def __init__(
        self, dataset, config: MIMConfig, data: DataArguments, train: bool = True, seed: int = 0, classes=None
    ):
        if len(dataset) == 0:
            raise DataError("the data set has no images")
        image_column, label_column = find_columns(dataset.features, data)
        self.files = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.seed, self.train = image_column, seed, train
        self.size, self.num_channels = pair(config.image_size), config.num_channels
        self.decode = Decoder(config, data)
        self.eval_crop = config.eval_crop if data.eval_crop is None else data.eval_crop
        self.crop_scale = data.crop_scale if train else None
        self.interpolation = data.interpolation
        self.horizontal_flip = data.horizontal_flip and train
        self.color_jitter = data.color_jitter if train else 0.0
        check_jitter(data.color_jitter, self.num_channels)
        self.crops_on_device = data.crop_on_device and self.crop_scale is not None
        self.label_info = _labels_or_none(dataset, label_column, classes)
        self.labels = None if self.label_info is None else self.label_info.numbers
        self.classes = self.label_info.classes if self.label_info else []
        # Shared with the loader's workers, persistent ones included, which see `set_epoch` through it.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._missing = torch.zeros(len(dataset)).share_memory_()
        self._sizes = torch.zeros((2, 2), dtype=torch.int64).share_memory_()  # see `sizes_seen`
        labelled = None if self.labels is None else self.labels >= 0
        self.bad = BadImages(len(dataset), data.max_bad_images, self._error_of, labelled)
        self.images = self._decode_all(data.memory_limit_mb * 2**20)
        if self.images is None and self.crops_on_device:
            raise DataError(
                "data.crop_on_device needs images of one size that fit into data.memory_limit_mb="
                f"{data.memory_limit_mb}: leave it out"
            )
        self.cache = self._open_cache(data) if data.cache_decoded and self.images is None else None

    def without_augmentation(self) -> "MIMDataset":
        """The same images, whole, sharing memory."""
        other = copy.copy(self)
        other.train, other.crop_scale, other.horizontal_flip, other.crops_on_device = False, None, False, False
        other.color_jitter = 0.0
        other._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # training must not learn of this one's
        return other

    def set_epoch(self, epoch: int) -> None:
        """Says which crops, flips and masks come next."""
        self._epoch.fill_(int(epoch))

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ImageBatch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[ImageBatch]:
        """The images at `indices` as one `ImageBatch`, in a list because a loader hands lists to the collator."""
        rngs = [sample_rng(self.seed, self.epoch, index) for index in indices]
        uniforms = np.stack([rng.random(UNIFORMS) for rng in rngs])
        if self.images is None:
            images = self._crop_each(self._fetch(indices), uniforms)
        else:
            whole = self.images[torch.as_tensor(self.bad.replace(indices))]
            if self.crops_on_device:
                return [ImageBatch(whole, rngs, self._crops(whole, uniforms))]
            images = self._crop_equal(whole, uniforms)
        if self.horizontal_flip:
            images = flip_batch(images, uniforms[:, -1] < 0.5)
        if self.color_jitter:
            images = jitter_colors(images, rngs, self.color_jitter)
        return [ImageBatch(images, rngs)]

    def _fetch(self, indices: list[int]) -> list[torch.Tensor]:
        """Decoded images (channels, height, width), uint8, of any size; the next good one for one that is bad."""
        indices = self.bad.replace(indices)
        if self.cache is not None:
            return [self.cache[index] for index in indices]
        files = urls.read_files(self.files[indices][self.image_column])
        return [self._decode(index, file) for index, file in zip(indices, files, strict=True)]

    def _decode(self, index: int, file) -> torch.Tensor:
        while True:
            try:
                return torch.from_numpy(self._pixels(index, file))
            except ValueError:
                self.bad.add(index)
                (index,) = self.bad.replace([index])
                file = self.files[index][self.image_column]

    def _pixels(self, index: int, file) -> np.ndarray:
        pixels = self.decode(file)
        self._sizes[int(pixels.shape[1:] == self.size)] = torch.tensor(pixels.shape[1:])
        if self.decode.missing:
            self._missing[index] = self.decode.missing
        return pixels

    def missing_values(self) -> dict:
        """{"images", "share"}: how many of the images decoded so far had values that are `data.nodata`, and the share
        of their values."""
        found = self._missing[self._missing > 0]
        return {"images": len(found), "share": round(float(found.mean()), 6) if len(found) else 0.0}

    def sizes_seen(self) -> set[tuple[int, int]]:
        """The model's size, if an image decoded so far has it, and another one that some image has."""
        return {(height, width) for height, width in self._sizes.tolist() if height}

    def _error_of(self, index: int) -> str:
        try:
            name = row_name(self.files, index)
            self.decode(name_file(self.files[index][self.image_column], name))
        except ValueError as error:
            return str(error)
        return f"image {index}"

    def true_labels(self, indices: list[int]) -> torch.Tensor:
        """The labels (count,) of what is fetched for `indices`: of the next good image where one is bad."""
        if self.labels is None:
            raise DataError("the data set has no labels")
        return self.labels[torch.as_tensor(self.bad.replace(indices))]

    def bad_images(self) -> BadImageReport:
        return self.bad.report()

    def _crop_each(self, images: list[torch.Tensor], uniforms: np.ndarray) -> torch.Tensor:
        if self.crop_scale is None:
            return torch.stack([fit_whole(image, self.size, self.eval_crop) for image in images])
        boxes = crop_boxes(uniforms, np.array([image.shape[-2:] for image in images]), self.size, self.crop_scale)
        batch = torch.empty((len(images), self.num_channels, *self.size), dtype=torch.uint8)
        for cropped, image, box in zip(batch, images, boxes):
            cropped.copy_(crop(image, box, self.size, self.interpolation))
        return batch

    def _crops(self, images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        sizes = np.tile(images.shape[-2:], (len(images), 1))
        flips = (uniforms[:, -1:] < 0.5) & self.horizontal_flip
        return torch.from_numpy(np.hstack([crop_boxes(uniforms, sizes, self.size, self.crop_scale or [1, 1]), flips]))

    def _crop_equal(self, images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        if self.crop_scale is None:
            return fit_whole(images, self.size, self.eval_crop)
        sizes = np.tile(images.shape[-2:], (len(images), 1))
        boxes = crop_boxes(uniforms, sizes, self.size, self.crop_scale)
        return crop_batch(images, boxes, self.size, self.interpolation)

    def _open_cache(self, data: DataArguments) -> DecodedCache:
        def read_image(index: int) -> np.ndarray:
            try:
                return self._pixels(index, self.files[index][self.image_column])
            except ValueError:
                self.bad.add(index)
                return np.zeros((self.num_channels, 0, 0), dtype=np.uint8)  # what the cache has of a bad one

        folder = data.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_mim"
        fingerprint = f"{self.files._fingerprint} {self.image_column} {self.decode.rules}"
        cache = DecodedCache(folder, fingerprint, len(self.files), read_image, self.num_channels, data.cache_size)
        self.bad.flags |= torch.from_numpy(cache.table[:, 1:].prod(axis=1) == 0)
        self.bad.check()
        return cache

    def _decode_all(self, limit: int) -> torch.Tensor | None:
        """All images (count, channels, height, width), uint8; None where sizes differ or memory would not do."""
        first = self._first()
        if first.numel() * len(self.files) > limit:
            return None
        images, index = torch.empty((len(self.files), *first.shape), dtype=torch.uint8), 0
        for rows in self.files.iter(batch_size=1000):
            for file in urls.read_files(rows[self.image_column]):
                try:
                    image = self._pixels(index, file)
                    if image.shape != first.shape:
                        return None
                    images[index] = torch.from_numpy(image)
                except ValueError:
                    self.bad.add(index)
                index += 1
        return images

    def _first(self) -> torch.Tensor:
        """The first image that can be decoded. One with other channels is a mistake in the config, and no bad file."""
        for index in range(len(self.files)):
            try:
                return torch.from_numpy(self._pixels(index, self.files[index][self.image_column]))
            except Undecodable:
                self.bad.add(index)
        raise AssertionError("BadImages raises where all are bad")


def _labels_or_none(dataset, column: str | None, classes: list[str] | None) -> Labels | None:
    """Pretraining goes on with a column that turns out to hold measured values; who needs labels reads them before."""
    try:
        return None if column is None else read_labels(dataset, column, classes)
    except DataError:
        return None
