"""What can only be told from the text of an exception of another library: all such decisions are here, and
tests/test_foreign_errors.py makes each library raise its own."""

import errno
import re

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_mim.modeling.options import shorten_text


def field_reason(error: StrictDataclassError) -> str:
    """What huggingface_hub finds wrong with a field of a config, without the types that it has tried one by one."""
    text = " ".join(str(error).split())
    return shorten_text(re.sub(r"^Validation error for field '\w+': \w+: ", "", text).partition(" Errors: ")[0])


def decoder_reason(error: Exception) -> str:
    """What a decoder finds wrong with a file; torchvision's put the function, file and line of its source before it."""
    text = str(error).partition("\n")[0]
    return re.sub(r"^\S[^,]*, \S+\.(cpp|cc|cu|h):\d+, ", "", text) or type(error).__name__


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether torch's DataLoader has lost a worker process."""
    return "DataLoader worker" in str(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether gloo misses another process: its errors are plain ones that begin with the file they come from."""
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def is_torch_write_error(error: BaseException) -> bool:
    """Whether torch could not write a file: it has no exception of its own for that, and does not say why."""
    marks = ("PytorchStreamWriter", "inline_container.cc", "iostream error")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def is_cpu_memory_error(error: BaseException) -> bool:
    """Whether torch was refused memory by the operating system; that of a device has a class of its own."""
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def foreign_errno(error: BaseException) -> int | None:
    """The number of the operating system's error; safetensors and torch's shared memory have it in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        return int(match[1])
    return errno.ENOSPC if isinstance(error, RuntimeError) and "No space left on device" in str(error) else None
