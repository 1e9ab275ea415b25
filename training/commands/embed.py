"""The command `embed`: a vector for every image of a data set, in parquet files that anything reads."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from rich.console import Console

from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.common.console import IMAGES_DONE, RunConsole
from hf_mim.training.common.device import best_device, on_device
from hf_mim.training.common.errors import FolderError, RecipeError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.sample import look_at
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.evaluation.feature_store import data_hash, weights_hash
from hf_mim.training.evaluation.features import BATCH, Features, PoolerChoice, choose_layers
from hf_mim.training.own_data import chosen_data, own_data


PART = 16 * BATCH  # rows of a file: what a crash can lose
RECORD = "embedding.json"
LIMITS = ("max_train_images", "max_eval_images", "crop_scale", "color_jitter", "cache_decoded", "crop_on_device")
# More of the section `data` that does not change a vector: which images there are, the record says in `images`.
SAME_VECTORS = (
    *LIMITS,
    *("dataset", "split", "eval_split", "extra_splits", "forgetting_dataset", "max_bad_images", "mask_column"),
    *("mask_values", "shuffle_buffer", "interpolation", "horizontal_flip", "display_bands", "memory_limit_mb"),
    *("cache_dir", "cache_size"),
)


@dataclass
class Embedder:
    """A frozen encoder and what makes one vector of its tokens."""

    model: MIMModel
    features: Features

    @classmethod
    def load(cls, source: str, pooler: str, layer: int) -> "Embedder":
        """Raises:
        CheckpointError: there is no encoder.
        RecipeError: the pooler would have to be learned first.
        ValueError: there is no such pooler or layer.
        """
        model = on_device(load_encoder(source).float(), best_device())
        choice = PoolerChoice(pooler, pooler, {})
        if sum(parameter.numel() for parameter in choice.make(model).parameters()) > 1:
            message = (
                f"pooler {pooler} has weights that nothing has trained here: take one without, such as mean or cls"
            )
            raise RecipeError(message, "pooler")
        attention = choice.make(model).needs_attentions
        layers = choose_layers(model.encoder, [layer], attention)
        return cls(model, Features(model, layers, [choice], attention))

    def __call__(self, pixel_values: torch.Tensor) -> np.ndarray:
        """(batch, channels, height, width) -> (batch, dim), float32."""
        (vectors,) = self.features(pixel_values).values()
        return vectors.float().cpu().numpy()


def embed(
    source: str,
    out: Path,
    overrides: Sequence[str] = (),
    pooler: str = "mean",
    layer: int = -1,
    workers: int = 0,
    console: Console | RunConsole | None = None,
) -> Path:
    """Writes `<split>-<number>.parquet` with the columns `file`, `label`, `index` and `features`, for every split, and
    `embedding.json`, which says what they are. What is there already is kept: run again after an interruption, it goes
    on. Images are decoded as they are needed, so that memory does not grow with their number.

    Args:
        source: a checkpoint of this project or a vision model of transformers: a folder, a URL or an id on the Hub.
        out: the folder.
        overrides: of the section `data`; `data.split` takes that split alone.
        pooler: one without weights.
        layer: whose tokens; -1 is the last, 0 the embedding.
        workers: processes that decode images.

    Raises:
        ValueError, OSError: the model or the data cannot be read, or `out` holds something else.
    """
    console = RunConsole(console)
    data = read_data(source, overrides, console)
    embedder = Embedder.load(source, pooler, layer)
    splits, data = open_splits(data, embedder.model)
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        write_record(out, describe(source, embedder, pooler, layer, splits, data))
        with console.progress(IMAGES_DONE) as bar:
            task = bar.add_task("embedding", total=sum(map(len, splits.values())))
            advance = partial(bar.advance, task)
            for name, split in splits.items():
                write_split(out, name, split, embedder, workers, advance)
    if (bad := sum((split.bad_images() for split in splits.values()), BadImageReport())).count:
        console.warn(str(bad))
    console.log(f"{sum(map(count_rows, out.glob('*.parquet'))):,} vectors in {out}")
    return out


def read_data(source: str, overrides: Sequence[str], console: RunConsole) -> DataArguments:
    """The section `data`: that of the run that the model comes from, with what the user says."""
    base = {"data": own_data([source], chosen_data(overrides), console)}
    (data,) = recipes.read_sections(overrides, base, data=DataArguments)
    if data.streaming:
        raise RecipeError("embed needs data with a length: set data.streaming=false", "data.streaming")
    if ignored := sorted(set(LIMITS) & set(chosen_data(overrides))):
        names = ", ".join(f"data.{name}" for name in ignored)
        console.warn(f"without effect: {names}; embed takes every image of a split, whole")
    return data


def open_splits(data: DataArguments, model: MIMModel) -> tuple[dict[str, MIMDataset], DataArguments]:
    """The splits by name, whole images undecoded, and `data` with the numbers that `value_range=auto` stands for."""
    opened = open_dataset(data)
    if data.split is not None and data.split not in opened:
        raise RecipeError(f"there is no split {data.split!r}; choose from {', '.join(opened)}", "data.split")
    names = [data.split] if data.split is not None else list(opened)
    _, data = look_at(opened[names[0]], model.config, data)
    whole = replace(data, memory_limit_mb=0, crop_scale=None, color_jitter=0.0, cache_decoded=False)
    whole = replace(whole, crop_on_device=False)
    return {name: MIMDataset(opened[name], model.config, whole, train=False) for name in names}, data


# ---- what they are -------------------------------------------------------------------------------------------------
def describe(source: str, embedder: Embedder, pooler: str, layer: int, splits: dict[str, MIMDataset], data) -> dict:
    if data.dataset is not None:
        data = replace(data, dataset=from_anywhere(data.dataset))
    return {
        "model": from_anywhere(source),
        "weights": weights_hash(embedder.model),
        "pooler": pooler,
        "layer": layer,
        "data": {key: value for key, value in asdict(data).items() if value != getattr(DataArguments(), key)},
        "images": {name: data_hash(split) for name, split in splits.items()},
    }


def from_anywhere(source: str) -> str:
    """A path as it is read from every folder; URLs and ids of the Hub stay."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def write_record(out: Path, record: dict) -> None:
    """Raises:
    FolderError: the folder holds vectors of other weights, images or settings.
    """
    path, record = out / RECORD, json.loads(json.dumps(record))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in ("weights", "pooler", "layer", "images") if before.get(key) != record[key]]
        then, now = before.get("data", {}), record["data"]
        keys = sorted((then.keys() | now.keys()) - set(SAME_VECTORS))
        differing += [f"data.{key}" for key in keys if then.get(key) != now.get(key)]
        if differing:
            message = f"{out} holds vectors of other {differing[0]}: choose another folder, or remove that one"
            raise FolderError(message, str(out))
    elif stray := next(out.glob("*.parquet"), None):
        raise FolderError(f"{out} holds {stray.name}, which embed did not write: choose another folder", str(out))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_record(out: Path) -> dict:
    """Raises:
    FolderError: the folder holds none.
    """
    try:
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{out} holds no {RECORD}: make the folder with hf-mim embed MODEL {out} data.dataset=..."
        raise FolderError(message, str(out)) from error


