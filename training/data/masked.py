"""Images with masks: where they come from, what is checked, and how both are scaled, cropped and flipped together."""

import io
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.progress import track

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.data import sources
from hf_mim.training.data.decoding import decode, read_file
from hf_mim.training.data.scenes import COUNTS, Scenes
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.transforms import normalize, resize, sample_rng
from hf_mim.training.evaluation.iou import IGNORE


MASK_NAMES = ("mask", "masks", "annotation", "annotations", "segmentation_mask", "segmentation", "label", "labels")
MASK_FOLDERS = ("masks", "annotations", "labels")
PAIR_FOLDERS = ("images", *MASK_FOLDERS)
MOST_CLASSES = 65_535
SCALES = (0.5, 2.0)  # of the image before it is cropped, as in UperNet's and BEiT's recipes
ORIENTATION = 274  # the EXIF tag; 5 and above are turned by a quarter
TRIES = 10  # crops without a labelled pixel are drawn again


class BadMask(ValueError):
    """A mask that cannot be used."""

    def __init__(self, message: str):
        # A loader's worker passes its traceback on as the message; the command prints one line.
        super().__init__(message.strip().splitlines()[-1].partition("BadMask: ")[2] or message)


# ---- masks ---------------------------------------------------------------------------------------------------------
def decode_mask(value, name: str = "without a name") -> np.ndarray:
    """Class ids (height, width), int64, as they are written: of a palette its indices, not its colours.

    Args:
        value: bytes or path of an image or .npy, {"bytes", "path"}, a PIL image, or nested lists.

    Raises:
        BadMask: it cannot be read, or is no map of ids from 0 to 65535.
    """
    if isinstance(value, dict):
        name = Path(value.get("path") or name).name
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise BadMask(f"mask {name} is missing")
    try:
        if isinstance(value, str | Path):
            value = read_file(value)
        if isinstance(value, bytes):
            is_array = value[:6] == b"\x93NUMPY"
            value = np.load(io.BytesIO(value), allow_pickle=False) if is_array else PIL.Image.open(io.BytesIO(value))
        ids = np.array(value)
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise BadMask(f"cannot read mask {name}: {error}".partition("\n")[0]) from None
    if ids.ndim == 3:  # equal channels, or a first axis of one
        ids = ids[..., 0] if (ids == ids[..., :1]).all() else ids[0] if len(ids) == 1 else ids
    if ids.ndim != 2 or ids.dtype.kind not in "uib":
        found = f"{ids.dtype} {'x'.join(map(str, ids.shape))}"
        raise BadMask(f"mask {name} must hold whole numbers, one class id per pixel, and holds {found}")
    ids = ids.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > MOST_CLASSES):
        raise BadMask(f"mask {name} holds ids from {ids.min()} to {ids.max()}; use {IGNORE} for pixels of no class")
    return ids


