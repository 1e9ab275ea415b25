"""Data sets on the Hub. `datasets` reads tables. Of folders of images and of tars it loses labels, images or members
without a word, so these are read by the rules of this project, in the splits that `datasets` finds."""

import glob
import os
import posixpath
from pathlib import PurePosixPath
from urllib.parse import unquote

import datasets
from huggingface_hub import snapshot_download

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.files import EXTENSIONS, TABLES, Listing, list_place
from hf_mim.training.data.folders import open_folder
from hf_mim.training.data.splits import Opened, split_of
from hf_mim.training.data.tars import open_tars


FOLDER, TARS = "ImageFolder", "WebDataset"  # builders of `datasets`
HUB = "hf://datasets/"


def open_hub(data: DataArguments) -> Opened:
    """A data set on the Hub, with every split.

    Raises:
        DataError, OSError: it is missing, or cannot be read.
    """
    try:
        builder = datasets.load_dataset_builder(data.dataset, data.subset)
        kind, splits = kind_of(builder), files_of(builder)
        if kind is None:
            return Opened(datasets.load_dataset(data.dataset, data.subset, streaming=data.streaming))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message, place = f"cannot read {data.dataset!r}: {reason}", data.dataset or ""
        if isinstance(error, FileNotFoundError):  # also that of `datasets`
            message = f"{data.dataset!r} was not found, locally or on the Hub: {reason}"
        elif isinstance(error, ConnectionError):
            message = f"there is no folder {data.dataset!r} here, and the Hub cannot be asked: {reason}"
        else:
            raise DataError(message, place) from error
        raise DataError(message, place) from None
    root = str(builder.base_path)
    listing, left = choose_files(list_place(root), root, splits, kind)
    if not data.streaming and root.startswith(HUB):
        local = download(root, listing, splits, left)
        listing.files, listing.tables = (
            [move(file, root, local) for file in f] for f in (listing.files, listing.tables)
        )
        splits = {name: [move(file, root, local) for file in files] for name, files in splits.items()}
        root = local
    if kind == TARS:
        opened = Opened({name: open_tars(files, data.streaming) for name, files in splits.items()}, listing.notes())
    else:
        opened = open_folder(root, listing, {name: [(root_of(root, name, f), f)] for name, f in splits.items()})
    opened.digest = listing.digest(root)
    if left:
        folders = sorted({file[len(str(builder.base_path)) + 1 :].rpartition("/")[0] or "." for file in left})
        named = ", ".join(folders[:4]) + (", ..." if len(folders) > 4 else "")
        opened.notes.append(f"{len(left):,} files are in no split of the data set on the Hub: {named}")
    return opened


def kind_of(builder: datasets.DatasetBuilder) -> str | None:
    """`FOLDER` or `TARS`, whose files can be read one by one; None of other data, and of archives of images."""
    kind = next((base.__name__ for base in type(builder).__mro__ if base.__name__ in (FOLDER, TARS)), None)
    names = [file for files in files_of(builder).values() for file in files]
    if kind == FOLDER and not all(os.path.splitext(name)[1].lower() in EXTENSIONS for name in names):
        return None
    return kind if names and all(name.startswith(f"{builder.base_path}/") for name in names) else None


def files_of(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """{split: files}, without tables."""
    splits = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    splits = {name: [f for f in files if posixpath.basename(f) not in TABLES] for name, files in splits.items()}
    return {name: sorted(files) for name, files in splits.items() if files}


def choose_files(listing: Listing, root: str, splits: dict[str, list[str]], kind: str) -> tuple[Listing, list[str]]:
    """The files of the splits, to which images of a type that `datasets` does not know are added (AVIF, for one) where
    the splits are of images; and those that are in none."""
    used = {file for files in splits.values() for file in files}
    known, left = {os.path.splitext(file)[1].lower() for file in used}, list[str]()
    for file in sorted(set(listing.files) - used):
        ending = os.path.splitext(file)[1].lower()
        homes = [name for name, files in splits.items() if file.startswith(f"{root_of(root, name, files)}/")]
        if kind == FOLDER and len(homes) == 1 and ending in EXTENSIONS - known:
            splits[homes[0]].append(file)
        else:
            left.append(file)
    listing.files = sorted(file for files in splits.values() for file in files)
    return listing, left


def root_of(root: str, name: str, files: list[str]) -> str:
    """The folder of a split, which holds those of its classes: the one with its name, else the innermost that holds all
    of its files."""
    names = [posixpath.dirname(file[len(root) + 1 :]) for file in files]
    common = posixpath.commonpath(names) if all(names) else ""
    parts = common.split("/") if common else []
    named = next((i + 1 for i, part in enumerate(parts) if split_of(part) == split_of(name) is not None), len(parts))
    return "/".join([root, *parts[:named]])


def download(root: str, listing: Listing, splits: dict[str, list[str]], left: list[str]) -> str:
    """The local copy of the splits of a data set at a URL of the Hub, in the Hub's cache, without what is `left`. A
    pattern stands for the files of one type in a split's folder, or for a folder that is left as a whole: with one for
    each file, each would be compared with all."""
    repo, _, revision = root.removeprefix(HUB).partition("@")
    patterns = {glob.escape(table[len(root) + 1 :]) for table in listing.tables}
    for name, files in splits.items():
        folder = root_of(root, name, files)[len(root) + 1 :]
        inside = f"{glob.escape(folder)}/*" if folder else "*"
        patterns |= {inside + os.path.splitext(file)[1] for file in files}
    needed = [file[len(root) + 1 :] for file in (*listing.files, *listing.tables)]
    used = {str(folder) for name in needed for folder in PurePosixPath(name).parents}
    ignored = set()
    for name in (file[len(root) + 1 :] for file in left):
        folder = posixpath.dirname(name)
        ignored.add(glob.escape(name) if (folder or ".") in used else f"{glob.escape(folder)}/*")
    try:
        return snapshot_download(
            repo,
            repo_type="dataset",
            revision=unquote(revision) or None,
            allow_patterns=sorted(patterns),
            ignore_patterns=sorted(ignored),
        )
    except Exception as error:
        raise urls.failed(root, error) from None


def move(file: str, root: str, local: str) -> str:
    return f"{local}/{file[len(root) + 1 :]}"
