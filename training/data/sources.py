"""Where images come from: the shipped data set, the Hub, folders, parquet files and WebDataset shards, here or at the
URLs of fsspec."""

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

import hf_mim
from hf_mim.modeling.options import unknown_choice
from hf_mim.training.data import urls
from hf_mim.training.data.decoding import decode  # noqa: F401


SHIPPED = Path(hf_mim.__file__).parent / "data" / "fashion_mnist"
EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARRAYS = {".npy"}  # beside them, with any number of channels
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
# Names of a split, most wanted first. A folder or a file that begins with one of them is that split.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category")
IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "tif", "tiff", "pixel_values")
HELD_OUT = 0.1  # share of a labelled data set without a test split that is held out, and at most
HELD_OUT_MOST = 5000
FOLDER_SHARDS = 256  # of a folder that is streamed: opening one takes as long as decoding an image


@dataclass
class DataArguments:
    """The section `data` of a recipe.

    Args:
        dataset: a Hub id, or a folder or file of images, parquet or WebDataset shards, or the URL of one, as fsspec
            knows them (s3://, hf://, https://); None is the Fashion-MNIST subset that ships with the package.
        subset: the configuration of a Hub data set that has several.
        split: what to train on; None is `train`, else the only split there is.
        eval_split: what to test on; None is `test` or `validation`, else a tenth held out from a labelled `split`.
        image_column, label_column, mask_column: None finds them; masks are for segmentation.
        streaming: read the data set as it comes instead of downloading or indexing it first; needs
            `training.max_steps`. Its shards (files; slices of a folder) are dealt to the loader's workers in all
            processes: give it several times as many as workers, of like size. The number of workers and processes
            at the beginning is part of what the order of the images follows from. See `StreamedImages`.
        shuffle_buffer: how many undecoded images of a stream are held to draw the next one from; its shards are read in
            a random order. 1 shuffles the shards only, 0 keeps the stream's own order.
        max_train_images: train only on the first so many; of a stream, each worker then reads all of them.
        max_eval_images: use at most so many images of either split for the scores; 0 leaves the scores out.
        crop_scale: area of the random crops as shares of the image, in (0, 1]; None resizes the whole image instead.
        horizontal_flip: mirror half of the training images.
        crop_on_device: crop and flip on the device instead of in the loader; for images of one size that are held in
            memory. Slower on a processor, and not measured on a GPU.
        max_bad_images: how many files may be skipped because they cannot be decoded: a share below 1 (of which at
            least one image), or a number. The same holds for damaged shards of a stream.
        memory_limit_mb: images of one size that fit into this much memory are decoded once, and kept.
        cache_decoded: decode every image once, into a file that is much larger than the images; see `DecodedCache`.
        cache_dir: where that file lies; None is `hf_mim` in the cache folder of `datasets`.
        cache_size: pixels to which the shorter side is shrunk for it; null keeps the size, and the crops exact.
    """

    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    mask_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    max_train_images: int | None = None
    max_eval_images: int | None = None
    crop_scale: list[float] | None = None
    horizontal_flip: bool = True
    crop_on_device: bool = False
    max_bad_images: float = 0.01
    memory_limit_mb: int = 1024
    cache_decoded: bool = False
    cache_dir: str | None = None
    cache_size: int | None = None

    def __post_init__(self):
        urls.check_url("data.dataset", self.dataset)
        urls.check_local("data.cache_dir", self.cache_dir)
        if self.streaming and self.crop_on_device:
            raise ValueError("data.crop_on_device needs images that are held in memory: leave out data.streaming")
        scale = self.crop_scale
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"data.crop_scale must be two shares like [0.2, 1.0], or null, not {scale}")
        least_values = {"max_train_images": 1, "max_eval_images": 0, "max_bad_images": 0, "cache_size": 1}
        for name, least in {**least_values, "shuffle_buffer": 0}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, not {getattr(self, name)}")


