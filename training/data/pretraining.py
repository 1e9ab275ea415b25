"""From a data set to batches: `MIMDataset` fetches, crops and flips; `MIMCollator` normalises and masks."""

import copy
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import ViTImageProcessor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.masking import sample_masks
from hf_mim.modeling.options import pair
from hf_mim.training.data import sources, urls
from hf_mim.training.data.decoded_cache import DecodedCache
from hf_mim.training.data.decoding import BadImages, Undecodable
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.streaming import StreamedImages
from hf_mim.training.data.transforms import (
    UNIFORMS,
    ImageBatch,
    crop,
    crop_and_flip,
    crop_batch,
    crop_boxes,
    flip_batch,
    normalize,
    resize,
    sample_rng,
)


BICUBIC = 3  # PIL's number for it
FEWEST = 20  # images that a labelled data set must have for some to be held out


class MIMDataset(torch.utils.data.Dataset):
    """Images of a `datasets.Dataset`, decoded, and cropped and flipped for training.

    A batch is fetched as a whole, through `__getitems__`. Images of one size that fit into memory are decoded once;
    with `data.cache_decoded` the others too, into a file.

    Args:
        dataset: rows with an undecoded image column.
        config: gives size and channels.
        data: gives crops and flips; see `DataArguments`.
        train: with crops and flips, which follow from (seed, epoch, index); else the whole images, resized.
        classes: names of the classes, in the order of their numbers, where labels are text; None takes all in sight.

    Raises:
        ValueError: there is no image, the first has other channels than the config, or too many cannot be decoded.
    """

    def __init__(
        self, dataset, config: MIMConfig, data: DataArguments, train: bool = True, seed: int = 0, classes=None
    ):
        if len(dataset) == 0:
            raise ValueError("the data set has no images")
        image_column, label_column = sources.find_columns(dataset.features, data)
        self.files = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.seed, self.train = image_column, seed, train
        self.size, self.num_channels = pair(config.image_size), config.num_channels
        self.crop_scale = data.crop_scale if train else None
        self.horizontal_flip = data.horizontal_flip and train
        self.crops_on_device = data.crop_on_device and self.crop_scale is not None
        self.labels, self.classes = _labels(dataset, label_column, classes)
        # Shared with the loader's workers, persistent ones included, which see `set_epoch` through it.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad = BadImages(len(dataset), data.max_bad_images, self._error_of)
        self.images = self._decode_all(data.memory_limit_mb * 2**20)
        if self.images is None and self.crops_on_device:
            raise ValueError(
                "data.crop_on_device needs images of one size that fit into data.memory_limit_mb="
                f"{data.memory_limit_mb}: leave it out"
            )
        self.cache = self._open_cache(data) if data.cache_decoded and self.images is None else None

    def without_augmentation(self) -> "MIMDataset":
        """The same images, whole, sharing memory."""
        other = copy.copy(self)
        other.train, other.crop_scale, other.horizontal_flip, other.crops_on_device = False, None, False, False
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
        if self.crops_on_device:
            images = self.images[torch.as_tensor(self.bad.replace(indices))]
            return [ImageBatch(images, rngs, self._crops(images, uniforms))]
        if self.images is not None:
            images = self._crop_equal(self.images[torch.as_tensor(self.bad.replace(indices))], uniforms)
        else:
            images = self._crop_each(self._fetch(indices), uniforms)
        if self.horizontal_flip:
            images = flip_batch(images, uniforms[:, -1] < 0.5)
        return [ImageBatch(images, rngs)]

    def _fetch(self, indices: list[int]) -> list[torch.Tensor]:
        """Decoded images (channels, height, width), uint8, of any size; the next good one for one that is bad."""
        indices = self.bad.replace(indices)
        if self.cache is not None:
            return [self.cache[index] for index in indices]
        files = urls.read_all(self.files[indices][self.image_column])
        return [self._decode(index, file) for index, file in zip(indices, files, strict=True)]

    def _decode(self, index: int, file) -> torch.Tensor:
        while True:
            try:
                return torch.from_numpy(sources.decode(file, self.num_channels))
            except ValueError:
                self.bad.add(index)
                (index,) = self.bad.replace([index])
                file = self.files[index][self.image_column]

    def _error_of(self, index: int) -> str:
        try:
            sources.decode(self.files[index][self.image_column], self.num_channels)
        except ValueError as error:
            return str(error)
        return f"image {index}"

    def true_labels(self, indices: list[int]) -> torch.Tensor:
        """The labels (count,) of what is fetched for `indices`: of the next good image where one is bad."""
        return self.labels[torch.as_tensor(self.bad.replace(indices))]

    def _crop_each(self, images: list[torch.Tensor], uniforms: np.ndarray) -> torch.Tensor:
        if self.crop_scale is None:
            return torch.stack([resize(image, self.size) for image in images])
        boxes = crop_boxes(uniforms, np.array([image.shape[-2:] for image in images]), self.size, self.crop_scale)
        batch = torch.empty((len(images), self.num_channels, *self.size), dtype=torch.uint8)
        for cropped, image, box in zip(batch, images, boxes):
            cropped.copy_(crop(image, box, self.size))
        return batch

    def _crops(self, images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        sizes = np.tile(images.shape[-2:], (len(images), 1))
        flips = (uniforms[:, -1:] < 0.5) & self.horizontal_flip
        return torch.from_numpy(np.hstack([crop_boxes(uniforms, sizes, self.size, self.crop_scale), flips]))

    def _crop_equal(self, images: torch.Tensor, uniforms: np.ndarray) -> torch.Tensor:
        if self.crop_scale is None:
            return resize(images, self.size)
        sizes = np.tile(images.shape[-2:], (len(images), 1))
        return crop_batch(images, crop_boxes(uniforms, sizes, self.size, self.crop_scale), self.size)

    def _open_cache(self, data: DataArguments) -> DecodedCache:
        def read(index: int) -> np.ndarray:
            try:
                return sources.decode(self.files[index][self.image_column], self.num_channels)
            except ValueError:
                self.bad.add(index)
                return np.zeros((self.num_channels, 0, 0), dtype=np.uint8)  # what the cache has of a bad one

        folder = data.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_mim"
        fingerprint = f"{self.files._fingerprint} {self.image_column}"
        cache = DecodedCache(folder, fingerprint, len(self.files), read, self.num_channels, data.cache_size)
        self.bad.flags |= torch.from_numpy(cache.table[:, 1:].prod(axis=1) == 0)
        self.bad.check()
        return cache

    def _decode_all(self, limit: int) -> torch.Tensor | None:
        """All images (count, channels, height, width), uint8; None where sizes differ or memory would not do."""
        first = self._first()
        if first.numel() * len(self.files) > limit:
            return None
        images, at = torch.empty((len(self.files), *first.shape), dtype=torch.uint8), 0
        for rows in self.files.iter(batch_size=1000):
            for file in urls.read_all(rows[self.image_column]):
                try:
                    image = sources.decode(file, self.num_channels)
                    if image.shape != first.shape:
                        return None
                    images[at] = torch.from_numpy(image)
                except ValueError:
                    self.bad.add(at)
                at += 1
        return images

    def _first(self) -> torch.Tensor:
        """The first image that can be decoded. One with other channels is a mistake in the config, and no bad file."""
        for index in range(len(self.files)):
            try:
                return torch.from_numpy(sources.decode(self.files[index][self.image_column], self.num_channels))
            except Undecodable:
                self.bad.add(index)
        raise AssertionError("BadImages raises where all are bad")


def _labels(dataset, column: str | None, classes: list[str] | None) -> tuple[torch.Tensor | None, list[str]]:
    """Labels (count,) as class numbers, and the classes' names; an image of no class has -1."""
    if column is None:
        return None, []
    values, feature = dataset[column][:], dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return torch.tensor([-1 if value is None else value for value in values]), list(feature.names)
    names = classes or sorted({str(value) for value in values if value is not None})
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number.get(str(value), -1) for value in values]), names


