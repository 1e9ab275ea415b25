"""WebDataset shards: tar archives in which the members of a sample follow one another and have one name up to its first
dot. One rule says what is read:

- image, and further columns of images such as masks: the members that end like an image or `.npy`. A sample is looked
  for by what stands between the first and the last dot, so that `.jpg` in one and `.png` in another are one column.
- labels: `.cls` and other members of text, by their ending, and the single values in a `.json`, by their key.
- a sample without its image is a bad image; samples whose members would be merged or lost are refused.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from hf_mim.training.data import urls
from hf_mim.training.data.files import ARRAYS, EXTENSIONS, is_hidden
from hf_mim.training.data.shards import UnreadableShard, opening


PEEK = 100  # samples from which the columns are found
TEXTS = ("cls", "cls2", "id", "index", "inx", "text", "txt", "transcript", "label", "class")


class BadTar(UnreadableShard):
    """An archive whose samples would be merged or lost."""


@dataclass(frozen=True)
class Members:
    """Which members of a sample are read.

    Args:
        images: (column, prefix or None, ending or None): the member of an image, by what comes before its last dot, or
            by its whole ending where several have the same prefix.
        texts: (column, ending, key in a JSON object or None).
    """

    images: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str, str | None], ...]
    exact: bool

    def features(self) -> datasets.Features:
        images = dict.fromkeys((column for column, _ in self.images), datasets.Image(decode=False))
        return datasets.Features(images | {column: datasets.Value("string") for column, _, _ in self.texts})

    def row(self, file: str, key: str, sample: dict[str, bytes]) -> dict:
        """
        Raises:
            BadTar: the sample holds images that have no column: two samples of one name, most likely.
        """
        row: dict = {}
        found = {ending if self.exact else prefix_of(ending): ending for ending in sample if is_image(ending)}
        others = [ending for name, ending in found.items() if name not in dict(self.images).values()]
        if others:
            raise BadTar(merged(file, key, others))
        for column, name in self.images:
            where = f"{key}.{found[name]}" if name in found else f"{key}.{column} (missing)"
            row[column] = {"path": f"{where} in {file}", "bytes": sample[found[name]] if name in found else b""}
        for column, ending, json_key in self.texts:
            row[column] = _text(sample[ending], json_key) if ending in sample else None
        return row


def open_tars(files: list[str], streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """The samples of shards. What is not streamed is copied into the cache of `datasets`.

    Raises:
        BadTar: samples would be merged or lost.
        DataError, OSError: one cannot be read.
    """
    with opening(files[0], "webdataset"):
        members = choose_members(files[0])
        arguments = {"files": files, "members": members}
        if streaming:
            return datasets.IterableDataset.from_generator(make_rows, members.features(), gen_kwargs=arguments)
        stamps = tuple(_stamp(file) for file in files)  # of a copy in the cache that may be older
        arguments |= {"stamps": stamps}
        return datasets.Dataset.from_generator(make_rows, members.features(), gen_kwargs=arguments)


def make_rows(files: list[str], members: Members, stamps: tuple = ()) -> Iterator[dict]:
    """{column: {"path", "bytes"} or text} for each sample."""
    for file in files:
        for key, sample in read_samples(file):
            yield members.row(file, key, sample)


def read_samples(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {ending: content}) for each sample of an archive, endings in lower case.

    Raises:
        BadTar: members of a sample lie apart, or two have the same name.
        OSError, tarfile.TarError: it cannot be read.
    """
    key, sample, finished = None, dict[str, bytes](), set[str]()
    with urls.open_file(file) as opened, tarfile.open(fileobj=opened, mode="r|*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if not member.isfile() or is_hidden(name):
                continue
            folder, slash, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            ending, this = ending.lower(), folder + slash + stem
            if this != key:
                if key is not None:
                    yield key, sample
                    finished.add(key)
                if this in finished:
                    raise BadTar(
                        f"the members of sample {this!r} lie apart in {file}: {name} comes after other samples. Write "
                        "those of a sample one after another, as tar --sort=name does"
                    )
                key, sample = this, {}
            if ending in sample:
                raise BadTar(f"{file} holds {name} twice: of the two samples one would be lost. Give them other names")
            content = archive.extractfile(member)
            sample[ending] = content.read() if content is not None else b""
    if key is not None:
        yield key, sample


def choose_members(file: str) -> Members:
    """The columns of an archive, from its first samples.

    Raises:
        BadTar: no sample has an image, or several samples have one name.
    """
    samples = [sample for _, sample in zip(range(PEEK), read_samples(file))]
    images = [[ending for ending in sample if is_image(ending)] for _, sample in samples]
    first = next(filter(None, images), None)
    if first is None:
        raise BadTar(f"there is no image in {file}: its members end in {', '.join(_endings(samples)) or 'nothing'}")
    counts = Counter(ending for endings in images for ending in endings)
    for (key, _), endings in zip(samples, images):
        if sum(counts[ending] == 1 and "." in ending for ending in endings) > 1:
            raise BadTar(merged(file, key, endings))
    exact = len(set(map(prefix_of, first))) < len(first)
    columns = tuple((ending, ending if exact else prefix_of(ending)) for ending in first)
    texts: dict[str, tuple[str, str | None]] = {}
    for _, sample in samples:
        for ending, content in sample.items():
            if ending in TEXTS:
                texts.setdefault(ending, (ending, None))
            elif ending == "json":
                texts = {key: (ending, key) for key in _json(content)} | texts
    taken = dict(columns)
    return Members(columns, tuple((c, *where) for c, where in texts.items() if c not in taken), exact)


def merged(file: str, key: str, endings: list[str]) -> str:
    names = f"{key}.{endings[0]} and {key}.{endings[-1]}" if len(endings) > 1 else f"{key}.{endings[0]}"
    return (
        f"{file}: {names} would be members of one sample, because its name ends at the first dot. Name them without "
        "further dots, such as 0001.jpg, and let all samples have the same members"
    )


def is_image(ending: str) -> bool:
    return os.path.splitext(f"x.{ending}")[1] in EXTENSIONS | ARRAYS


def prefix_of(ending: str) -> str:
    """mask.png -> mask; png -> nothing."""
    return ending.rpartition(".")[0]


def _endings(samples: list) -> list[str]:
    return sorted({f".{ending}" for _, sample in samples for ending in sample})


def _text(content: bytes, json_key: str | None) -> str | None:
    if json_key is None:
        return content.decode("utf-8", "replace").strip()
    return _json(content).get(json_key)


def _json(content: bytes) -> dict[str, str | None]:
    """The single values of an object, as text."""
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        str(key): None if value is None else str(value)
        for key, value in values.items()
        if isinstance(value, str | int | float | bool | None)
    }


def _stamp(file: str) -> tuple:
    if urls.is_url(file):
        fs, path = urls.filesystem(file)
        return (file, str(fs.info(path)))
    status = Path(file).stat()
    return (file, status.st_size, status.st_mtime_ns)