class Pairs:
    """Images and masks of a `datasets.Dataset`, decoded when they are asked for.

    Raises (when it is indexed):
        BadMask: a mask of another size than its image, or one that cannot be read.
        ValueError: the image cannot be decoded into `num_channels`.
    """

    def __init__(self, dataset, image_column: str, mask_column: str, num_channels: int):
        dataset = dataset.select_columns([image_column, mask_column])
        for column in (image_column, mask_column):
            if isinstance(dataset.features[column], datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.columns, self.num_channels = dataset, (image_column, mask_column), num_channels

    def __len__(self) -> int:
        return len(self.dataset)

    def mask(self, index: int) -> np.ndarray:
        """The class ids (height, width) alone; of the image the size is read, as far as its header says it."""
        image, mask = (self.dataset[index][column] for column in self.columns)
        ids = decode_mask(mask, f"{index}")
        self._check_size(index, image, size_of(image) or ids.shape, ids.shape)
        return ids

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image (channels, height, width), uint8, and class ids (height, width), int64."""
        image, mask = (self.dataset[index][column] for column in self.columns)
        pixels, ids = decode(image, self.num_channels), decode_mask(mask, f"{index}")
        self._check_size(index, image, pixels.shape[1:], ids.shape)
        return pixels, ids

    def _check_size(self, index: int, image, wanted: tuple[int, int], found: tuple[int, int]) -> None:
        if tuple(wanted) != tuple(found):
            path = image.get("path") if isinstance(image, dict) else None
            name = Path(path).name if path else f"image {index}"
            sizes = [f"{height}x{width}" for height, width in (found, wanted)]
            raise BadMask(f"the mask of {name} is {sizes[0]} pixels, the image {sizes[1]}")


def size_of(image) -> tuple[int, int] | None:
    """(height, width) of an undecoded image, upright; None where it is no file that Pillow knows."""
    try:
        content = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        with PIL.Image.open(content) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) >= 5
            return opened.size if turned else opened.size[::-1]
    except (OSError, SyntaxError, TypeError, AttributeError):
        return None


# ---- data sets -----------------------------------------------------------------------------------------------------
def open_pairs(data: DataArguments) -> dict[str, datasets.Dataset]:
    """The splits of the user's data, with a column of images and one of masks; nothing is decoded.

    Raises:
        ValueError, OSError: it is missing, empty, or has no masks.
    """
    if data.streaming:
        raise ValueError("segmentation reads images and masks by their number: data.streaming must be false")
    place = sources.place_of(data.dataset)
    files = sources.list_files(place) if place else []
    if files and not any(file.endswith(tuple(sources.SHARDS)) for file in files):
        return {name: _pair_split(pairs) for name, pairs in find_pairs(place, files).items()}
    return sources.open_dataset(data)


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
    folders = {sources.split_of(name[0]): f"{root}/{name[0]}" for name in sorted(names) if name[1:2] == ["images"]}
    folders.pop(None, None)
    found = {}
    for split, folder in (folders or {None: root}).items():
        below = {name: [file for file in files if file.startswith(f"{folder}/{name}/")] for name in PAIR_FOLDERS}
        masks = next((name for name in MASK_FOLDERS if below[name]), None)
        if not below["images"] or masks is None:
            raise ValueError(f"{folder} has no masks: it must hold images/ and masks/ with files of the same names")
        for inner, pairs in match(f"{folder}/images", below["images"], f"{folder}/{masks}", below[masks]).items():
            found.setdefault(split or inner, []).extend(pairs)
    return found


def match(images: str, files: list[str], masks: str, mask_files: list[str]) -> dict[str, list[tuple[str, str]]]:
    """The files below `images` with those of the same relative names, but for the ending, below `masks`."""
    stems = {file[len(masks) + 1 :].rpartition(".")[0]: file for file in mask_files}
    files = sorted(files, key=lambda file: file.split("/"))
    keys = [file[len(images) + 1 :].rpartition(".")[0] for file in files]
    missing = [Path(file).name for file, key in zip(files, keys) if key not in stems]
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} images have no mask in {masks}; the first: {missing[0]}")
    splits = [sources.split_of(key.partition("/")[0]) if "/" in key else None for key in keys]
    splits = splits if None not in splits else ["train"] * len(keys)
    found = {}
    for split, file, key in zip(splits, files, keys, strict=True):
        found.setdefault(split, []).append((file, stems[key]))
    return found


def _pair_split(pairs: list[tuple[str, str]]) -> datasets.Dataset:
    columns = dict(zip(("image", "mask"), map(list, zip(*pairs, strict=True)), strict=True))
    features = datasets.Features(dict.fromkeys(columns, datasets.Image(decode=False)))
    return datasets.Dataset.from_dict(columns, features=features)


def find_mask_columns(features: dict, data: DataArguments) -> tuple[str, str]:
    """The names of the image column and of the mask column.

    Raises:
        ValueError: a named column does not exist, or none holds images or masks.
    """
    if data.mask_column is not None and data.mask_column not in features:
        raise unknown_choice("data.mask_column", data.mask_column, features)
    named = [name for wanted in MASK_NAMES for name in features if name.lower() == wanted and _is_map(features[name])]
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    others = [name for name in images if name != data.image_column][1 if data.image_column is None else 0 :]
    mask = data.mask_column or next(iter([*named, *others]), None)
    if mask is None:
        raise ValueError(
            f"no column holds masks; the columns are {', '.join(features)}. If one does, name it in data.mask_column"
        )
    return sources.find_columns({name: f for name, f in features.items() if name != mask}, data)[0], mask


def _is_map(feature) -> bool:
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList)
    return isinstance(feature, kinds) or getattr(feature, "dtype", None) in ("binary", "large_binary")


@dataclass
class MaskedSplits:
    """What a command works on.

    Args:
        train, validation, test: by index (image (channels, height, width) uint8, class ids (height, width) int64).
        classes: their names, by id.
        shares: of the labelled training pixels that are of each class.
        note: where `test` comes from, for people.
    """

    train: torch.utils.data.Dataset
    validation: torch.utils.data.Dataset
    test: torch.utils.data.Dataset
    classes: list[str]
    shares: np.ndarray
    note: str


def load_masked_splits(
    data: DataArguments, num_channels: int, classes: int | list[str] | None = None, console: Console | None = None
) -> MaskedSplits:
    """Opens the data, the composed scenes where `data.dataset` is None, and reads every mask once.

    Args:
        classes: how many there are, or their names; None takes the ids in sight.

    Raises:
        ValueError, OSError: missing data, no masks, masks of another size than their image, ids beyond the classes,
            only ignored pixels.
    """
    if data.dataset is None:
        found = {name: Scenes(name, num_channels=num_channels) for name in COUNTS}
        note, classes = "composed from the test images", classes or found["train"].classes
    else:
        rows, note = open_splits(data)
        columns = find_mask_columns(rows["train"].features, data)
        found = {name: Pairs(split, *columns, num_channels) for name, split in rows.items()}
    for name, most in (("train", data.max_train_images), *((n, data.max_eval_images) for n in ("validation", "test"))):
        found[name] = first(found[name], most)
    counts = [count_ids(split, name, console) for name, split in found.items()]
    names = name_classes(classes, max(map(len, counts)))
    counts = np.pad(counts[0], (0, len(names) - len(counts[0])))
    return MaskedSplits(**found, classes=names, shares=counts / counts.sum(), note=note)


def open_splits(data: DataArguments) -> tuple[dict[str, datasets.Dataset], str]:
    """The rows to train on, to choose settings by and to test on, and where the last come from."""
    splits = open_pairs(data)
    first, second = sources.choose_splits(splits, data)
    found, note = {"train": splits[first]}, f"split {second}"
    third = next((name for name in sources.TEST_NAMES if name in splits and name not in (first, second)), None)
    if third is not None:
        found["validation"] = splits[third]
    if second is not None:
        found["test"] = splits[second]
    for name in ("test", "validation"):
        if name not in found:
            if len(found["train"]) < 2:
                raise ValueError(f"{data.dataset} has too few images: one to train on, one to validate and one to test")
            found["train"], found[name] = sources.hold_out(found["train"])
            note = f"held out from {first}" if name == "test" else note
    return {name: found[name] for name in COUNTS}, note


def first(source, count: int | None):
    """The first `count` of a source, at least one; None is all."""
    return source if count is None else torch.utils.data.Subset(source, range(min(max(count, 1), len(source))))


def count_ids(source, name: str, console: Console | None) -> np.ndarray:
    """Pixels of each class id over all masks, (highest id + 1,).

    Raises:
        ValueError: a mask cannot be used, or none has a labelled pixel.
    """
    console, counts = console or Console(quiet=True), np.zeros(1, dtype=np.int64)
    silent = not console.is_terminal
    whole, indices = (source.dataset, source.indices) if hasattr(source, "indices") else (source, range(len(source)))
    for index in track(indices, f"reading the {name} masks", console=console, transient=True, disable=silent):
        ids = whole.mask(index)
        found = np.bincount(ids[ids != IGNORE])
        length = max(len(counts), len(found))
        counts = np.pad(counts, (0, length - len(counts))) + np.pad(found, (0, length - len(found)))
    if not counts.any():
        raise ValueError(f"the {name} masks hold only {IGNORE}, which means that a pixel has no class")
    return counts


def name_classes(classes: int | list[str] | None, found: int) -> list[str]:
    """The names of the classes by id, where the masks hold ids below `found`.

    Raises:
        ValueError: ids beyond the classes, or a single class.
    """
    names = classes if isinstance(classes, list) else [f"class {i}" for i in range(classes or found)]
    if found > len(names):
        raise ValueError(
            f"the masks hold ids up to {found - 1}, but there are {len(names)} classes: 0 to {len(names) - 1}"
        )
    if len(names) < 2:
        raise ValueError(f"the masks hold one class only, id 0 ({IGNORE} means that a pixel has no class)")
    return names


# ---- batches -------------------------------------------------------------------------------------------------------
class MaskedDataset(torch.utils.data.Dataset):
    """What `SegmentationCollator` makes batches of.

    Every image is brought to `size` first, as the saved image processor does it. For training it is then
    scaled by a factor of `SCALES`, cut or padded to that size and flipped, together with its mask, by numbers that
    follow from (seed, epoch, index) alone. For testing the masks keep their own size.

    Args:
        source: by index image and ids, as of `MaskedSplits`.
        size: (height, width) of the images, pixels.
    """

    def __init__(self, source, config: MIMConfig, size: tuple[int, int], train: bool, seed: int = 0, flip: bool = True):
        self.source, self.config, self.size = source, config, size
        self.train, self.seed, self.flip = train, seed, flip
        self.fill = np.rint(255 * np.array(config.image_mean)).clip(0, 255).astype(np.uint8)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # the loader's workers see it too

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        image, ids = self.source[index]
        if not self.train:
            return resize(torch.from_numpy(image), self.size), ids
        rng = sample_rng(self.seed, int(self._epoch), index)
        image, ids = crop_pair(torch.from_numpy(image), ids, self.size, rng, self.fill)
        if self.flip and rng.random() < 0.5:
            image, ids = image.flip(-1), ids[:, ::-1]
        return image, ids


def crop_pair(image: torch.Tensor, ids: np.ndarray, size: tuple[int, int], rng: np.random.Generator, fill: np.ndarray):
    """A random part of an image and of its mask, at a random scale.

    Args:
        image: (channels, height, width), uint8.
        ids: (height, width); `IGNORE` where the result is padded.
        size: (height, width) of the result. At factor 1 it holds the whole image.
        fill: (channels,), uint8.

    Returns:
        image (channels, *size), ids size; bicubic and nearest.
    """
    factor = np.exp(rng.uniform(*np.log(SCALES)))
    sides = np.array(ids.shape)
    kept = np.maximum(1, np.rint(sides / max(factor, 1))).astype(int)  # of the image
    shown = np.maximum(1, np.rint(np.array(size) * min(factor, 1))).astype(int)  # of the result
    for _ in range(TRIES):
        top, left = (rng.integers(side - length + 1) for side, length in zip(sides, kept))
        part = ids[top : top + kept[0], left : left + kept[1]]
        if (part != IGNORE).any():
            break
    nearest = [((np.arange(n) + 0.5) * length / n).astype(int) for n, length in zip(shown, kept)]
    at = [rng.integers(side - length + 1) for side, length in zip(size, shown)]
    place = tuple(slice(start, start + length) for start, length in zip(at, shown))
    pixels = torch.from_numpy(fill)[:, None, None].repeat(1, *size)
    pixels[(slice(None), *place)] = resize(image, tuple(shown.tolist()), (top, left, *kept))
    padded = np.full(size, IGNORE, dtype=np.int64)
    padded[place] = part[np.ix_(*nearest)]
    return pixels, padded


class SegmentationCollator:
    """`pixel_values` (batch, channels, height, width), float32; `labels` (batch, rows, cols), int64, where masks of
    several sizes are padded at the bottom and right with `IGNORE`; `sizes` (batch, 2), how large each mask is."""

    def __init__(self, config: MIMConfig):
        self.config = config

    def __call__(self, items: list) -> dict[str, torch.Tensor]:
        images, masks = zip(*items, strict=True)
        sizes = np.array([ids.shape for ids in masks])
        labels = np.full((len(masks), *sizes.max(axis=0)), IGNORE, dtype=np.int64)
        for padded, ids in zip(labels, masks):
            padded[: ids.shape[0], : ids.shape[1]] = ids
        pixel_values = normalize(torch.stack(images), self.config.image_mean, self.config.image_std)
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(labels), "sizes": torch.from_numpy(sizes)}
