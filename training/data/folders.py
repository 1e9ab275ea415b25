"""Folders of images: their splits, their classes, and what a table beside them says."""

import datasets

from hf_mim.training.common.errors import DataError
from hf_mim.training.data.files import EXTENSIONS, SHARDS, Listing
from hf_mim.training.data.metadata import Metadata, read_metadata
from hf_mim.training.data.splits import Opened, split_of


LABEL = "label"  # the column with the names of the class folders
Splits = dict[str, list[tuple[str, list[str]]]]  # {name: [(folder, files below it)]}
UNLABELLED_NAMES = ("unlabeled", "unlabelled", "unsupervised", "extra")  # beside train/ they make no class of it


def open_folder(root: str, listing: Listing, splits: Splits | None = None) -> Opened:
    """A folder of images. `train/` and `test/` (or `val/`) are splits, and so are the folders beside them, under their
    own names. One folder per class makes labels, as text; so does a column of `metadata.csv` and its like.

    Args:
        root: a folder or URL.
        listing: what lies there.
        splits: {name: [(folder, files below it)]}; None finds them.

    Raises:
        DataError: there is no image in it, or a table cannot be used.
    """
    files = sorted(file for file in listing.files if not file.endswith(tuple(SHARDS)))
    if not files:
        passed = "".join(f"; {note}" for note in listing.notes())
        raise DataError(f"there are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))}){passed}", root)
    metadata = read_metadata(listing.tables, files)
    opened = Opened(notes=[*listing.notes(), *metadata.notes])
    files = [file for file in files if file not in metadata.companions]
    folders = find_splits(_inner_root(root, files), files) if splits is None else splits
    folders = {
        name: [(folder, [f for f in found if f not in metadata.companions]) for folder, found in parts]
        for name, parts in folders.items()
    }
    for name, parts in folders.items():
        opened[name] = _make_split(parts, metadata, opened.notes, name, 1 if len(folders) > 1 else 2)
    strays = len(files) - sum(len(found) for parts in folders.values() for _, found in parts)
    if strays:
        opened.notes.append(f"{strays:,} images beside the folders of the splits are left out")
    return opened


def find_splits(root: str, files: list[str]) -> Splits:
    """{split: [(folder, files below it)]}; without splits all is `train`.

    A folder `train/` is a split where another split lies beside it, or where it has folders of its own, or where the
    others are named like `unlabeled/`; else, beside `bus/` and `plane/`, it is a class.
    """
    tops: dict[str, list[str]] = {}
    for file in files:
        top, slash, _ = file[len(root) + 1 :].partition("/")
        if slash:
            tops.setdefault(top, []).append(file)
    names = {top: split_of(top) for top in tops}
    splits, others = [top for top in tops if names[top]], [top for top in tops if not names[top]]
    nested = any("/" in file[len(root) + len(top) + 2 :] for top in splits for file in tops[top])
    if "train" in names.values():
        are_splits = len(set(names.values()) - {None}) > 1 or nested or _are_unlabelled(others)
    else:  # nothing but test or validation images
        are_splits = bool(splits) and not others
    if not are_splits:
        return {"train": [(root, files)]}
    found: Splits = {}
    for top in sorted(tops):
        found.setdefault(names[top] or top, []).append((f"{root}/{top}", tops[top]))
    return found


def _are_unlabelled(folders: list[str]) -> bool:
    return all(folder.lower().startswith(UNLABELLED_NAMES) for folder in folders)


def _inner_root(root: str, files: list[str]) -> str:
    """The folder that holds the splits: that of an unpacked archive may lie alone in another one."""
    while True:
        tops = {file[len(root) + 1 :].partition("/")[:2] for file in files}
        (top, slash), *others = tops
        if others or not slash or split_of(top):
            return root
        inner = {file[len(root) + len(top) + 2 :].partition("/")[0] for file in files}
        if not any(map(split_of, inner)):
            return root
        root = f"{root}/{top}"


def _class_of(file: str, root: str) -> str | None:
    first, slash, _ = file[len(root) + 1 :].partition("/")
    return first if slash else None


def _make_split(
    parts: list[tuple[str, list[str]]], metadata: Metadata, notes: list[str], name: str, min_classes: int
) -> datasets.Dataset:
    files = [file for _, found in parts for file in found]
    features: dict = {"image": datasets.Image(decode=False)}
    columns: dict[str, list] = {"image": files}
    for column, (values, feature) in metadata.columns(files).items():
        if column not in columns:
            columns[column], features[column] = values, feature
    classes = [_class_of(file, root) for root, found in parts for file in found]
    strays = classes.count(None)
    several = len(set(classes) - {None}) >= min_classes
    if LABEL not in columns and several and 2 * strays < len(files):
        columns[LABEL], features[LABEL] = classes, datasets.Value("string")
    elif LABEL not in columns and several:
        notes.append(f"split {name}: no labels, because {strays:,} of {len(files):,} images lie in no class folder")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
