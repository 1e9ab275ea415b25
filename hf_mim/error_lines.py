"""What the command prints of an error."""

import os
import sys


def describe(error: Exception) -> str | None:
    """One line for what the user can do something about; None for a mistake of ours, which keeps its traceback."""
    # What the command line itself got wrong, such as an unknown option: the class of these errors moved within typer.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        return f"{usage()} See hf-mim --help"
    if "torch" in sys.modules:
        from hf_mim.training.common.resources import explain_shortage

        if (message := explain_shortage(error)) is not None:
            return message
    if "huggingface_hub" in sys.modules:
        from hf_mim.hub.errors import explain

        if (message := explain(error)) is not None:
            return message
    from hf_mim.training.common.errors import UserError

    if not isinstance(error, ValueError | OSError):  # UserError and OptionError are ValueErrors
        return None
    if isinstance(error, OSError) and is_cache(error.filename):
        return f"cannot use {error.filename}: {error.strerror}. HF_HOME says where downloads and caches go"
    if isinstance(error, UserError):  # a line already; a name in it may hold line breaks
        return str(error).replace("\n", "\\n")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_cache(path: object) -> bool:
    """Whether a path lies in the folder of Hugging Face's caches, or is where that folder cannot be made."""
    if not isinstance(path, str):
        return False
    home = os.path.abspath(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    path = os.path.abspath(path)
    common = os.path.commonpath([home, path])
    return common == home or (common == path and not os.path.isdir(path))
