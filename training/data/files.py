"""Which files of which kind lie in a folder or at a URL."""

import os
from pathlib import Path

from hf_mim.training.data import urls
from hf_mim.training.errors import DataError


EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARRAYS = {".npy"}  # beside them, with any number of channels
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}


def place_of(dataset: str) -> str | None:
    """The local path or the URL of a data set; None for what may be an id on the Hub.

    Raises:
        DataError: it is written as a path, and there is nothing there.
    """
    local = dataset
    if urls.is_url(dataset):
        protocol, _, local = dataset.partition("://")
        if protocol not in urls.LOCAL:
            return dataset.rstrip("/")
    path = Path(local).expanduser()
    if path.exists():
        return path.as_posix()
    if path.suffix in SHARDS or dataset.startswith((".", "~", "/")) or dataset.count("/") > 1:
        raise DataError(f"there is no file or folder {dataset}", dataset)
    return None


def list_files(place: str) -> list[str]:
    """The images, arrays and shards of a file, folder or URL, hidden ones left out.

    Raises:
        DataError, OSError: there is nothing, a file of another kind, or it cannot be listed.
    """
    files = _list_url(place) if urls.is_url(place) else _list_local(place)
    if files == [place] and Path(place).suffix not in SHARDS:
        raise DataError(f"{place} is a file, but not a parquet file or .tar; give a folder for images", place)
    return [file for file in files if is_known(file)]


def _list_url(url: str) -> list[str]:
    if Path(url).suffix in SHARDS and urls.is_file(url):  # an https server would send all of it as a list
        return [url]
    files = [urls.join(url, name) for name in urls.list_below(url)]
    if not files and not urls.is_file(url):
        raise DataError(f"there is nothing at {url}", url)
    return files or [url]


def _list_local(place: str) -> list[str]:
    if Path(place).is_file():
        return [place]
    return [f"{folder}/{file}" for folder, _, names in os.walk(place, followlinks=True) for file in names]


def is_known(file: str) -> bool:
    """Whether a file is an image, an array or a shard, by its ending, and not hidden."""
    ending = os.path.splitext(file)[1]
    known = ending in SHARDS or ending.lower() in EXTENSIONS or ending.lower() in ARRAYS
    return known and not file.rpartition("/")[2].startswith(".")
