"""What may leave this machine: secrets in URLs and under telling names, and paths that only mean something here."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from hf_mim.training.common.errors import FolderError, RecipeError


# Parts of names, parted by `_`, `-`, `.` or a capital: `hub_token`, `AWSAccessKeyId`, `X-Amz-Signature`.
SECRET = re.compile(
    r"(^|_)(token|secret|passw(or)?d|passwd|password|pwd|pass|signature|sig|sas|jwt|bearer|credentials?|auth"
    r"|authorization|cookie|(api|access|account|private|secret|shared)_?key(_?id)?|key)($|_)"
)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_secret_name(name: str) -> bool:
    """Whether a key of a recipe or a parameter of a URL is called like what opens something."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-. ]", "_", str(name)).lower()
    return SECRET.search(parted) is not None


def has_secret(text: str) -> bool:
    """Whether a URL in the text, or one chained to it by `::`, holds user info with a password, or a parameter that is
    called like a secret."""
    return any(address_has_secret(address) for chain in ADDRESS.findall(text) for address in chain.split("::"))


def address_has_secret(address: str) -> bool:
    parts = urlsplit(address)
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in unquote(user) or parts.scheme in ("http", "https")):
        return True
    parameters = [
        name
        for part in (parts.query, parts.fragment)
        for name, _ in parse_qsl(part.replace(";", "&").replace("?", "&"), keep_blank_values=True)
    ]
    return any(map(is_secret_name, parameters))


def masked(text: str) -> str:
    """A text without what could be a secret in its URLs: user info, queries and fragments."""
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(://[^\s?#]*[?#])[^\s'\")]+", r"\1***", text)


def check_secrets(values: Mapping[str, object], where: str = "") -> None:
    """Refuses what would be saved with a recipe and pushed.

    Raises:
        RecipeError: a key anywhere in it is called like a secret and holds text, or a URL in it holds one.
    """
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        entries = value if isinstance(value, list | tuple) else [value]
        for entry in entries:
            if isinstance(entry, dict):
                check_secrets(entry, name)
            elif isinstance(entry, str) and entry and is_secret_name(key):
                raise RecipeError(f"{name} is refused: it would be saved with the recipe. Use the environment", name)
            elif isinstance(entry, str) and has_secret(entry):
                message = f"{name} holds a password or token ({masked(entry)}), which would be saved with the recipe"
                raise RecipeError(f"{message}: use the file system's own environment variables", name)


def shareable(value):
    """A value of a recipe or of JSON as it may be published: no secrets, and of local paths only the last name."""
    if isinstance(value, dict):
        # The command as typed on this machine; the settings are beside it.
        kept = {key: inner for key, inner in value.items() if key != "command" and not is_secret_entry(key, inner)}
        return {key: shareable(inner) for key, inner in kept.items()}
    if isinstance(value, list | tuple):
        return [shareable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if is_local(value):
        return Path(value.partition("?")[0].partition("#")[0]).name
    return masked(value) if has_secret(value) else value


def is_secret_entry(key, value) -> bool:
    """Numbers and switches under such a name (`num_register_tokens`, `token_accuracy`) are none."""
    texts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(text, str) for text in texts) and is_secret_name(key)


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine or in somebody's bucket, and not an id on the Hub, which has one `/` or
    none, or a page on the web."""
    if re.match(r"(?!https?:)[A-Za-z][A-Za-z0-9+.-]+:(:|//)\S+$", text):
        return True
    if text.startswith(("/", "./", "../", "~/")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    return "/" in text and " " not in text and "://" not in text and (text.count("/") > 1 or Path(text).exists())


def file_inside(folder: Path, name: str) -> Path | None:
    """A file of a folder that is about to be published; None where there is none.

    Raises:
        FolderError: it is a symbolic link out of the folder: nobody who shares a folder means to share another.
    """
    path = folder / name
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        message = f"{path} is a symbolic link out of {folder}, which is not followed: nothing was sent. Copy the file"
        raise FolderError(message, str(folder))
    return path
