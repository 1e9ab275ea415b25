"""What the images of a data set hold, by a sample that is looked at once, before training: values, modes and sizes."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_columns
from hf_mim.training.data.decoding import Decoder, apply_rules, kind_of, read_image
from hf_mim.training.data.shards import DAMAGE, is_damage


COUNT = 48  # images, at most
SHARDS = 8  # of a stream that the images are of, unless these have too few: opening one takes a round trip and more
VALUES = 2**16  # of an image that percentiles are taken of, at most
PERCENTILES = (0.1, 99.9)  # what `data.value_range=auto` makes black and white
FEW_LEVELS = 32  # of 256, below which there is a warning


@dataclass
class PixelSample:
    """What some images of a data set hold, and what becomes of it.

    Args:
        count: of the images that were looked at.
        shards: of a stream, that they are of; None of what can be drawn from as a whole.
        values: how many images have values of which type: {"uint16": 48}.
        modes: what Pillow calls the kinds of files, `array` for .npy and what Pillow does not read.
        lost_bits: how many bits a channel files have of which Pillow reads 8; 0 where there are no such.
        lost_pages: how many pages or frames files have beside the one that is read.
        stackable: whether these can be channels of one image.
        sizes: (height, width) of the images.
        low, high: of each channel, nodata left out.
        levels: how many different values each channel has when it is made 8 bits.
        lost: where few of many values are left, by channel and type.
        clipped, missing: shares of the values that lie outside of the range, and that are `data.nodata`.
        value_range: in force; None is that of the type.
    """

    count: int = 0
    shards: int | None = None
    values: Counter[str] = field(default_factory=Counter)
    modes: set[str] = field(default_factory=set)
    lost_bits: int = 0
    lost_pages: int = 0
    stackable: bool = True
    sizes: set[tuple[int, int]] = field(default_factory=set)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    lost: list["LostLevels"] = field(default_factory=list)
    clipped: float = 0.0
    missing: float = 0.0
    value_range: Any = None

    @property
    def line(self) -> str:
        """For people, before training begins."""
        if not self.count:
            return "values: no image of the sample can be read"
        kinds = " and ".join(self.values)
        looked = f"{self.count} images looked at" if self.shards is None else self.stream_part
        parts = [f"{kinds} from {_number(min(self.low))} to {_number(max(self.high))} in {looked}"]
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
    def stream_part(self) -> str:
        shards = f"{self.shards} shards" if self.shards != 1 else "the only shard"
        return f"the first {self.count} images of {shards}"

    @property
    def warning(self) -> str | None:
        """Where bits, pages or most levels of the files are lost: what is lost, and after ": " the remedy."""
        if self.lost_pages:
            channels = f"if they are channels of one image, set model.num_channels={self.lost_pages + 1}; else "
            return (
                f"warning: of files with {self.lost_pages + 1} pages or frames, only the first is read: "
                f"{channels if self.stackable else ''}write a file for each"
            )
        if self.lost_bits:
            return (
                f"warning: of files with {self.lost_bits} bits a channel (JPEG 2000 in colours, AVIF), Pillow reads 8 "
                "bits: to keep the others, save them as PNG, TIFF or .npy"
            )
        if not self.lost:
            return None
        least = min(self.lost, key=lambda lost: lost.after)
        low, high = min(lost.low for lost in self.lost), max(lost.high for lost in self.lost)
        return (
            f"warning: only {least.after} levels are left of {least.before:,} different values, because the images do "
            "not fill the range that they are read with: set data.value_range=auto, or to numbers such as "
            f"[{_number(low)},{_number(high)}], one pair or one per channel"
        )


@dataclass(frozen=True)
class LostLevels:
    """How many different values there are before and after they are made 8 bits, and the lowest and highest."""

    before: int
    after: int
    low: float
    high: float


def look_at(
    rows, config: MIMConfig, data: DataArguments, seed: int = 0, column: str | None = None
) -> tuple[PixelSample, DataArguments]:
    """Looks at some images, drawn at random from the seed; of a stream, at the first ones of shards drawn so.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset` with an image column.
        column: its name; None finds it.

    Returns:
        what is in them, and `data` with the numbers that `value_range=auto` stands for.

    Raises:
        DataError: `auto`, and no image has values.
    """
    column = column or find_columns(rows.features, data)[0]
    files, shards = _draw(rows, column, seed)
    images = list(_read(files, config, data))
    if data.value_range == "auto":
        data = replace(data, value_range=find_range([values for values, _ in images], config, data))
    decoder = Decoder(config, data)
    value_range = config.value_range if data.value_range is None else data.value_range
    sample = PixelSample(len(images), shards, value_range=value_range)
    collected: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for values, kind in images:
        try:
            pixels, _ = apply_rules(decoder.rules, values, "an image")
        except DataError:
            continue  # named where it is met
        sample.values[str(values.dtype.newbyteorder("="))] += 1
        sample.modes.add(kind.mode)
        sample.lost_bits = max(sample.lost_bits, kind.lost_bits)
        if kind.pages > 1 and not (kind.stacks and values.shape[2:] == (kind.pages,)):
            sample.lost_pages = max(sample.lost_pages, kind.pages - 1)
            sample.stackable &= kind.stacks
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


def _draw(rows, column: str, seed: int) -> tuple[Iterable, int | None]:
    """Files, and of how many shards they are; None of what is no stream."""
    if not isinstance(rows, datasets.Dataset):
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return _stream_files(rows, column, seed)
    chosen = np.random.default_rng((seed, 18)).permutation(len(rows))[:COUNT]
    rows = rows.select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return (rows[int(index)][column] for index in sorted(chosen)), None


def _stream_files(rows: datasets.IterableDataset, column: str, seed: int) -> tuple[list, int]:
    """The first files of some shards of a stream: sources often lie one after another. Damage is passed over here, and
    told where the run meets it."""
    files, shards = list[Any](), 0
    for index in np.random.default_rng((seed, 18)).permutation(rows.num_shards).tolist():
        shard = rows if rows.num_shards == 1 else rows.shard(rows.num_shards, index)
        share = math.ceil((COUNT - len(files)) / max(1, min(rows.num_shards, SHARDS) - shards))
        before = len(files)
        try:
            files.extend(row[column] for row in itertools.islice(shard, share))
        except (OSError, *DAMAGE) as error:
            if not is_damage(error):
                raise
        shards += len(files) > before
        if len(files) == COUNT:
            break
    return files, shards


def _read(files: Iterable, config: MIMConfig, data: DataArguments):
    for file in files:
        try:
            values, _ = read_image(file, config.num_channels, data.max_pixels)
        except ValueError:
            continue  # counted, named and replaced where it is met
        yield values, kind_of(file)


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
    """Fills in a sample: by channel, and within one by the type of the files, so that none hides what others lose."""
    missing = total = clipped = 0
    for channel in range(decoder.rules.num_channels):
        by_type: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for values, known, pixels in collected:
            mask = known[channel]
            by_type.setdefault(values.dtype.str, []).append((values[channel][mask], pixels[channel][mask]))
            missing, total = missing + int((~mask).sum()), total + mask.size
        values_of, levels_of = list[np.ndarray](), list[np.ndarray]()
        for pairs in by_type.values():
            raw, levels = (np.concatenate(arrays) for arrays in zip(*pairs))
            values_of.append(np.unique(raw))
            levels_of.append(np.unique(levels))
            if FEW_LEVELS > len(levels_of[-1]) < len(values_of[-1]):
                sample.lost.append(LostLevels(len(values_of[-1]), len(levels_of[-1]), raw.min(), raw.max()))
            if decoder.rules.value_range is not None:
                low, high = decoder.rules.value_range[min(channel, len(decoder.rules.value_range) - 1)]
                clipped += int(((raw < low) | (raw > high)).sum())
        ends = [end for values in values_of if values.size for end in (values[0], values[-1])] or [0.0]
        sample.low.append(float(min(ends)))
        sample.high.append(float(max(ends)))
        sample.levels.append(len(np.unique(np.concatenate(levels_of))))
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
        return "other"
    same = pair(config.image_size) in sample.sizes
    return "other" if not same else "model" if len(sample.sizes) == 1 else "mixed"
