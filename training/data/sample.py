"""What the images of a data set hold, by a sample that is looked at once, before training: values, modes and sizes."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoding import Decoder, apply_rules, mode_of, read_image
from hf_mim.training.data.shards import DAMAGE, is_damage


COUNT = 48  # images, at most
VALUES = 2**16  # of an image that percentiles are taken of, at most
PERCENTILES = (0.1, 99.9)  # what `data.value_range=auto` makes black and white
FEW_LEVELS = 32  # of 256, below which there is a warning


@dataclass
class PixelSample:
    """What some images of a data set hold, and what becomes of it.

    Args:
        count: of the images that were looked at.
        values: how many images have values of which type: {"uint16": 48}.
        modes: what Pillow calls the kinds of files, `array` for .npy and what Pillow does not read.
        sizes: (height, width) of the images.
        low, high: of each channel, nodata left out.
        levels_before, levels: how many different values each channel has, before and after it is made 8 bits.
        clipped, missing: shares of the values that lie outside of the range, and that are `data.nodata`.
        value_range: in force; None is that of the type.
    """

    count: int = 0
    values: Counter[str] = field(default_factory=Counter)
    modes: set[str] = field(default_factory=set)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    levels_before: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    clipped: float = 0.0
    missing: float = 0.0
    value_range: Any = None

    @property
    def line(self) -> str:
        """For people, before training begins."""
        if not self.count:
            return "values: no image of the sample can be read"
        kinds = " and ".join(self.values)
        parts = [f"{kinds} from {_number(min(self.low))} to {_number(max(self.high))} in {self.count} images looked at"]
        if self.value_range is not None:
            pairs = self.value_range if hasattr(self.value_range[0], "__len__") else [self.value_range]
            shown = ", ".join(f"{_number(low)} to {_number(high)}" for low, high in pairs)
            parts.append(f"data.value_range {shown} becomes 0 to 255 ({100 * self.clipped:.2g} % clipped)")
        low, high = min(self.levels), max(self.levels)
        parts.append(f"{low if low == high else f'{low} to {high}'} of 256 levels used")
        if self.missing:
            parts.append(f"{100 * self.missing:.2g} % are data.nodata and become the mean")
        return f"values: {'; '.join(parts)}"

    @property
    def warning(self) -> str | None:
        """Where levels are lost and few are left."""
        lost = [
            (before, after) for before, after in zip(self.levels_before, self.levels) if FEW_LEVELS > after < before
        ]
        if not lost:
            return None
        before, after = min(lost, key=lambda pair: pair[1])
        return (
            f"warning: only {after} levels are left of {before:,} different values, because the images do not fill the "
            "range that they are read with: set data.value_range=auto, or to numbers such as "
            f"[{_number(min(self.low))},{_number(max(self.high))}], one pair or one per channel"
        )


def look_at(
    rows, config: MIMConfig, data: DataArguments, seed: int = 0, column: str | None = None
) -> tuple[PixelSample, DataArguments]:
    """Looks at some images, drawn at random from the seed; of a stream at the first ones.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` with an image column.
        column: its name; None finds it.

    Returns:
        what is in them, and `data` with the numbers that `value_range=auto` stands for.

    Raises:
        DataError: `auto`, and no image has values.
    """
    column = column or find_columns(rows.features, data)[0]
    images = list(_read(_draw(rows, column, seed), config, data))
    if data.value_range == "auto":
        data = replace(data, value_range=find_range([values for values, _ in images], config, data))
    decoder = Decoder(config, data)
    sample = PixelSample(len(images), value_range=config.value_range if data.value_range is None else data.value_range)
    collected: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for values, mode in images:
        try:
            pixels, _ = apply_rules(decoder.rules, values, "an image")
        except DataError:
            continue  # named where it is met
        sample.values[str(values.dtype.newbyteorder("="))] += 1
        sample.modes.add(mode)
        sample.sizes.add(tuple(values.shape[:2]))
        raw, known = _known(values, decoder)
        raw, pixels = np.broadcast_to(raw, pixels.shape), pixels
        collected.append((_thin(raw), _thin(np.broadcast_to(known, pixels.shape)), _thin(pixels)))
    sample.count = len(collected)
    if collected:
        _measure(sample, decoder, collected)
    return sample, data


def find_range(images: list[np.ndarray], config: MIMConfig, data: DataArguments) -> list:
    """What `data.value_range=auto` stands for: percentiles of the sample, one pair per channel."""
    decoder = Decoder(config, replace(data, value_range=[0, 1]))
    channels: list[list[np.ndarray]] = []
    kinds = set()
    for values in images:
        try:
            raw, known = _known(values, decoder)
        except ValueError:
            continue  # of other channels: named where it is met
        kinds.add(values.dtype.newbyteorder("="))
        raw, known = _thin(raw), _thin(known)
        channels = channels or [[] for _ in raw]
        if len(channels) == len(raw):
            for channel, each, mask in zip(channels, raw, known):
                channel.append(each[mask].astype(np.float64))
    if len(kinds) > 1:
        names = " and ".join(sorted(map(str, kinds)))
        raise DataError(f"data.value_range=auto needs files of one type, not {names} as in the sample: give numbers")
    pairs = []
    for channel in channels:
        found = np.concatenate(channel)
        if not found.size:
            raise DataError("data.value_range=auto: a channel of the sample holds no value but data.nodata")
        low, high = np.percentile(found, PERCENTILES)
        if low == high:
            low, high = found.min(), found.max()
        pairs.append([_rounded(low), _rounded(high if high > low else low + 1)])
    if not pairs:
        raise DataError("data.value_range=auto: no image of the sample can be read")
    return pairs[0] if len(pairs) == 1 else pairs


def _draw(rows, column: str, seed: int) -> Iterable:
    if not isinstance(rows, datasets.Dataset):
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return itertools.islice(_stream_files(rows, column), COUNT)
    chosen = np.random.default_rng((seed, 18)).permutation(len(rows))[:COUNT]
    rows = rows.select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return (rows[int(index)][column] for index in sorted(chosen))


def _stream_files(rows: datasets.IterableDataset, column: str) -> Iterator:
    """The files of a stream, shard by shard; damage is passed over here, and told where the run meets it."""
    for index in range(rows.num_shards):
        shard = rows if rows.num_shards == 1 else rows.shard(rows.num_shards, index)
        try:
            yield from (row[column] for row in shard)
        except (OSError, *DAMAGE) as error:
            if not is_damage(error):
                raise


def _read(files: Iterable, config: MIMConfig, data: DataArguments):
    for file in files:
        try:
            values, _ = read_image(file, config.num_channels, data.max_pixels)
        except ValueError:
            continue  # counted, named and replaced where it is met
        yield values, mode_of(file)


def _known(values: np.ndarray, decoder: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """(channels, height, width) of the file's own channels, and which of the values can be used."""
    raw = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if len(raw) not in (1, decoder.rules.num_channels):
        raise ValueError(f"{len(raw)} channels")
    missing = decoder.rules.missing(raw)
    known = np.ones(raw.shape, dtype=bool) if missing is None else ~missing
    return raw, known & np.isfinite(raw) if raw.dtype.kind == "f" else known


def _thin(pixels: np.ndarray) -> np.ndarray:
    """(channels, up to about `VALUES`), every few pixels."""
    flat = pixels.reshape(len(pixels), -1)
    return flat[:, :: max(1, flat.shape[1] // VALUES)]


def _measure(sample: PixelSample, decoder: Decoder, collected: list) -> None:
    missing = total = clipped = 0
    for channel in range(decoder.rules.num_channels):
        raw = np.concatenate([values[channel][known[channel]] for values, known, _ in collected])
        pixels = np.concatenate([levels[channel][known[channel]] for _, known, levels in collected])
        count = sum(known[channel].size for _, known, _ in collected)
        missing, total = missing + count - raw.size, total + count
        sample.low.append(float(raw.min()) if raw.size else 0.0)
        sample.high.append(float(raw.max()) if raw.size else 0.0)
        sample.levels_before.append(len(np.unique(raw)))
        sample.levels.append(len(np.unique(pixels)))
        if decoder.rules.value_range is not None:
            low, high = decoder.rules.value_range[min(channel, len(decoder.rules.value_range) - 1)]
            clipped += int(((raw < low) | (raw > high)).sum())
    sample.missing, sample.clipped = missing / total, clipped / max(1, total - missing)


def _rounded(value: float) -> float:
    """With six digits, as a whole number where it is one."""
    value = float(f"{value:.6g}")
    return int(value) if value == int(value) else value


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{_rounded(value)}"


def fits_stock_processor(sample: PixelSample | None, config: MIMConfig) -> bool:
    """Whether the values of files like these are read by a stock image processor as `Decoder` reads them."""
    if config.value_range is not None or config.nodata is not None:
        return False
    if sample is None:
        return True
    if set(sample.values) - {"uint8"}:
        return False
    modes = {1: {"L"}, 3: {"1", "L", "P", "RGB", "CMYK", "YCbCr"}, 4: {"RGBA"}}
    return sample.modes <= modes.get(config.num_channels, set())


def sizes_like(sample: PixelSample | None, config: MIMConfig) -> str:
    """`model` where every image of the sample has the model's size, `other` where none has, else `mixed`."""
    if sample is None or not sample.sizes:
        return "model"
    same = pair(config.image_size) in sample.sizes
    return "other" if not same else "model" if len(sample.sizes) == 1 else "mixed"
