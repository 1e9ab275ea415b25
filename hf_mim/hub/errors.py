"""What the Hub and its client can go wrong with, in one line that says what to do about it."""

import errno
import os
import re
import shutil

from huggingface_hub import constants, errors, get_token, scan_cache_dir

from hf_mim.modeling.foreign import OWN_CODE
from hf_mim.training.common.errors import CheckpointError, UserError
from hf_mim.training.common.sharing import masked


STORAGE = re.compile(r"(?i)[^.]*\b(storage|quota)\b[^.]*")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(UserError):
    """What was to be done on the Hub failed: no right, no network, no room, or a fault of its own.

    Attributes:
        repo: the repository.
    """

    def __init__(self, message: str, repo: str = ""):
        super().__init__(message)
        self.repo = repo


def explain(error: BaseException) -> str | None:
    """One line for an error of the Hub's client, also where another error wraps it; None for any other error. This is
    the one place that decides on texts which others wrote."""
    for inner in chain(error):
        message = explain_one(inner)
        if message is not None:
            unknown = isinstance(inner, errors.RepositoryNotFoundError) or is_unreached(inner)
            return (missing_folder(error) if unknown else "") + message
    return None


def missing_folder(error: BaseException) -> str:
    """That there is no folder either, for what could have been the name of one: the beginning of a message, or ""."""
    for outer in chain(error):
        source = outer.source if isinstance(outer, CheckpointError) else getattr(outer, "value", None)
        if isinstance(source, str) and source and "://" not in source and not os.path.exists(source):
            return f"there is no folder {source}, and "
    return ""


def is_unreached(error: BaseException) -> bool:
    """Whether the Hub gave no answer. The client's base class of what goes wrong on the way has no response."""
    on_the_way = isinstance(error, errors.HTTPError) and not hasattr(error, "response")
    return on_the_way or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)


def chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the innermost first: the client's own errors say more than what wraps them."""
    errors_found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in errors_found:
        errors_found.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return errors_found[::-1]


def explain_one(error: BaseException) -> str | None:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return disk_full(getattr(error, "filename", None))
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"this needs a token of the Hub: {LOG_IN}"
    if isinstance(error, errors.HfHubHTTPError):
        return explain_answer(error)
    if is_unreached(error):
        if constants.HF_HUB_OFFLINE:
            return f"the Hub is switched off (HF_HUB_OFFLINE=1){in_cache()}"
        return f"the Hub at {constants.ENDPOINT} cannot be reached{in_cache()}"
    if isinstance(error, ValueError) and "trust_remote_code=True" in text:
        return f"the model brings {OWN_CODE}"
    if isinstance(error, OSError) and "Can't load image processor" in text:
        name = text.partition("'")[2].partition("'")[0]
        return f"{name} has no image processor: it lacks preprocessor_config.json, which `hf-mim push` would add"
    return None


def explain_answer(error: errors.HfHubHTTPError) -> str:
    """Of an answer that the Hub gave."""
    status = getattr(error.response, "status_code", None)
    name = getattr(error, "repo_id", None) or repository_of(str(error.response.url))
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its conditions on its page, and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {name} on the Hub, or no access to it with " + token_in_use()
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such branch, tag or commit: {server_message(error)}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{name} lacks a file: {server_message(error)}"
    if status == 401:
        return f"the Hub does not accept {token_in_use()}"
    if status == 403:
        if (storage := STORAGE.search(server_message(error))) is not None:
            return f"the storage of {name} is full or refused ({storage[0]}): free some, or make the repository public"
        return f"no right to write to {name} with {token_in_use()}: the token needs write access to its owner's models"
    if status == 409:
        return f"the Hub says that it exists already: {server_message(error)}"
    if status == 429 or (status or 0) >= 500:
        return f"the Hub has a problem (status {status}); what was sent stays there: run the same command again"
    return f"the Hub refused (status {status}): {server_message(error)}"


def repository_of(url: str) -> str:
    match = re.search(r"/api/models/([^/]+/[^/?]+)", url)
    return match.group(1) if match else "the repository"


def server_message(error: errors.HfHubHTTPError) -> str:
    """What the server says, on one line, without what could be a secret in a URL."""
    message = error.server_message or str(error).strip().splitlines()[-1]
    return masked(" ".join(str(message).split()))


def token_in_use() -> str:
    if get_token() is None:
        return f"no token: {LOG_IN}"
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"


def in_cache() -> str:
    """The models that would load without the Hub."""
    try:
        names = sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except (errors.CacheNotFound, OSError):
        names = []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; in the cache: {', '.join(names[:5])}{more}" if names else "; the cache holds no model"


def disk_full(path: str | None) -> str:
    where = path or constants.HF_HUB_CACHE
    folder = where
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    free = shutil.disk_usage(folder).free / 1e6
    return f"the disk is full: {free:,.0f} MB left at {where}. HF_HOME says where downloads go"
