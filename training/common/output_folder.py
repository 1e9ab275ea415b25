"""Where a command writes: which folder, that nobody else writes there meanwhile, and that nothing is replaced."""

import errno
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hf_mim.training.common.errors import FolderError


try:
    import fcntl
except ImportError:  # Windows: folders are made exclusively there, and not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
HELD: set[Path] = set()  # by this process: the operating system would give it the same lock twice
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that know none


# ---- the lock ------------------------------------------------------------------------------------------------------
class FolderLock:
    """The right to write into a folder, which one process has at a time.

    It is a POSIX lock, which network file systems know too: it ends with the process, however that ends, and is not
    inherited by a loader's workers. The file `.lock` names the owner; left behind by a crash, it means nothing.

    Attributes:
        guards: False on file systems and systems (Windows) that know no such locks: nothing stops a second run there.

    Raises:
        FolderError: another process writes into the folder, or it cannot be written into.
    """

    guards = True

    def __init__(self, folder: Path):
        self.folder, self.path = folder, (folder / LOCK).resolve()
        if self.path in HELD:
            raise in_use(folder, f"process {os.getpid()}, this one,")
        try:
            self.file = self._open()
        except OSError as error:
            raise FolderError(f"cannot write into {folder}: {error.strerror}", str(folder)) from error
        HELD.add(self.path)

    def _open(self) -> IO[bytes]:
        while True:
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115, it stays open
            locked = lock_file(file)
            self.guards = locked is not None
            if locked is False:
                file.seek(0)
                owner = file.read(200).decode(errors="replace").strip()
                file.close()
                raise in_use(self.folder, owner or "another process")
            if is_at(file, self.path):  # the owner before removes it
                break
            file.close()
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError:  # a full disk: the lock is held all the same
            pass
        return file

    def check(self) -> None:
        """Raises:
        FolderError: the folder was removed, or another one is in its place.
        """
        if not is_at(self.file, self.path):
            raise FolderError(f"the output folder {self.folder} was removed during the run", str(self.folder))

    def release(self) -> None:
        HELD.discard(self.path)
        if is_at(self.file, self.path):
            self.path.unlink(missing_ok=True)
        self.file.close()


def lock_file(file: IO[bytes]) -> bool | None:
    """Locks an open file until it is closed; False where another process has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_LOCKS else False
    return True


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def in_use(folder: Path, owner: str) -> FolderError:
    return FolderError(f"{owner} writes into {folder}: wait for its end, or choose another output folder", str(folder))


# ---- the folder ----------------------------------------------------------------------------------------------------
@dataclass
class OutputFolder:
    """Where a command writes. It is looked at when it is chosen, and made and locked when it is opened.

    Args:
        path: of the folder.
        traces: patterns of files that say that it holds a run already; none where that is to be resumed.
        remedy: for the message then.
        dated: it has the default name: another one is taken where there is one of that name.
    """

    path: Path
    traces: tuple[str, ...] = ()
    remedy: str = ""
    dated: bool = False
    lock: FolderLock | None = field(default=None, repr=False)

    def check_free(self) -> None:
        """Raises:
        FolderError: it is a file, holds another run, or another process writes into it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"the output folder {self.path} is a file", str(self.path))
        if (self.path / LOCK).exists():
            FolderLock(self.path).release()
        trace = next((path.name for trace in self.traces for path in self.path.glob(trace)), None)
        if trace is not None:
            raise holds_run(str(self.path), trace, self.remedy)

    def open(self) -> None:
        """Makes the folder, or takes it over.

        Raises:
            FolderError: as of `check_free`, since somebody may have been quicker, or it cannot be made.
        """
        try:
            if self.dated:
                self.path = make_folder(self.path)
            else:
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"cannot make the output folder {self.path}: {error.strerror}", str(self.path)) from error
        self.check_free()
        self.lock = FolderLock(self.path)

    def check(self) -> None:
        """Raises:
        FolderError: it was removed since it was opened.
        """
        if self.lock is not None:
            self.lock.check()

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()
        self.lock = None


def make_folder(path: Path) -> Path:
    """Makes a folder that nobody has: `path`, or the first of `path-2`, `path-3`, ... that is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, candidate = 1, path
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def choose_folder(output_dir: str | None, stem: str, traces: tuple[str, ...], remedy: str) -> OutputFolder:
    """The output folder, not made yet: what the user said, else one of `stem` and the date.

    Raises:
        FolderError: as of `OutputFolder.check_free`.
    """
    path = Path(output_dir or f"outputs/{stem}-{time.strftime('%Y-%m-%d-%H%M%S')}").expanduser()
    folder = OutputFolder(path, traces, remedy, dated=output_dir is None)
    if output_dir is not None:
        folder.check_free()
    return folder


def holds_run(location: str, trace: str, remedy: str) -> FolderError:
    return FolderError(f"{location} holds another run ({trace}): {remedy}", location)


# ---- files and folders without a run -------------------------------------------------------------------------------
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