# ---- data sets -----------------------------------------------------------------------------------------------------
def open_dataset(data: DataArguments) -> dict[str, datasets.Dataset]:
    """The splits of a data set, by name; images are not decoded.

    Raises:
        ValueError, OSError: it is missing, empty, or of no form that is known.
    """
    if data.dataset is None:
        return open_files(sorted(list_files(str(SHIPPED))), data.streaming)
    place = place_of(data.dataset)
    if place is None:
        return open_hub(data)
    files = list_files(place)
    shards = next((found for ending in SHARDS if (found := [file for file in files if file.endswith(ending)])), None)
    if shards:
        return open_files(sorted(shards, key=lambda file: file.split("/")), data.streaming)
    splits = open_folder(place, sorted(files))
    if not data.streaming:
        return splits
    return {name: split.to_iterable_dataset(min(len(split), FOLDER_SHARDS)) for name, split in splits.items()}


def place_of(dataset: str) -> str | None:
    """The local path or the URL of a data set; None for what may be an id on the Hub.

    Raises:
        ValueError: it is written as a path, and there is nothing there.
    """
    if urls.is_url(dataset):
        protocol, _, path = dataset.partition("://")
        if protocol not in urls.LOCAL:
            return dataset.rstrip("/")
    else:
        path = dataset
    path = Path(path).expanduser()
    if path.exists():
        return path.as_posix()
    if path.suffix in SHARDS or dataset.startswith((".", "~", "/")) or dataset.count("/") > 1:
        raise ValueError(f"there is no file or folder {dataset}")
    return None


def list_files(place: str) -> list[str]:
    """The images, arrays and shards of a file, folder or URL, hidden ones left out.

    Raises:
        ValueError, OSError: there is nothing, a file of another kind, or it cannot be listed.
    """
    if urls.is_url(place):
        alone = Path(place).suffix in SHARDS and urls.is_file(place)  # an https server would send all of it as a list
        files = [place] if alone else [urls.join(place, name) for name in urls.list_below(place)]
        if not files and not urls.is_file(place):
            raise ValueError(f"there is nothing at {place}")
        files = files or [place]
    elif Path(place).is_file():
        files = [place]
    else:
        walked = os.walk(place, followlinks=True)
        files = [f"{folder}/{file}" for folder, _, names in walked for file in names]
    if files == [place] and Path(place).suffix not in SHARDS:
        raise ValueError(f"{place} is a file, but not a parquet file or .tar; give a folder for images")
    return [file for file in files if _is_known(file)]


def _is_known(file: str) -> bool:
    ending = os.path.splitext(file)[1]
    known = ending in SHARDS or ending.lower() in EXTENSIONS or ending.lower() in ARRAYS
    return known and not file.rpartition("/")[2].startswith(".")


def open_hub(data: DataArguments) -> dict[str, datasets.Dataset]:
    """A data set on the Hub, with every split."""
    try:
        return dict(datasets.load_dataset(data.dataset, data.subset, streaming=data.streaming))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{data.dataset!r} is no local file or folder, and not to be had from the Hub: {reason}"
        ) from None


