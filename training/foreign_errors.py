"""What can only be told from the text of an exception of another library: all such decisions are here, and
tests/test_foreign_errors.py makes each library raise its own."""


def mismatch_reason(error: RuntimeError) -> str:
    """The line that names the first weight of another shape, of torch's `load_state_dict` or of transformers'
    `from_pretrained`; the first line of any other error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "mismatch" in line.lower()), lines[0] if lines else type(error).__name__)


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether torch's DataLoader has lost a worker process."""
    return "DataLoader worker" in str(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether gloo misses another process: its errors are plain ones that begin with the file they come from."""
    return isinstance(error, RuntimeError) and "/gloo/" in str(error)


def is_torch_write_error(error: BaseException) -> bool:
    """Whether torch could not write a file: it has no exception of its own for that."""
    return isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
