"""Which files of which kind lie in a folder or at a URL."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import PIL.features

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls


EXTENSIONS = {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"}
EXTENSIONS |= {".webp"}
# What Pillow reads only where it was built with the library.
EXTENSIONS |= {".avif"} if PIL.features.check("avif") else set()
EXTENSIONS |= {".j2k", ".jp2", ".jpf", ".jpx"} if PIL.features.check("jpg_2000") else set()
ARRAYS = {".npy"}  # beside them, with any number of channels
SHARDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
TABLES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # of `datasets`' image folders
BOOKKEEPING = {"dataset_info.json", "state.json", "dataset_dict.json"}  # of `datasets`' `save_to_disk`
ENDINGS_NAMED = 5  # in a message
# Files of which a folder holds all of a group: it is the output folder of a command.
RUNS = (
    {"recipe.yaml", "config.json"},
    {"recipe.yaml", "metrics.json"},
    {"recipe.yaml", "watch"},
    {"recipe.yaml", "checkpoint"},
    {"probe.json", "probe.png"},
    {"dense.json", "dense.png"},
    {"report.json", "report.html"},
)
RUN_MARKS = set[str]().union(*RUNS)


@dataclass
class Listing:
    """The files of a data set.

    Args:
        files: images, arrays and shards.
        tables: see `TABLES`.
        passed_over: how many others there are of each ending; hidden ones and second links count as such.
        runs: output folders of commands, relative to the data set, whose files are left out.
    """

    files: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What was passed over, for people; [] where nothing was."""
        named = ", ".join(self.runs[:ENDINGS_NAMED]) + (", ..." if len(self.runs) > ENDINGS_NAMED else "")
        notes = [f"left out, since they are output folders of runs: {named}"] if self.runs else []
        count = self.passed_over.total()
        if not count:
            return notes
        kinds = [f"{number:,} {kind}" for kind, number in self.passed_over.most_common(ENDINGS_NAMED)]
        kinds += ["others"] if len(self.passed_over) > ENDINGS_NAMED else []
        return [*notes, f"{count:,} of {count + len(self.files):,} files were passed over: {', '.join(kinds)}"]

    def digest(self, place: str) -> str:
        """Of the names of the files and, here, their sizes: whether two runs have the same data."""
        lines = []
        for file in sorted([*self.files, *self.tables]):
            size = "" if urls.is_url(place) else os.path.getsize(file)
            lines.append(f"{file[len(place) :]} {size}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


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
    if path.suffix in SHARDS or dataset.startswith((".", "~", "/")) or dataset.endswith("/") or dataset.count("/") > 1:
        raise DataError(f"there is no file or folder {dataset}", dataset)
    return None


def list_files(place: str) -> list[str]:
    """The images, arrays and shards of a file, folder or URL; as of `list_place`."""
    return list_place(place).files


def list_place(place: str) -> Listing:
    """What lies in a file, folder or URL. Hidden files and folders are passed over, and so is a link to what lies there
    too: no image counts twice.

    Raises:
        DataError, OSError: there is nothing, a file of another kind, or it cannot be listed.
    """
    listing = Listing()
    files = _list_url(place) if urls.is_url(place) else list(_list_local(place, listing.passed_over))
    if files == [place] and Path(place).suffix not in SHARDS:
        raise DataError(f"{place} is a file, but not a parquet, arrow or tar file; give a folder for images", place)
    listing.runs = find_runs(file[len(place) + 1 :] for file in files)
    if "." in listing.runs:
        raise DataError(f"{place} is the output folder of a run, whose pictures are no data", place)
    inside = tuple(f"{place}/{run}/" for run in listing.runs)
    for file in files:
        name, ending = file.rpartition("/")[2], os.path.splitext(file)[1]
        if file.startswith(inside):
            continue
        if file != place and is_hidden(file[len(place) + 1 :]):
            listing.passed_over["hidden"] += 1
        elif name in TABLES:
            listing.tables.append(file)
        elif name in BOOKKEEPING or ending == ".arrow" and name.startswith("cache-"):
            continue
        elif ending in SHARDS or ending.lower() in EXTENSIONS | ARRAYS:
            listing.files.append(file)
        else:
            listing.passed_over[ending.lower() or "without an ending"] += 1
    if all(file.endswith(tuple(SHARDS)) for file in listing.files):  # metadata.parquet with no images beside it
        listing.files += [table for table in listing.tables if table.endswith(tuple(SHARDS))]
        listing.tables = [table for table in listing.tables if table not in listing.files]
    return listing


def find_runs(names: Iterable[str]) -> list[str]:
    """The folders, of files relative to a data set, that are output folders of commands; "." is the data set itself.
    Those within another one are not named."""
    marks: dict[str, set[str]] = {}
    for name in names:
        *folders, file = name.split("/")
        if file in RUN_MARKS:
            marks.setdefault("/".join(folders) or ".", set()).add(file)
        if folders and (mark := folders[-1].partition("-")[0]) in RUN_MARKS:
            marks.setdefault("/".join(folders[:-1]) or ".", set()).add(mark)
    runs: list[str] = []
    for folder in sorted(folder for folder, found in marks.items() if any(group <= found for group in RUNS)):
        if not any(folder.startswith(f"{run}/") for run in runs):
            runs.append(folder)
    return runs


def is_hidden(name: str) -> bool:
    """Whether a file lies in a hidden folder or is hidden itself, or is one of those that macOS puts into archives.

    Args:
        name: relative to the data set.
    """
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part != ".")


def _list_url(url: str) -> list[str]:
    if Path(url).suffix in SHARDS and urls.is_file(url):  # an https server would send all of it as a list
        return [url]
    files = [urls.join(url, name) for name in urls.list_below(url)]
    if not files and not urls.is_file(url):
        raise DataError(f"there is nothing at {url}", url)
    return files or [url]


def _list_local(place: str, passed_over: Counter[str]) -> Iterator[str]:
    """The files below a folder, each of them once, however many links lead to it. What is linked comes last."""
    if Path(place).is_file():
        yield place
        return
    root = os.path.realpath(place)
    waiting, linked = [place], list[str]()
    seen = set[str]()  # real paths
    while waiting or linked:
        path = waiting.pop() if waiting else linked.pop(0)
        real = os.path.realpath(path)
        if real in seen or f"{root}/".startswith(f"{real}/") and real != root:
            passed_over["linked twice"] += 1
            continue
        seen.add(real)
        if not os.path.isdir(real):
            if os.path.isfile(real):
                yield path
            else:
                passed_over["pipes and devices" if os.path.exists(real) else "linked to nothing"] += 1
            continue
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_symlink():
                    linked.append(f"{path}/{entry.name}")
                elif entry.is_dir():
                    waiting.append(f"{path}/{entry.name}")
                elif f"{real}/{entry.name}" in seen:
                    passed_over["linked twice"] += 1
                elif not entry.is_file():
                    passed_over["pipes and devices"] += 1
                else:
                    seen.add(f"{real}/{entry.name}")
                    yield f"{path}/{entry.name}"