class MIMCollator:
    """Makes model inputs: `pixel_values` and, for training, `bool_masked_pos`.

    Args:
        config: gives mean, std and the mask generator with its options.
        grid: rows and columns of the tokens that can be hidden, `model.mask_grid(*image_size)`; None makes no masks.
        normalized: False leaves what a data set gives as uint8, a quarter of the memory; `MIMTrainer` then normalises
            on the device.
    """

    def __init__(self, config: MIMConfig, grid: tuple[int, int] | None = None, normalized: bool = True):
        self.config, self.grid, self.normalized = config, grid, normalized

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        """
        Args:
            features: `ImageBatch`es, or one dict per image with finished `pixel_values`, whose masks are then drawn
                from torch's generator.

        Returns:
            `pixel_values` (batch, channels, height, width), float32 or uint8, and `bool_masked_pos` (batch, tokens);
            `crops` (batch, 5) for uint8 images that are to be cropped on the device.
        """
        if isinstance(features[0], ImageBatch):
            images = torch.cat([feature.images for feature in features]) if len(features) > 1 else features[0].images
            rngs = [rng for feature in features for rng in feature.rngs]
            batch = {"pixel_values": images}
            if features[0].crops is not None:
                batch["crops"] = torch.cat([feature.crops for feature in features])
            if self.normalized:
                batch = finish(batch, self.config)
        else:
            batch = {"pixel_values": torch.stack([torch.as_tensor(feature["pixel_values"]) for feature in features])}
            rngs = [np.random.default_rng(int(seed)) for seed in torch.randint(2**62, (len(features),))]
        if self.grid is not None:
            batch["bool_masked_pos"] = sample_masks(self.config, self.grid, rngs)
        return batch


