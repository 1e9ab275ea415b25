#!/usr/bin/env python
"""Make the data set that ships with hf_mim: a class-balanced subset of Fashion-MNIST, lossless.

    sudo apt install dataset-fashion-mnist
    python hf_mim/data/make_fashion_mnist.py

Writes train.parquet (2,000 images per class) and test.parquet (300 per class), each drawn from the official split of
that name and shuffled. The same versions of numpy, Pillow and pyarrow give the same files, byte for byte; other
versions may compress differently, but choose the same images in the same order.
"""

import argparse
import gzip
import io
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage


SOURCE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
OUT = Path(__file__).resolve().parent / "fashion_mnist"
SEED = 0
# split -> (prefix of the official files, images per class)
SPLITS = {"train": ("train", 2000), "test": ("t10k", 300)}
# The official names, in the order of the labels.
NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=NAMES)})


class SourceError(Exception):
    """The official files are absent or are not what they should be."""


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes: two zeros, type 8, number of dimensions, sizes, then the values."""
    if not path.is_file():
        raise SourceError(
            f"{path} not found: install Debian's package dataset-fashion-mnist, or give the folder "
            f"that holds the four official .gz files with --source"
        )
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SourceError(f"{path} is not an IDX file of unsigned bytes")
    sizes = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def read_split(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns an official split, whole: images (n, 28, 28) and labels (n,)."""
    prefix, _ = SPLITS[split]
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise SourceError(f"{split}: {images.shape} images do not go with {labels.shape} labels")
    return images, labels


def choose(labels: np.ndarray, per_class: int, seed: int = SEED) -> np.ndarray:
    """Returns the positions of `per_class` images of each class, in mixed order."""
    # RandomState, and not default_rng: numpy promises never to change its stream.
    rng = np.random.RandomState(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(len(NAMES))]
    if any(len(positions) < per_class for positions in chosen):
        raise SourceError(f"fewer than {per_class} images in one of the classes")
    return rng.permutation(np.concatenate(chosen))


def to_png(pixels: np.ndarray) -> bytes:
    """Returns the image as the smallest PNG that Pillow makes."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def to_table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Returns the rows as `datasets` stores them; the features travel in the schema's metadata."""
    encoded = [{"bytes": to_png(image), "path": None} for image in images]
    return pa.table({"image": encoded, "label": labels.astype(np.int64)}, schema=FEATURES.arrow_schema)


def write(table: pa.Table, path: Path) -> None:
    """Writes the table in row groups small enough to stream and to shuffle."""
    # No dictionary: no two images are alike. PNG headers are, which is what zstd finds.
    pq.write_table(table, path, row_group_size=1000, compression="zstd", compression_level=19, use_dictionary=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the Fashion-MNIST subset that ships with hf_mim.")
    parser.add_argument(
        "--source", type=Path, default=SOURCE, help="folder of the four official .gz files (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder for the parquet files (default: beside this script)"
    )
    arguments = parser.parse_args(argv)
    try:
        for split, (_, per_class) in SPLITS.items():
            images, labels = read_split(arguments.source, split)
            rows = choose(labels, per_class)
            arguments.out.mkdir(parents=True, exist_ok=True)
            path = arguments.out / f"{split}.parquet"
            write(to_table(images[rows], labels[rows]), path)
            print(f"{path}: {len(rows):,} images, {path.stat().st_size:,} bytes")
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
