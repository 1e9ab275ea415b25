"""Images with masks: where they come from, and that they fit together."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import datasets
import numpy as np
import torch

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport, BadImages, name_file, row_name
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.files import SHARDS, Listing, list_place, place_of
from hf_mim.training.data.masks import BadMask, UnreadableMask, decode_mask, size_of
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import Opened, split_of


MASK_FOLDERS = ("masks", "annotations", "labels")
PAIR_FOLDERS = ("images", *MASK_FOLDERS)
T = TypeVar("T")


class MaskedSource(Protocol):
    """Images with masks, by their number: `Pairs`, and `Scenes`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """-> image (channels, height, width), uint8, and class ids (height, width), int64."""
        ...

    def mask(self, index: int) -> np.ndarray:
        """The class ids (height, width) alone."""
        ...

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        ...


class Pairs:
    """Images and masks of a `datasets.Dataset`, decoded when they are asked for. Where the image cannot be used, or the
    mask is missing or broken, the next pair that is good stands in.

    Args:
        mask_values: see `decode_mask`.
        max_bad_images: see `DataArguments`.

    Raises (when it is indexed):
        BadMask: a mask of another size than its image, or one that holds no class ids.
        TooManyBadImages: too many pairs are bad.
    """

    def __init__(
        self,
        dataset,
        image_column: str,
        mask_column: str,
        decode: Decoder,
        mask_values: list | None = None,
        max_bad_images: float = 0.01,
    ):
        dataset = dataset.select_columns([image_column, mask_column])
        for column in (image_column, mask_column):
            if isinstance(dataset.features[column], datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.columns, self.decode = dataset, (image_column, mask_column), decode
        self.mask_values = mask_values
        self.bad = BadImages(len(dataset), max_bad_images, self._error_of)

    def select(self, positions: np.ndarray) -> "Pairs":
        """Some of them."""
        rows = self.dataset.select(positions)
        part = Pairs(rows, *self.columns, self.decode, self.mask_values, self.bad.limit)
        part.bad.flags |= self.bad.flags[torch.from_numpy(positions)]
        part.bad.check()
        return part

    def __len__(self) -> int:
        return len(self.dataset)

    def mask(self, index: int) -> np.ndarray:
        """The class ids (height, width) alone; of the image the size is read, as far as its header says it."""
        return self._read(self._mask, index)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image (channels, height, width), uint8, and class ids (height, width), int64."""
        return self._read(self._pair, index)

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        return self.bad.report()

    def _read(self, read: Callable[[int], T], index: int) -> T:
        """What `read` makes of the pair at `index`, or of the next one that is good."""
        while True:
            (index,) = self.bad.replace([index])
            try:
                return read(index)
            except BadMask as error:
                if not isinstance(error, UnreadableMask):
                    raise
            except ValueError:
                pass
            self.bad.add(index)

    def _files(self, index: int) -> tuple:
        """The files of a pair, undecoded, and the name of its mask."""
        row, name = self.dataset[index], row_name(self.dataset, index)
        image, mask = (row[column] for column in self.columns)
        return name_file(image, name), mask, f"of {name}"

    def _mask(self, index: int) -> np.ndarray:
        image, mask, name = self._files(index)
        ids = decode_mask(mask, name, self.mask_values)
        check_size(image, size_of(image) or ids.shape, ids.shape)
        return ids

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask, name = self._files(index)
        pixels, ids = self.decode(image), decode_mask(mask, name, self.mask_values)
        check_size(image, pixels.shape[1:], ids.shape)
        return pixels, ids

    def _error_of(self, index: int) -> str:
        try:
            self._pair(index)
        except ValueError as error:
            return str(error)
        return f"image {index}"


def check_size(image, size: tuple[int, ...], mask_size: tuple[int, ...]) -> None:
    """Raises:
    BadMask: a mask has another size than its image.
    """
    if tuple(size) != tuple(mask_size):
        sizes = [f"{height}x{width}" for height, width in (mask_size, size)]
        path = image["path"] if isinstance(image, dict) else image
        raise BadMask(f"the mask of {Path(path).name} is {sizes[0]} pixels, the image {sizes[1]}")


def open_pairs(data: DataArguments) -> Opened:
    """The splits of the user's data, with a column of images and one of masks; nothing is decoded.

    Raises:
        ValueError, OSError: it is missing, empty, or has no masks.
    """
    if data.streaming:
        raise DataError("segmentation reads images and masks by their number: data.streaming must be false")
    place = place_of(data.dataset) if data.dataset else None
    listing = list_place(place) if place else Listing()
    if place and listing.files and not any(file.endswith(tuple(SHARDS)) for file in listing.files):
        if listing.tables and _has_masks(opened := open_dataset(data)):
            return opened
        splits = {name: _pair_split(pairs) for name, pairs in find_pairs(place, listing.files).items()}
        opened = Opened(splits, listing.notes())
        opened.digest = listing.digest(place)
        return opened
    return open_dataset(data)


def _has_masks(opened: Opened) -> bool:
    """Whether a table beside the images names a second file of each."""
    return all(sum(isinstance(f, datasets.Image) for f in split.features.values()) > 1 for split in opened.values())


def find_pairs(root: str, files: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Files of images and masks by split: `images/` and `masks/` with files of the same stems, in the folder itself, in
    `train/` and `test/` (or `val/`), or with these inside of both.

    Args:
        root: a folder or URL.
        files: those below it.

    Raises:
        ValueError: there are no such folders or images, or an image has no mask.
    """
    names = [file[len(root) + 1 :].split("/") for file in files]
    folders = {split_of(name[0]): f"{root}/{name[0]}" for name in sorted(names) if name[1:2] == ["images"]}
    folders.pop(None, None)
    splits: dict[str, list[tuple[str, str]]] = {}
    for split, folder in (folders or {None: root}).items():
        below = {name: [file for file in files if file.startswith(f"{folder}/{name}/")] for name in PAIR_FOLDERS}
        masks = next((name for name in MASK_FOLDERS if below[name]), None)
        if not below["images"] or masks is None:
            raise DataError(
                f"{folder} has no masks: it must hold images/ and masks/ with files of the same names", folder
            )
        for inner, pairs in match(f"{folder}/images", below["images"], f"{folder}/{masks}", below[masks]).items():
            splits.setdefault(split or inner, []).extend(pairs)
    return splits


def match(images: str, files: list[str], masks: str, mask_files: list[str]) -> dict[str, list[tuple[str, str]]]:
    """The files below `images` with those of the same relative names, but for the ending, below `masks`."""
    stems = {file[len(masks) + 1 :].rpartition(".")[0]: file for file in mask_files}
    files = sorted(files, key=lambda file: file.split("/"))
    keys = [file[len(images) + 1 :].rpartition(".")[0] for file in files]
    missing = [Path(file).name for file, key in zip(files, keys) if key not in stems]
    if missing:
        raise DataError(f"{len(missing)} of {len(files)} images have no mask in {masks}; the first: {missing[0]}")
    splits = [split_of(key.partition("/")[0]) if "/" in key else None for key in keys]
    pairs: dict[str, list[tuple[str, str]]] = {}
    for split, file, key in zip(splits, files, keys, strict=True):
        pairs.setdefault("train" if split is None or None in splits else split, []).append((file, stems[key]))
    return pairs


def _pair_split(pairs: list[tuple[str, str]]) -> datasets.Dataset:
    columns = {"image": [image for image, _ in pairs], "mask": [mask for _, mask in pairs]}
    features = datasets.Features(dict.fromkeys(columns, datasets.Image(decode=False)))
    return datasets.Dataset.from_dict(columns, features=features)
