"""Opening a data set: the shipped one, the Hub, folders, parquet files and WebDataset shards, here or at the URLs of
fsspec."""

import tarfile
from importlib.resources import files as package_files
from pathlib import Path

import datasets
import pyarrow.parquet

from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.files import SHARDS, list_files, place_of
from hf_mim.training.data.folders import open_folder
from hf_mim.training.data.splits import split_of
from hf_mim.training.errors import DataError


SHIPPED = Path(str(package_files("hf_mim"))) / "data" / "fashion_mnist"
FOLDER_SHARDS = 256  # of a folder that is streamed: opening one takes as long as decoding an image


def open_dataset(data: DataArguments) -> dict[str, datasets.Dataset]:
    """The splits of a data set, by name; images are not decoded.

    Raises:
        DataError, OSError: it is missing, empty, or in an unknown form.
    """
    if data.dataset is None:
        return open_files(sorted(list_files(str(SHIPPED))), data.streaming)
    place = place_of(data.dataset)
    if place is None:
        return open_hub(data)
    files = list_files(place)
    by_kind = ([file for file in files if file.endswith(ending)] for ending in SHARDS)
    if shards := next(filter(None, by_kind), None):
        return open_files(sorted(shards, key=lambda file: file.split("/")), data.streaming)
    splits = open_folder(place, sorted(files))
    if not data.streaming:
        return splits
    return {name: split.to_iterable_dataset(min(len(split), FOLDER_SHARDS)) for name, split in splits.items()}


def open_hub(data: DataArguments) -> dict[str, datasets.Dataset]:
    """A data set on the Hub, with every split."""
    try:
        return dict(datasets.load_dataset(data.dataset, data.subset, streaming=data.streaming))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"{data.dataset!r} was not found, locally or on the Hub: {reason}"
        raise DataError(message, data.dataset or "") from None


def open_files(files: list[str], streaming: bool = False) -> dict[str, datasets.Dataset]:
    """Parquet files, or WebDataset shards, here or at URLs; a file or its folder whose name begins with a split's name
    belongs to that split. Shards that are not streamed are copied into the cache of `datasets`.

    Raises:
        ValueError: one cannot be read.
    """
    kind, remote = SHARDS[Path(files[0]).suffix], urls.is_url(files[0])
    splits: dict[str, list[str]] = {}
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
        raise DataError(f"cannot read {where} as {kind}: {error.__cause__ or error}", where) from None
    except Exception as error:
        if not remote:
            raise
        raise urls.failed(files[0].rpartition("/")[0], error) from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def check_file(file: str, kind: str) -> None:
    """Raises:
    DataError, Unreachable: it cannot be read as what its ending says.
    """
    try:
        with urls.open_file(file) as opened:
            if kind == "parquet":
                pyarrow.parquet.read_schema(opened)
            else:
                tarfile.open(fileobj=opened).close()
    except urls.Unreachable:
        raise
    except (OSError, tarfile.TarError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {file} as {kind}: {error}".partition("\n")[0], file) from None