def open_files(files: list[str], streaming: bool = False) -> dict[str, datasets.Dataset]:
    """Parquet files, or WebDataset shards, here or at URLs; a file or its folder whose name begins with a split's name
    belongs to that split. Shards that are not streamed are copied into the cache of `datasets`.

    Raises:
        ValueError: one cannot be read.
    """
    kind, splits, remote = SHARDS[Path(files[0]).suffix], {}, urls.is_url(files[0])
    # Of a stream from elsewhere the first must do: each takes several round trips. What is copied is read then.
    for file in files[: int(streaming)] if remote else files:
        check_file(file, kind)
    for file in files:
        named = [name for name in (split_of(Path(file).stem), split_of(Path(file).parent.name)) if name]
        splits.setdefault(named[0] if named else "train", []).append(file)
    bars = not datasets.are_progress_bars_disabled()
    if not remote:
        datasets.disable_progress_bars()  # nothing is downloaded
    try:
        if kind == "parquet" and not streaming and not remote:
            return {name: datasets.Dataset.from_parquet(paths) for name, paths in splits.items()}
        return dict(datasets.load_dataset(kind, data_files=splits, streaming=streaming))
    except (datasets.exceptions.DatasetGenerationError, tarfile.TarError) as error:
        where = files[0].rpartition("/")[0]
        raise ValueError(f"cannot read {where} as {kind}: {error.__cause__ or error}") from None
    except Exception as error:
        if not remote:
            raise
        raise urls.failed(files[0].rpartition("/")[0], error) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def check_file(file: str, kind: str) -> None:
    try:
        with urls.open_file(file) as opened:
            if kind == "parquet":
                pyarrow.parquet.read_schema(opened)
            else:
                tarfile.open(fileobj=opened).close()
    except urls.Unreachable:
        raise
    except (OSError, tarfile.TarError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {file} as {kind}: {error}".partition("\n")[0]) from None


def split_of(name: str) -> str | None:
    first = re.match("[a-z]*", name.lower()).group()  # train2017 and test-00000-of-00001 as well
    if first in TRAIN_NAMES:
        return "train"
    return first if first in TEST_NAMES else None


def open_folder(root: str, files: list[str]) -> dict[str, datasets.Dataset]:
    """A folder of images: `train/` and `test/` (or `val/`) are splits; one folder per class makes labels, if every
    image lies in one. Anything else is an unlabelled data set, however deep it is nested.

    Args:
        root: a folder or URL.
        files: the images below it.

    Raises:
        ValueError: there is no image in it.
    """
    names = [file[len(root) + 1 :] for file in files]
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = {split_of(folder): f"{root}/{folder}" for folder in folders}
    if None in splits or "train" not in splits:  # with other folders beside it, `train` may well be a class
        splits = {"train": root}
    found = {name: [file for file in files if file.startswith(f"{path}/")] for name, path in splits.items()}
    if not found["train"]:
        raise ValueError(f"there are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})")
    # Names of the classes come from the training split, so that labels mean the same in every split.
    names = {name: [_class_of(file, splits[name]) for file in files] for name, files in found.items()}
    classes = sorted(set(names["train"]) - {None})
    labelled = None not in names["train"] and len(classes) > 1
    return {name: _folder_split(found[name], names[name], classes if labelled else None) for name in found}


def _class_of(file: str, root: str) -> str | None:
    first, slash, _ = file[len(root) + 1 :].partition("/")
    return first if slash else None


def _folder_split(files: list[str], names: list, classes: list[str] | None) -> datasets.Dataset:
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": files}
    if classes is not None:
        for name in set(names) - set(classes):
            raise ValueError(f"class folder {name!r} is in another split but not in train")
        features["label"] = datasets.ClassLabel(names=classes)
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = [numbers[name] for name in names]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# ---- splits and columns --------------------------------------------------------------------------------------------
def choose_splits(splits: dict, data: DataArguments) -> tuple[str, str | None]:
    """The names of the split to train on and of the one to test on; None where there is no other.

    Raises:
        ValueError: a named split does not exist, or it is not clear which one to train on.
    """
    for key in ("split", "eval_split"):
        if getattr(data, key) is not None and getattr(data, key) not in splits:
            raise unknown_choice(f"data.{key}", getattr(data, key), splits)
    train = data.split or next((name for name in TRAIN_NAMES if name in splits), None)
    if train is None and len(splits) > 1:
        raise ValueError(f"which split to train on? Set data.split to one of {', '.join(splits)}")
    train = train or next(iter(splits))
    other = next((name for name in TEST_NAMES if name in splits and name != train), None)
    return train, data.eval_split or other


def find_columns(features: dict, data: DataArguments) -> tuple[str, str | None]:
    """The names of the image column and of the label column, or None for the latter.

    Raises:
        ValueError: a named column does not exist, or no column holds images.
    """
    for key in ("image_column", "label_column"):
        if getattr(data, key) is not None and getattr(data, key) not in features:
            raise unknown_choice(f"data.{key}", getattr(data, key), features)
    image = data.image_column or next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    image = image or next((n for n in features if n.lower() in IMAGE_NAMES and _holds_files(features[n])), None)
    if image is None:
        raise ValueError(
            f"no column holds images; the columns are {', '.join(features)}. If one does, name it in data.image_column"
        )
    label = data.label_column or next((n for n in LABEL_NAMES if _is_class(features.get(n))), None)
    return image, label or next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), None)


def _is_class(feature) -> bool:
    dtype = str(getattr(feature, "dtype", ""))  # labels of whole images: no lists, and no measured quantities
    return isinstance(feature, datasets.ClassLabel) or dtype in ("string", "bool") or "int" in dtype


def _holds_files(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def hold_out(dataset: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A tenth of the images, at random but always the same, as the test split of a data set that has none."""
    order = np.random.default_rng(0).permutation(len(dataset))
    count = max(1, min(int(len(dataset) * HELD_OUT), HELD_OUT_MOST))
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))
