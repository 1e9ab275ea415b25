"""The tables of options in the documentation: the keys are those of the dataclasses, and so are the plain defaults."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_mim.analysis.run import AnalyzeArguments
from hf_mim.training.commands.dense import DenseArguments
from hf_mim.training.commands.probe_setup import ProbeArguments
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.finetune_arguments import FinetuneArguments


DOCS = Path(__file__).parent.parent / "docs"
# page, first cell of the table's head -> dataclass
TABLES = {
    ("data.md", "key"): DataArguments,
    ("training.md", "key"): MIMTrainingArguments,
    ("finetuning.md", "`finetune.`"): FinetuneArguments,
    ("probing.md", "`probe.`"): ProbeArguments,
    ("analysis.md", "`analyze.`"): AnalyzeArguments,
}


def rows_of(page: str, head: str) -> list[tuple[list[str], str]]:
    """(keys, default) of each row of the table whose head begins so."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(rf"\| {re.escape(head)} \| default ", line))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, default = line.split(" | ")[:2]
        rows.append((re.findall(r"`([a-z_]+)`", first), default.strip()))
    return rows


def own_fields(cls) -> dict[str, dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = dataclasses.fields(cls)
    return {field.name: field for field in fields if cls is not MIMTrainingArguments or field.name not in inherited}


@pytest.mark.parametrize("place", TABLES, ids=lambda place: place[0])
def test_the_keys_of_a_table_are_those_of_the_dataclass(place):
    cls, rows = TABLES[place], rows_of(*place)
    keys = [key for keys, _ in rows for key in keys]
    assert len(keys) == len(set(keys))
    known = {field.name for field in dataclasses.fields(cls)}
    assert set(keys) <= known, f"documented, but unknown: {sorted(set(keys) - known)}"
    text = " ".join(page.read_text() for page in DOCS.glob("*.md"))
    elsewhere = {name for name in own_fields(cls) if re.search(rf"[a-z]\.{name}\b|\b{name}=", text)}
    missing = set(own_fields(cls)) - set(keys) - elsewhere
    assert not missing, f"not documented: {sorted(missing)}"


@pytest.mark.parametrize("place", TABLES, ids=lambda place: place[0])
def test_plain_defaults_are_those_of_the_dataclass(place):
    fields, checked = {field.name: field for field in dataclasses.fields(TABLES[place])}, 0
    for keys, default in rows_of(*place):
        written = default.replace("`", "").split(", ")
        if len(written) != len(keys):
            written = [default.replace(",", "")] if len(keys) == 1 else []
        for key, text in zip(keys, written):
            value = yaml.safe_load(text) if re.fullmatch(r"[\d.e-]+|true|false|null", text) else None
            value = float(text) if re.fullmatch(r"\d.*e-\d+", text) else value
            if value is not None:
                checked += 1
                # null in the dataclass: the value is decided later, by the model or its checkpoint
                assert fields[key].default in (value, None), (key, text, fields[key].default)
    assert checked >= 2


def test_the_options_of_dense_probing_are_documented():
    text = (DOCS / "segmentation.md").read_text()
    missing = [
        field.name
        for field in dataclasses.fields(DenseArguments)
        if not re.search(rf"probe\.{field.name}\b|\b{field.name}=", text)
    ]
    assert not missing
