"""What says whether two runs have seen the same images: their number, and digests of some of them."""

import hashlib
from collections.abc import Sized
from pathlib import Path
from typing import Any

from hf_mim.training.data import urls
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pairs import Pairs
from hf_mim.training.data.segmentation import MaskedDataset
from hf_mim.training.data.streaming import StreamedImages


SAMPLE = 64  # images whose files are looked at, evenly spread
READ = 2**16  # bytes of each


def fingerprint(dataset: Any) -> dict[str, Any]:
    """{"images" or "shards": their number, "sample": one digest of names and first bytes}, as far as a data set has
    such; the same wherever it lies."""
    if isinstance(dataset, StreamedImages):
        names = [Path(dataset.shards.name(index)).name for index in _spread(dataset.shards.count)]
        return {"shards": dataset.shards.count, "sample": _digest(name.encode() for name in names)}
    if not isinstance(dataset, Sized):
        return {}
    rows: Any = None
    columns: tuple[str, ...] = ()
    if isinstance(dataset, MIMDataset):
        rows, columns = dataset.files, (dataset.image_column,)
    elif isinstance(dataset, MaskedDataset) and isinstance(dataset.source, Pairs):
        rows, columns = dataset.source.dataset, dataset.source.columns
    if rows is None:
        return {"images": len(dataset)}
    sample = (_first_bytes(rows[index][column]) for index in _spread(len(rows)) for column in columns)
    return {"images": len(dataset), "sample": _digest(sample)}


def _spread(count: int) -> list[int]:
    return sorted({index * count // SAMPLE for index in range(SAMPLE)}) if count else []


def _first_bytes(file: Any) -> bytes:
    """The name of a file and its first bytes; of one at a URL the name, of another value what it looks like."""
    if not isinstance(file, dict):
        return repr(file).encode(errors="replace")[:READ]
    place, content = file.get("path") or "", file.get("bytes")
    if content is None and place and not urls.is_url(place):
        try:
            with open(place, "rb") as opened:
                content = opened.read(READ)
        except OSError:  # a missing file is one of the bad ones
            content = b""
    return Path(place).name.encode(errors="replace") + b"\0" + (content or b"")[:READ]


def _digest(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
