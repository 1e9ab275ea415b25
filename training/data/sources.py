"""Opening a data set: the shipped one, the Hub, folders, parquet files and WebDataset shards, here or at the URLs of
fsspec."""

import re
import tarfile
from importlib.resources import files as package_files
from pathlib import Path

import datasets
import pyarrow.parquet

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.files import SHARDS, list_files, list_place, place_of
from hf_mim.training.data.folders import open_folder
from hf_mim.training.data.hub_files import open_hub
from hf_mim.training.data.shards import opening
from hf_mim.training.data.splits import Opened, split_of
from hf_mim.training.data.tars import open_tars


SHIPPED = Path(str(package_files("hf_mim"))) / "data" / "fashion_mnist"
NUMBERING = re.compile(r"[-_.]?\d+(-of-\d+)?$")  # of one of several files
FOLDER_SHARDS = 256  # of a folder that is streamed: opening one takes as long as decoding an image


def open_dataset(data: DataArguments) -> Opened:
    """The splits of a data set, by name; images are not decoded.

    Raises:
        DataError, OSError: it is missing, empty, or in an unknown form.
    """
    if data.dataset is None:
        return open_files(str(SHIPPED), sorted(list_files(str(SHIPPED))), data.streaming)
    place = place_of(data.dataset)
    opened = open_hub(data) if place is None else open_place(place, data.streaming)
    if data.streaming:
        for name, split in opened.items():
            if isinstance(split, datasets.Dataset):
                opened[name] = split.to_iterable_dataset(min(len(split), FOLDER_SHARDS))
    return opened


def open_place(place: str, streaming: bool) -> Opened:
    """What lies in a local folder or file or at a URL. Folders of images are no streams yet."""
    listing = list_place(place)
    by_kind = ([file for file in listing.files if file.endswith(ending)] for ending in SHARDS)
    shards = next(filter(None, by_kind), None)
    if shards is None:
        opened = open_folder(place, listing)
    else:
        opened = open_files(place, sorted(shards, key=lambda file: file.split("/")), streaming)
        for file in {*listing.files, *listing.tables} - set(shards):
            listing.passed_over[f"{Path(file).suffix.lower()} beside {Path(shards[0]).suffix}"] += 1
        listing.files = shards
        opened.notes[:0] = listing.notes()
    opened.digest = listing.digest(place)
    return opened


def open_files(place: str, files: list[str], streaming: bool = False) -> Opened:
    """Parquet or arrow files, or WebDataset shards, here or at URLs. A file or its folder whose name begins with a
    split's name belongs to that split; beside such ones, others are splits of their own name.

    Args:
        place: what they lie in.

    Raises:
        ValueError: one cannot be read.
    """
    kind, remote = SHARDS[Path(files[0]).suffix], urls.is_url(files[0])
    # Of a stream from elsewhere the first must do: each takes several round trips. What is copied is read then.
    for file in files[: int(streaming)] if remote else files:
        check_file(file, kind)
    splits = name_splits(place, files)
    bars = not datasets.are_progress_bars_disabled()
    if not remote:
        datasets.disable_progress_bars()  # nothing is downloaded
    try:
        if kind == "webdataset":
            return Opened({name: open_tars(paths, streaming) for name, paths in splits.items()})
        with opening(files[0], kind):
            if kind == "parquet" and not streaming and not remote:
                return Opened({name: datasets.Dataset.from_parquet(paths) for name, paths in splits.items()})
            if kind == "arrow" and not streaming and not remote:
                return Opened({name: _open_arrow(paths) for name, paths in splits.items()})
            return Opened(datasets.load_dataset(kind, data_files=splits, streaming=streaming))
    except (DataError, urls.Unreachable):
        raise
    except Exception as error:
        if not remote:
            raise
        raise urls.failed(files[0].rpartition("/")[0], error) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def name_splits(place: str, files: list[str]) -> dict[str, list[str]]:
    """{split: files}."""
    folder = {file: Path(file[len(place) + 1 :]).parent.name for file in files}  # "" right in the place
    named = {file: split_of(Path(file).stem) or split_of(folder[file]) for file in files}
    splits: dict[str, list[str]] = {}
    for file, name in named.items():
        if name is None and any(named.values()):
            name = folder[file] or NUMBERING.sub("", Path(file).stem)
            name = re.sub(r"\W+", "_", name).strip("_")
        splits.setdefault(name or "train", []).append(file)
    return splits


def _open_arrow(files: list[str]) -> datasets.Dataset:
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def check_file(file: str, kind: str) -> None:
    """Raises:
    DataError, Unreachable: it cannot be read as what its ending says.
    """
    try:
        with urls.open_file(file) as opened:
            if kind == "parquet":
                pyarrow.parquet.read_schema(opened)
            elif kind == "arrow":
                pyarrow.ipc.open_stream(opened).close()
            else:
                tarfile.open(fileobj=opened).close()
    except urls.Unreachable:
        raise
    except (OSError, tarfile.TarError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {file} as {kind}: {error}".partition("\n")[0], file) from None