def finish(batch: dict[str, torch.Tensor], config: MIMConfig, out: torch.Tensor | None = None) -> dict:
    """Crops uint8 `pixel_values` where that is still to be done, and normalises them to `out`, all on their device."""
    images = batch["pixel_values"]
    if "crops" in batch:
        images = crop_and_flip(images, batch["crops"], pair(config.image_size))
        batch = {name: value for name, value in batch.items() if name != "crops"}
    return {**batch, "pixel_values": normalize(images, config.image_mean, config.image_std, out)}


def processor_for(config: MIMConfig) -> ViTImageProcessor:
    """The stock image processor that gives a model's `pixel_values`: resize (bicubic), divide by 255, normalise."""
    height, width = pair(config.image_size)
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=BICUBIC,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_convert_rgb=True if config.num_channels == 3 else None,
    )


@dataclass
class Splits:
    """What a command works on.

    Args:
        train: to pretrain on, with crops and flips.
        train_eval, test: the same images, and others, without; None without labels.
        note: where `test` comes from, or why there is none, for people.
    """

    train: torch.utils.data.Dataset
    train_eval: MIMDataset | None
    test: MIMDataset | None
    note: str


def load_splits(data: DataArguments, config: MIMConfig, seed: int = 0) -> Splits:
    """Opens the data set of a recipe.

    Raises:
        ValueError, OSError: it is missing, empty, without images, or its channels are not those of the config.
    """
    splits = sources.open_dataset(data)
    train_name, test_name = sources.choose_splits(splits, data)
    train = splits[train_name]
    if data.streaming and isinstance(train, datasets.IterableDataset):
        return Splits(StreamedImages(train, config, data, seed), None, None, "streamed: not evaluated")
    _, label_column = sources.find_columns(train.features, data)
    if label_column is None or (test_name is None and len(train) < FEWEST):
        training = MIMDataset(_first(train, data.max_train_images), config, data, True, seed)
        return Splits(training, None, None, "no labels" if label_column is None else "too few images to hold any out")
    note = f"split {test_name}"
    if test_name is None:
        (train, test), note = sources.hold_out(train), f"held out from {train_name}"
    else:
        test = splits[test_name]
    training = MIMDataset(_first(train, data.max_train_images), config, data, True, seed)
    testing = MIMDataset(test, config, data, False, seed, training.classes)
    if data.max_eval_images == 0:
        return Splits(training, None, None, "data.max_eval_images is 0")
    if testing.labels is None or (testing.labels < 0).any() or (training.labels < 0).any():
        return Splits(training, None, None, "not every image has a label")
    return Splits(training, training.without_augmentation(), testing, note)


def _first(dataset, count: int | None):
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))
