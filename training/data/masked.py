"""What segmentation works on: images with masks in three splits, and their classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.bad_images import BadImageReport
from hf_mim.training.data.columns import find_mask_columns
from hf_mim.training.data.decoding import Decoder
from hf_mim.training.data.masks import HIGHEST_ID, IGNORE, REMEDY, frequent_values, smooth_share
from hf_mim.training.data.pairs import MaskedSource, Pairs, open_pairs
from hf_mim.training.data.report import describe_classes, describe_columns, unused_splits
from hf_mim.training.data.sample import PixelSample, look_at
from hf_mim.training.data.scenes import COUNTS, Scenes
from hf_mim.training.data.splits import choose_splits, draw_scenes, hold_out_scenes, other_test_split


MANY_IDS = 16  # beyond so many it is looked at whether ids make areas
EDGE_SHARE = 0.3  # of the pixels of an id that lie in areas, below which it is one of edges


@dataclass
class MaskedSplits:
    """What a command works on.

    Args:
        train, validation, test: by index (image (channels, height, width) uint8, class ids (height, width) int64).
        classes: their names, by id.
        shares: of the labelled training pixels that are of each class.
        note: where `test` comes from, for people.
        report: what is used and what is left out, a line each, for people.
        sample, data: as of `Splits`.
        digest: of the files; see `Opened`.
    """

    train: MaskedSource
    validation: MaskedSource
    test: MaskedSource
    classes: list[str]
    shares: np.ndarray
    note: str
    report: list[str] = field(default_factory=list)
    sample: PixelSample = field(default_factory=PixelSample)
    data: DataArguments = field(default_factory=DataArguments)
    digest: str = ""

    def bad_images(self) -> BadImageReport:
        """What could not be used so far."""
        return self.train.bad_images() + self.validation.bad_images() + self.test.bad_images()


def load_masked_splits(
    data: DataArguments,
    config: MIMConfig,
    classes: int | list[str] | None = None,
    console: RunConsole | None = None,
    seed: int = 0,
) -> MaskedSplits:
    """Opens the data, the composed scenes where `data.dataset` is None, and reads every mask once. Parts that are held
    out, and subsets, keep the classes: see `splits`.

    Args:
        config: says how images are decoded.
        classes: how many there are, or their names; None takes the ids in sight, each of which must be in training.
        seed: of `data.max_train_images`.

    Raises:
        ValueError, OSError: missing data, no masks, masks of another size than their image, ids beyond the classes or
            that are none, only ignored pixels, a class without a training pixel that is not named.
    """
    limits = {"train": data.max_train_images, "validation": data.max_eval_images, "test": data.max_eval_images}
    limits = {name: count if count is None else max(1, count) for name, count in limits.items()}
    if data.dataset is None:
        return _composed_splits(data, config.num_channels, limits, classes, console)
    opened = open_pairs(data)
    train, test = choose_splits(opened, data)
    chosen = {"train": train, "validation": other_test_split(opened, train, test), "test": test}
    columns = find_mask_columns(opened[train].features, data)
    report = [*opened.notes, describe_columns(columns[0], None, masks=columns[1]).replace("no labels, ", "")]
    sample, data = look_at(opened[train], config, data, seed, columns[0])
    decode = Decoder(config, data)
    sources: dict[str, Pairs] = {}
    counts: dict[str, IdCounts] = {}
    for name, split in chosen.items():
        if split is not None:
            sources[name] = Pairs(opened[split], *columns, decode, data.mask_values, data.max_bad_images)
            counts[name] = IdCounts.read(sources[name], name, console)
    names = name_classes(classes or len(data.mask_values or ()) or None, highest(counts))
    note = f"split {test}" if test is not None else f"held out from {train}"
    _hold_out(sources, counts, len(names), str(data.dataset))
    for name, limit in limits.items():
        if limit is not None and limit < len(sources[name]):
            part = draw_scenes(counts[name].presence(len(names)), limit, seed if name == "train" else 0)
            sources[name], counts[name] = sources[name].select(part), counts[name].select(part)
    report += unused_splits(opened, chosen.values())
    if classes is None:
        check_present(counts["train"].total(len(names)))
    splits = _masked_splits(sources, counts, names, note, report, sample, data)
    splits.digest = opened.digest
    return splits


def _composed_splits(
    data: DataArguments, channels: int, limits: dict, classes: int | list[str] | None, console: RunConsole | None
) -> MaskedSplits:
    sources = {
        name: Scenes(name, min(count, limits[name] or count), num_channels=channels) for name, count in COUNTS.items()
    }
    counts = {name: IdCounts.read(source, name, console) for name, source in sources.items()}
    names = name_classes(classes or sources["train"].classes, highest(counts))
    return _masked_splits(sources, counts, names, "composed from the test images", [], PixelSample(), data)


def _hold_out(sources: dict, counts: dict, classes: int, dataset: str) -> None:
    """Adds the splits `test` and `validation` where they are missing: parts of `train`, which loses them."""
    for name in ("test", "validation"):
        if name not in sources:
            if len(sources["train"]) < 2:
                raise DataError(f"{dataset} has too few images: one to train on, one to validate and one to test")
            parts = hold_out_scenes(counts["train"].presence(classes))
            for entries in (sources, counts):
                entries["train"], entries[name] = (entries["train"].select(part) for part in parts)


def _masked_splits(
    sources: Mapping[str, MaskedSource],
    counts: dict,
    names: list[str],
    note: str,
    report: list[str],
    sample: PixelSample,
    data: DataArguments,
) -> MaskedSplits:
    totals = {name: counts[name].total(len(names)) for name in COUNTS}
    if not totals["train"].any():
        raise DataError(f"the train masks hold only {IGNORE}, which means that a pixel has no class")
    report = [*report, describe_classes(names)]
    for name, total in totals.items():
        absent = [names[number] for number in np.flatnonzero(total == 0)]
        line = f"{name}: {len(sources[name]):,} images"
        if absent and name == "train":
            line += f"; no pixel of {len(absent)} classes: {', '.join(absent[:8])}"
        report.append(line)
    ignored = counts["train"].ignored
    if ignored:
        report.append(f"{100 * ignored / (ignored + totals['train'].sum()):.1f} % of the training pixels have no class")
    shares = totals["train"] / totals["train"].sum()
    return MaskedSplits(
        train=sources["train"],
        validation=sources["validation"],
        test=sources["test"],
        classes=names,
        shares=shares,
        note=note,
        report=report,
        sample=sample,
        data=data,
    )


@dataclass
class IdCounts:
    """What the masks of a split hold.

    Args:
        images: of each (ids, pixels of each id).
        smooth: pixels of each id that lie in an area of their id; see `smooth_share`.
        ignored_of: pixels without a class, of each image.
    """

    images: list[tuple[np.ndarray, np.ndarray]]
    smooth: np.ndarray
    ignored_of: list[int]

    @classmethod
    def read(cls, source: MaskedSource, name: str, console: RunConsole | None) -> "IdCounts":
        """Reads all masks.

        Raises:
            ValueError: one cannot be used, all pixels are without a class, or the ids are none.
        """
        found = cls([], np.zeros(HIGHEST_ID + 1, dtype=np.int64), [])
        with (console or RunConsole(quiet=True)).progress() as bar:
            for index in bar.track(range(len(source)), description=f"reading the {name} masks"):
                found.add(source.mask(index))
        total = found.total(HIGHEST_ID + 1)
        if not total.any():
            raise DataError(f"the {name} masks hold only {IGNORE}, which means that a pixel has no class")
        check_ids(total, found.smooth, name)
        return found

    def add(self, ids: np.ndarray) -> None:
        """A mask (height, width)."""
        pixels = np.bincount(ids.ravel(), minlength=IGNORE + 1)
        self.ignored_of.append(int(pixels[IGNORE]))
        self.smooth += smooth_share(ids, HIGHEST_ID + 1)
        pixels[IGNORE] = 0
        (present,) = pixels.nonzero()
        self.images.append((present, pixels[present]))

    @property
    def ignored(self) -> int:
        return sum(self.ignored_of)

    def select(self, positions: np.ndarray) -> "IdCounts":
        return IdCounts([self.images[i] for i in positions], self.smooth, [self.ignored_of[i] for i in positions])

    def total(self, classes: int) -> np.ndarray:
        """Pixels of each class, (classes,)."""
        total = np.zeros(classes, dtype=np.int64)
        for ids, pixels in self.images:
            total[ids] += pixels
        return total

    def presence(self, classes: int) -> np.ndarray:
        """Which classes an image has a pixel of: (images, classes), bool."""
        presence = np.zeros((len(self.images), classes), dtype=bool)
        for row, (ids, _) in zip(presence, self.images):
            row[ids] = True
        return presence


def highest(counts: dict[str, IdCounts]) -> int:
    """One more than the highest id."""
    return 1 + max(int(ids.max()) for entry in counts.values() for ids, _ in entry.images if len(ids))


def check_ids(total: np.ndarray, smooth: np.ndarray, name: str) -> None:
    """Raises:
    DataError: most of many ids make no areas: they are values between those of two classes, of resized or lossy masks.
    """
    present = np.flatnonzero(total)
    edges = smooth[present] < EDGE_SHARE * total[present]
    if len(present) > MANY_IDS and edges.mean() > 0.5:
        raise DataError(
            f"the {name} masks hold {len(present)} values, most of them on edges only: they were resized or lossy, "
            f"and these are no class ids. Save masks without interpolation as PNG, or {REMEDY} value of each class, "
            f"such as {frequent_values(total[: IGNORE + 1])}"
        )


def check_present(total: np.ndarray) -> None:
    """Raises:
    DataError: there is a class without a training pixel.
    """
    absent = np.flatnonzero(total == 0).tolist()
    if absent:
        held = np.flatnonzero(total).tolist()
        raise DataError(
            f"no training mask has a pixel of id {', '.join(map(str, absent[:8]))}{', ...' if len(absent) > 8 else ''} "
            f"(they hold {', '.join(map(str, held[:12]))}): name all classes in the option classes, or {REMEDY} value "
            f"of each class, such as {held[:12]}"
        )


def name_classes(classes: int | list[str] | None, count: int) -> list[str]:
    """The names of the classes by id, where the masks hold ids below `count`.

    Raises:
        ValueError: ids beyond the classes, or a single class.
    """
    names = classes if isinstance(classes, list) else [f"class {i}" for i in range(classes or count)]
    if count > len(names):
        raise DataError(
            f"the masks hold ids up to {count - 1}, but there are {len(names)} classes: 0 to {len(names) - 1}"
        )
    if len(names) < 2:
        raise DataError(
            f"the masks hold one class only, id 0 ({IGNORE} means that a pixel has no class; if it is one here, "
            f"set data.mask_values=[0,{IGNORE}])"
        )
    return names
