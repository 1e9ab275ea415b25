"""Places that are no local paths: the URLs of fsspec (s3://, gs://, hf://, https://, memory://, ...)."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from hf_mim.training.common.errors import OneLineError, RecipeError, UserError
from hf_mim.training.common.sharing import has_secret, masked


URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
LOCAL = ("file", "local")
PAUSES = (1, 5)  # seconds before a file is read again
AT_ONCE = 16  # files of a batch that are read side by side: it is waiting that takes the time


class Unreachable(OneLineError, OSError):
    """What lies at a URL cannot be read or written, and not because it is not there."""


def is_url(place) -> bool:
    return isinstance(place, str) and URL.match(place) is not None


def check_url(key: str, place) -> None:
    """Raises:
    ValueError: it is a URL that holds a password or a token. It would be saved with the recipe.
    """
    if isinstance(place, str) and has_secret(place):
        raise RecipeError(
            f"{key} holds a password or token ({masked(place)}): give it to the file system instead, by its own "
            "environment variables or by a file in ~/.config/fsspec",
            key,
        )


def check_local(key: str, place) -> None:
    """Raises:
    ValueError: it is a URL, where only a folder will do.
    """
    if is_url(place):
        raise RecipeError(f"{key} must be a local folder, not {masked(place)}", key)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and what it calls the place.

    Raises:
        ValueError: the protocol is unknown, or its package is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        advice = f": pip install {package}" if package not in ("", "fsspec") else f": {one_line(error)}"
        raise UserError(f"{masked(url)} needs a package that is not installed{advice}") from None
    except ValueError as error:
        if protocol not in known_implementations:
            choices = "s3://, gs://, az://, hf://, https://, file:// and all others that fsspec knows"
            raise UserError(f"unknown protocol of {masked(url)}; choose among {choices}") from None
        raise UserError(f"{masked(url)} is not a valid URL: {one_line(error)}") from None
    except Exception as error:  # signing in, with some
        raise failed(url, error) from None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return masked(lines[0]) if lines else type(error).__name__


def failed(url: str, error: Exception, verb: str = "read") -> Unreachable:
    """What a file system says, which may be an exception of any kind, in one sentence."""
    if isinstance(error, PermissionError):
        return Unreachable(f"no permission to {verb} {masked(url)}: {one_line(error)}")
    return Unreachable(f"cannot {verb} {masked(url)}: {one_line(error)}")


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def is_file(url: str) -> bool:
    """Raises:
    ValueError, Unreachable: it cannot be told.
    """
    fs, path = filesystem(url)
    try:
        return fs.isfile(path)
    except Exception as error:
        raise failed(url, error) from None


def list_below(url: str) -> list[str]:
    """The names of all files below a URL, relative to it, parted by slashes; none where there is nothing.

    Raises:
        ValueError, Unreachable: it cannot be listed.
    """
    fs, path = filesystem(url)
    try:
        fs.invalidate_cache()  # others write there
        names = fs.find(path) or fs.ls(path, detail=False) and []  # `find` is silent about what it cannot list
    except FileNotFoundError:
        return []
    except Exception as error:
        raise failed(url, error) from None
    start = path.rstrip("/") + "/"
    return sorted(
        name.removeprefix(start) for name in names if name.startswith(start) and is_inside(name[len(start) :])
    )


def is_inside(name: str) -> bool:
    """Whether a relative name that somebody else gave stays below the folder that it is joined to."""
    return not any(part in ("", ".", "..") for part in name.split("/"))


@contextmanager
def open_file(place: str) -> Iterator[IO[bytes]]:
    """A local file or that of a URL, to read.

    Raises:
        ValueError, OSError: it cannot be opened.
    """
    if not is_url(place):
        with open(place, "rb") as file:
            yield file
        return
    fs, path = filesystem(place)
    try:
        file = fs.open(path, "rb")
    except Exception as error:
        raise failed(place, error) from None
    with file:
        yield file


def read_url(url: str, fs: fsspec.AbstractFileSystem | None = None) -> bytes:
    """A file. What fails is tried again: a network that is down for a second does not make a broken file.

    Args:
        url: may be a chain, `zip://a.png::https://...`.
        fs: its file system, if it is at hand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, Unreachable: it cannot be read.
    """
    fs, path = filesystem(url) if fs is None else (fs, str(fs._strip_protocol(url)))
    pauses = iter(PAUSES)
    while True:
        try:
            return fs.cat_file(path)
        except FileNotFoundError:
            raise
        except Exception as error:
            pause = None if isinstance(error, PermissionError) else next(pauses, None)
            if pause is None:
                raise failed(url, error) from None
            time.sleep(pause)


def read_files(files: list) -> list:
    """Files of a data set, {"bytes", "path"}, with the contents of those that are only URLs, read side by side; one
    that is not there stays as it is.

    Raises:
        ValueError, Unreachable: one cannot be read.
    """
    urls = [file["path"] for file in files if _is_named_only(file) and "::" not in file["path"]]
    if not urls:
        return files
    fs, _ = filesystem(urls[0])
    with ThreadPoolExecutor(min(AT_ONCE, len(urls))) as pool:
        contents = dict(zip(urls, pool.map(partial(_read_or_none, fs=fs), urls), strict=True))
    return [{**file, "bytes": contents[file["path"]]} if file["path"] in contents else file for file in files]


def _is_named_only(file) -> bool:
    return isinstance(file, dict) and file.get("bytes") is None and is_url(file.get("path"))


def _read_or_none(url: str, fs) -> bytes | None:
    try:
        return read_url(url, fs)
    except FileNotFoundError:
        return None