def count_rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows


# ---- writing -------------------------------------------------------------------------------------------------------
def write_split(out: Path, name: str, images: MIMDataset, embedder: Embedder, workers: int, advance) -> None:
    """Writes the parts that are missing, each at once or not at all."""
    for number, start in enumerate(range(0, len(images), PART)):
        path, end = out / f"{name}-{number:05d}.parquet", min(start + PART, len(images))
        if not path.is_file():
            table = embed_rows(images, range(start, end), embedder, workers)
            unfinished = path.with_suffix(".unfinished")
            pq.write_table(table, unfinished)
            os.replace(unfinished, path)
        advance(end - start)


def embed_rows(images: MIMDataset, rows: range, embedder: Embedder, workers: int) -> pa.Table:
    """One part. Of an image that cannot be decoded there is no row."""
    subset = torch.utils.data.Subset(images, list(rows))
    collate = MIMCollator(embedder.model.config)
    loader = torch.utils.data.DataLoader(subset, BATCH, collate_fn=collate, num_workers=workers)
    vectors = np.concatenate([embedder(batch["pixel_values"]) for batch in loader])
    good = np.flatnonzero(~images.bad.flags[list(rows)].numpy())
    chosen = [rows[position] for position in good]
    labels: list = [None] * len(chosen)
    if images.labels is not None:
        labels = [images.classes[label] if label >= 0 else None for label in images.labels[chosen].tolist()]
    values = pa.array(vectors[good].ravel(), pa.float32())
    return pa.table(
        {
            "file": pa.array(list(file_names(images, chosen)), pa.string()),
            "label": pa.array(labels, pa.string()),
            "index": pa.array(chosen, pa.int64()),
            "features": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1]),
        }
    )


def file_names(images: MIMDataset, rows: list[int]) -> Iterator[str | None]:
    """The files that images lie in; None of those that a table holds without a name."""
    paths = images.files.select(rows).cast_column(images.image_column, datasets.Image(decode=False))
    for row in paths:
        file = row[images.image_column]
        yield file.get("path") if isinstance(file, dict) else None
