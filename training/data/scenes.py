"""Scenes for segmentation, composed from the data that ships with the package: clothes on a textured canvas."""

import numpy as np
import PIL.Image
from scipy.ndimage import binary_fill_holes, gaussian_filter

from hf_mim.modeling.options import pair, unknown_choice
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoding import decode
from hf_mim.training.data.sources import open_dataset


SIZE = (56, 56)  # pixels; a piece of clothing is 28 x 28 before it is scaled
COUNTS = {"train": 1000, "validation": 200, "test": 200}
PIECES = (3, 6)  # the fewest and the most in a scene
SCALES = (0.8, 1.2)
POOL = 3000  # images of clothes that the scenes of a split draw from
FOREGROUND = 12  # of 255: the photographs' own background is 0
LEAST_VISIBLE = 0.5  # share of a piece that later ones may not cover


class Scenes:
    """Grey scenes with masks: 0 is the canvas, 1 to 10 are the classes of Fashion-MNIST.

    A scene follows from (seed, split, index) alone. Nothing is written.

    Args:
        split: train, validation or test; only scenes of `test` show clothes of the test images.
        count: how many scenes; None is `COUNTS`.
        size: (height, width) of the canvas, pixels, each at least 28.
        num_channels: the grey picture is repeated to so many.

    Attributes:
        classes: names, by class id.

    Raises:
        ValueError: an unknown split, or a canvas too small for a piece.
    """

    def __init__(self, split: str = "train", count: int | None = None, size=SIZE, seed: int = 0, num_channels: int = 1):
        if split not in COUNTS:
            raise unknown_choice("split of the composed scenes", split, COUNTS)
        self.split, self.size, self.seed, self.num_channels = split, pair(size), seed, num_channels
        if min(self.size) < 28:
            raise DataError(f"a scene must be at least 28 pixels high and wide, not {self.size[0]}x{self.size[1]}")
        self.count = COUNTS[split] if count is None else count
        rows = open_dataset(DataArguments())["test" if split == "test" else "train"]
        first = POOL if split == "validation" else 0  # classes are balanced in any run of rows
        rows = rows.select(range(first, min(first + POOL, len(rows))))
        image_column, label_column = find_columns(rows.features, DataArguments())
        self.classes = ["canvas", *rows.features[label_column].names]
        self.labels = np.array(rows[label_column][:], dtype=np.int64)
        self.pieces = np.concatenate([decode(image, 1) for image in rows[image_column][:]])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """-> image (channels, height, width), uint8, and class ids (height, width), int64."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, list(COUNTS).index(self.split), index))
        image, mask = texture(rng, self.size), np.zeros(self.size, dtype=np.int64)
        owner = np.zeros(self.size, dtype=np.int64)  # which piece a pixel belongs to, counted from 1
        areas: list[int] = []
        for _ in range(rng.integers(PIECES[0], PIECES[1], endpoint=True)):
            chosen = rng.integers(len(self.pieces))
            piece = rescale(self.pieces[chosen], rng.uniform(*SCALES))
            piece = piece[:, ::-1] if rng.random() < 0.5 else piece
            corner = [rng.integers(side - length + 1) for side, length in zip(self.size, piece.shape)]
            place = tuple(slice(start, start + length) for start, length in zip(corner, piece.shape))
            shape = binary_fill_holes(piece > FOREGROUND)
            after = owner.copy()
            after[place][shape] = len(areas) + 1
            visible = np.bincount(after.ravel(), minlength=len(areas) + 2)[1:]
            if any(seen < LEAST_VISIBLE * area for seen, area in zip(visible, areas)):
                continue
            areas.append(int(shape.sum()))
            image[place][shape] = piece[shape]
            mask[place][shape] = self.labels[chosen] + 1
            owner = after
        return np.repeat(np.rint(image).astype(np.uint8)[None], self.num_channels, axis=0), mask

    def mask(self, index: int) -> np.ndarray:
        """The class ids (height, width) of a scene alone."""
        return self[index][1]

    def bad_images(self) -> BadImageReport:
        """None: they are composed of images that can be read."""
        return BadImageReport()


def texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A canvas (height, width), float32 in [0, 255]: smooth noise and a grating, of random scale and contrast and
    darker than most clothes."""
    height, width = size
    noise = gaussian_filter(rng.standard_normal(size), rng.uniform(0.5, 4), mode="wrap")
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(4, 16), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    grating = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + phase)
    pattern = rng.uniform(3, 15) * noise / noise.std() + rng.uniform(0, 10) * grating
    return np.clip(rng.uniform(10, 90) + pattern, 0, 255).astype(np.float32)


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """(height, width) uint8 -> float32, bilinear, of `factor` times the size."""
    size = tuple(max(1, round(side * factor)) for side in image.shape[::-1])
    return np.array(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BILINEAR), dtype=np.float32)
