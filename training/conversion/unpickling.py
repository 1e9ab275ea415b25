"""Files of torch.save that hold more than tensors: the weights are read, what else is in them is never run."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch


# Foreign types whose pickles fill a dict, by their last name; all others only get a state.
DICTS = ("CfgNode", "ConfigDict", "DictConfig", "EasyDict", "AttrDict", "defaultdict")
# Of files in torch's format from before 1.6, whose types cannot be listed before they are read.
KNOWN = ("yacs.config.CfgNode", "pathlib.PosixPath", "pathlib.WindowsPath")
# Whoever wants functions of these modules is up to something.
RUNNERS = ("builtins", "__builtin__", "os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "shutil")


class Unread:
    """What an object of a type that is not known here becomes: nothing of it is kept."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class PlainDict:
    """What a foreign dict becomes: an ordered one, which torch fills with the entries."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def unpickle(path: Path):
    """-> the content of a file of torch.save, and the names of the types of which nothing or only entries were read.

    `weights_only` of torch reads it: tensors, plain values and `argparse.Namespace`. Every other type is replaced, by
    name, by `Unread` or `PlainDict`: neither is imported, nor does anything that the file names run.

    Raises:
        ValueError: it is no such file, or asks for functions of Python itself.
    """
    try:
        foreign = foreign_types(path)
        # A namespace is attributes and nothing else: making one runs no code of the file's choice.
        allowed: list = [argparse.Namespace]
        allowed += [(PlainDict if name.endswith(DICTS) else Unread, name) for name in foreign]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True), foreign
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} is no file of torch.save that can be read: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:  # a file of another kind
        raise ValueError(f"{path.name} is no file of torch.save: {type(error).__name__}") from error


def foreign_types(path: Path) -> list[str]:
    """Full names of the types in a file that torch does not read by itself, without reading it.

    Raises:
        ValueError: functions of Python or of the system are among them.
    """
    if not zipfile.is_zipfile(path):
        return list(KNOWN)
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
    for name in sorted(names):
        if name.split(".")[0] in RUNNERS:
            raise ValueError(f"{path.name} holds {name}, which is refused: it could run code, and no weights need it")
    return sorted(names)
