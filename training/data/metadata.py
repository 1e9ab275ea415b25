"""`metadata.csv`, `.jsonl` and `.parquet` of `datasets`' image folders: a table with a row for each image beside it."""

import csv
import io
import itertools
import json
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field

import datasets
import pyarrow
import pyarrow.parquet

from hf_mim.training.common.errors import DataError
from hf_mim.training.data import urls
from hf_mim.training.data.decoding import read_file
from hf_mim.training.data.files import ARRAYS, EXTENSIONS


# The column that names the image, relative to the table. `mask_file_name` names another image or array, which becomes a
# column `mask` and is no image of its own; columns that name files of other types stay text.
FILE_NAME = "file_name"


@dataclass
class Metadata:
    """What tables say of images.

    Args:
        rows: by file, its values by column.
        companions: files that belong to images, as masks do.
        companion_columns: that name them.
        notes: which rows could not be used, for people.
    """

    rows: dict[str, dict] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)
    companion_columns: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def columns(self, files: list[str]) -> dict[str, tuple[list, object]]:
        """{column: (a value for each file, feature)}; None for files that no table names. Of numbers and truth values
        the type stays; what is mixed becomes text, and lists are left out."""
        rows = [self.rows.get(file, {}) for file in files]
        found = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            if name in self.companion_columns:
                found[name.removesuffix(f"_{FILE_NAME}")] = values, datasets.Image(decode=False)
            elif (feature := _feature(values)) is not None:
                text = feature == datasets.Value("string")
                found[name] = [str(v) if text and v is not None else v for v in values], feature
        return found


def read_metadata(tables: Iterable[str], files: list[str]) -> Metadata:
    """Reads the tables of a folder.

    Args:
        tables: see `files.TABLES`.
        files: the images.

    Raises:
        DataError, OSError: one cannot be read, or says two things of one image.
    """
    metadata, known = Metadata(), set(files)
    rows_of = {table: _read_rows(table) for table in tables}
    metadata.companion_columns = {
        column
        for row in itertools.chain.from_iterable(rows_of.values())
        for column, value in row.items()
        if str(column).endswith(f"_{FILE_NAME}") and os.path.splitext(str(value))[1].lower() in EXTENSIONS | ARRAYS
    }
    for table, rows in rows_of.items():
        missing = lost = 0
        if rows and not any(FILE_NAME in row for row in rows):
            columns = ", ".join(map(str, rows[0]))
            metadata.notes.append(f"{table} is not used: it has no column {FILE_NAME}; its columns are {columns}")
            continue
        for row in rows:
            file = _beside(table, row.pop(FILE_NAME, None))
            for column in metadata.companion_columns & row.keys():
                companion = _beside(table, row[column])
                lost += companion is not None and companion not in known
                row[column] = companion if companion in known else None
                metadata.companions |= {row[column]} - {None}
            if file not in known:
                missing += 1
            elif metadata.rows.setdefault(file, row) != row:
                raise DataError(f"{table} has two rows of different values for {file}", table)
        if missing:
            metadata.notes.append(f"{missing:,} of {len(rows):,} rows of {table} name no image that is there")
        if lost:
            metadata.notes.append(f"{lost:,} masks or other files that {table} names are no images that are there")
    metadata.companions -= metadata.rows.keys()
    return metadata


def _read_rows(table: str) -> list[dict]:
    try:
        if table.endswith(".parquet"):
            return pyarrow.parquet.read_table(io.BytesIO(read_file(table))).to_pylist()
        text = read_file(table).decode("utf-8-sig")
        if table.endswith(".csv"):
            rows = [{k: v for k, v in row.items() if k is not None} for row in csv.DictReader(io.StringIO(text))]
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {table}: {error}".partition("\n")[0], table) from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'cannot read {table}: every line must be an object like {{"{FILE_NAME}": "a.png"}}', table)
    return rows


def _beside(table: str, name) -> str | None:
    """The file that a table names, of which `./` and `../` are resolved."""
    folder = table.rpartition("/")[0]
    if not name:
        return None
    return f"{folder}/{name}" if urls.is_url(table) else posixpath.normpath(f"{folder}/{name}")


def _feature(values: list) -> datasets.Value | None:
    kinds = {type(value) for value in values if value is not None}
    if not kinds or not kinds <= {bool, int, float, str}:
        return None
    if kinds == {bool}:
        return datasets.Value("bool")
    if kinds == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return datasets.Value("int64")
    return datasets.Value("float64" if kinds <= {int, float} else "string")
