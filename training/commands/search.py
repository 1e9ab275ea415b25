"""The command `search`: the images of a data set that are most like one, by the vectors of `embed`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.modeling.resizing import fit_whole
from hf_mim.training.commands.embed import Embedder, open_splits, read_record
from hf_mim.training.commands.reconstruct import check_picture
from hf_mim.training.common.console import RunConsole, make_table
from hf_mim.training.common.errors import DataError, FolderError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import ImageBatch, MIMCollator
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.transforms import sample_rng
from hf_mim.training.evaluation.feature_store import weights_hash
from hf_mim.training.plots.grid import draw_grid
from hf_mim.training.plots.pictures import to_tiles


ROWS = 4096  # read at once


@dataclass
class Neighbour:
    """An image that is like another one.

    Attributes:
        similarity: the cosine of the angle between the vectors, at most 1.
    """

    similarity: float
    split: str
    index: int
    file: str | None
    label: str | None

    @property
    def name(self) -> str:
        """Its file and folder, which is often the class; a row that has no file by its number."""
        return "/".join(Path(self.file).parts[-2:]) if self.file else f"{self.split} {self.index}"


def search(
    folder: Path,
    image: Path,
    out: Path,
    count: int = 8,
    force: bool = False,
    console: Console | RunConsole | None = None,
) -> list[Neighbour]:
    """Writes a picture of the nearest images, beside the one they are near to, and prints them.

    Args:
        folder: that `embed` wrote.
        image: any file that training reads.
        out: the picture; its ending says the format.
        count: how many.
        force: replace a file that is there already.

    Raises:
        FolderError: `folder` was not written by `embed`, or by other weights than the model's now; or `out` exists.
        DataError: the image, or the data set that was embedded, cannot be read.
    """
    console = RunConsole(console)
    if not image.is_file():
        raise DataError(f"there is no image {image}", str(image))
    check_picture(out, force)
    record = read_record(folder)
    embedder = Embedder.load(record["model"], record["pooler"], record["layer"])
    if weights_hash(embedder.model) != record["weights"]:
        raise FolderError(f"{record['model']} has other weights than those of {folder}: embed again", str(folder))
    data = DataArguments(**record["data"])
    splits, _ = open_splits(data, embedder.model)
    pixels = read_pixels(image, embedder, data)
    (query,) = embedder(MIMCollator(embedder.model.config)([ImageBatch(pixels, [sample_rng(0, 0, 0)])])["pixel_values"])
    nearest = find_nearest(folder, query, count)
    rows = [(one.name, one.label or "", f"{one.similarity:.3f}") for one in nearest]
    console.show(make_table(("image", "label", "similarity"), rows))
    draw(pixels, image.name, nearest, splits, embedder.model.config).save(out)
    console.log(str(out))
    return nearest


def read_pixels(image: Path, embedder: Embedder, data: DataArguments) -> torch.Tensor:
    """(1, channels, height, width), uint8, of the size that the model sees."""
    config = embedder.model.config
    pixels = torch.from_numpy(Decoder(config, data)(str(image)))[None]
    return fit_whole(pixels, pair(config.image_size), config.eval_crop if data.eval_crop is None else data.eval_crop)


def find_nearest(folder: Path, query: np.ndarray, count: int) -> list[Neighbour]:
    """The `count` nearest by cosine similarity, the nearest first; of equal ones the first in the folder.

    Raises:
        FolderError: it holds no vectors, or of another length.
    """
    nearest: list[Neighbour] = []
    for split, rows in read_parts(folder):
        vectors = rows["features"]
        if vectors.shape[1] != len(query):
            raise FolderError(f"{folder} holds vectors of {vectors.shape[1]} values, not {len(query)}", str(folder))
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
        similarity = vectors @ query / np.maximum(lengths, 1e-12)
        for row in np.argsort(-similarity, kind="stable")[:count]:
            place = (split, rows["index"][row], rows["file"][row], rows["label"][row])
            nearest.append(Neighbour(float(similarity[row]), *place))
        nearest = sorted(nearest, key=lambda one: -one.similarity)[:count]
    if not nearest:
        raise FolderError(f"{folder} holds no vectors", str(folder))
    return nearest


def read_parts(folder: Path) -> Iterator[tuple[str, dict]]:
    """The split and the columns of some rows at a time: `features` (rows, dim), the others lists."""
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            columns = {name: batch.column(name).to_pylist() for name in ("file", "label", "index")}
            vectors = batch.column("features").flatten().to_numpy().reshape(len(batch), -1)
            yield path.stem.rpartition("-")[0], {**columns, "features": vectors}


def draw(pixels: torch.Tensor, name: str, nearest: list[Neighbour], splits: dict[str, MIMDataset], config: MIMConfig):
    """The image and those that are near it, as the model sees them."""
    bands = config.display_bands or ([0, 1, 2] if pixels.shape[1] >= 3 else [0])
    images = {f"searched: {name}": pixels}
    for rank, neighbour in enumerate(nearest, start=1):
        parts = (f"{rank}: {neighbour.name}", neighbour.label, f"{neighbour.similarity:.2f}")
        images[", ".join(filter(None, parts))] = splits[neighbour.split].__getitems__([neighbour.index])[0].images
    tiles = {caption: to_tiles(image[:, list(bands)] / 255) for caption, image in images.items()}
    return draw_grid(tiles, blocks=1)
