"""Folders of images: their splits, and their classes."""

import datasets

from hf_mim.training.data.files import EXTENSIONS
from hf_mim.training.data.splits import split_of
from hf_mim.training.errors import DataError


def open_folder(root: str, files: list[str]) -> dict[str, datasets.Dataset]:
    """A folder of images: `train/` and `test/` (or `val/`) are splits; one folder per class makes labels, if every
    image lies in one. Anything else is an unlabelled data set, however deep it is nested.

    Args:
        root: a folder or URL.
        files: the images below it.

    Raises:
        DataError: there is no image in it, or a class that the training images lack.
    """
    splits = _split_folders(root, files)
    files_of = {name: [file for file in files if file.startswith(f"{path}/")] for name, path in splits.items()}
    if not files_of["train"]:
        raise DataError(f"there are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})", root)
    classes_of = {name: [_class_of(file, splits[name]) for file in files_of[name]] for name in splits}
    # Names of the classes come from the training split, so that labels mean the same in every split.
    classes = sorted({name for name in classes_of["train"] if name is not None})
    labelled = None not in classes_of["train"] and len(classes) > 1
    return {name: _make_split(files_of[name], classes_of[name], classes if labelled else None) for name in splits}


def _split_folders(root: str, files: list[str]) -> dict[str, str]:
    """The folder of each split."""
    names = [file[len(root) + 1 :] for file in files]
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    splits = {split_of(folder): f"{root}/{folder}" for folder in folders}
    if None in splits or "train" not in splits:  # with other folders beside it, `train` may well be a class
        return {"train": root}
    return {name: folder for name, folder in splits.items() if name is not None}


def _class_of(file: str, root: str) -> str | None:
    first, slash, _ = file[len(root) + 1 :].partition("/")
    return first if slash else None


def _make_split(files: list[str], names: list[str | None], classes: list[str] | None) -> datasets.Dataset:
    features: dict = {"image": datasets.Image(decode=False)}
    columns: dict[str, list] = {"image": files}
    if classes is not None:
        for name in set(names) - set(classes):
            raise DataError(f"class folder {name!r} is in another split but not in train")
        features["label"] = datasets.ClassLabel(names=classes)
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = [numbers[name] for name in names if name is not None]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
