"""Nobody's files are overwritten: what a command is about to write is looked at first."""

from pathlib import Path

from hf_mim.training.errors import FolderError


def check_new_file(path: Path, force: bool = False) -> None:
    """Raises:
    FolderError: there is something already, and it is not to be replaced.
    """
    if path.is_dir():
        raise FolderError(f"{path} is a folder; give the name of a file", str(path))
    if path.exists() and not force:
        raise FolderError(f"{path} exists already; choose another name, or replace it with --force", str(path))


def check_new_folder(folder: Path, force: bool = False) -> None:
    """Raises:
    FolderError: it is a file, or holds something, and that is not to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is not a folder", str(folder))
    content = next(folder.iterdir(), None) if folder.is_dir() else None
    if content is not None and not force:
        message = (
            f"{folder} is not empty (it holds {content.name}); choose another folder, or write into it with --force"
        )
        raise FolderError(message, str(folder))
