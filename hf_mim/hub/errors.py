"""What the Hub and its client can go wrong with, in one line that says what to do about it."""

import errno
import os
import re
import shutil

from huggingface_hub import constants, errors, get_token, scan_cache_dir


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def explain(error: BaseException) -> str | None:
    """One line for an error of the Hub's client, also where another error wraps it; None for any other error."""
    for found in chain(error):
        message = explain_one(found)
        if message is not None:
            return message
    return None


def chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the innermost first: the client's own errors say more than what wraps them."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found[::-1]


def explain_one(error: BaseException) -> str | None:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return disk_full(getattr(error, "filename", None))
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"this needs a token of the Hub: {LOG_IN}"
    if isinstance(error, errors.HfHubHTTPError):
        return explain_answer(error)
    # The client's base class of what goes wrong on the way; an answer of the server has a response.
    on_the_way = isinstance(error, errors.HTTPError) and not hasattr(error, "response")
    if on_the_way or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return f"the Hub is switched off (HF_HUB_OFFLINE=1){in_cache()}"
        return f"the Hub at {constants.ENDPOINT} cannot be reached{in_cache()}"
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
        return f"{name} has no such branch, tag or commit: {said(error)}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{name} lacks a file: {said(error)}"
    if status == 401:
        return f"the Hub does not accept {token_in_use()}"
    if status == 403:
        return f"no right to write to {name} with {token_in_use()}: it takes a token that may, and its owner's leave"
    if status == 409:
        return f"the Hub says that it exists already: {said(error)}"
    if status == 429 or (status or 0) >= 500:
        return f"the Hub has a problem (status {status}); what it has got stays there: run the same command again"
    return f"the Hub refused (status {status}): {said(error)}"


def repository_of(url: str) -> str:
    found = re.search(r"/api/models/([^/]+/[^/?]+)", url)
    return found.group(1) if found else "the repository"


def said(error: errors.HfHubHTTPError) -> str:
    """The server's own words, on one line."""
    words = getattr(error, "server_message", None) or str(error).strip().splitlines()[-1]
    return " ".join(str(words).split())


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
