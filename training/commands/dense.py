"""The command `probe` with `task=dense`: what the patch tokens of a frozen encoder say of the place that they see."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_base import patchify
from hf_mim.modeling.options import Size, unknown_choice
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.commands.segmentation import SHOWN, input_size, predict
from hf_mim.training.data.masked import MaskedDataset, MaskedSplits, SegmentationCollator, load_masked_splits
from hf_mim.training.data.sources import DataArguments
from hf_mim.training.data.urls import check_local
from hf_mim.training.evaluation.features import Features, choose_layers
from hf_mim.training.evaluation.iou import IGNORE, intervals, pixel_counts, scores
from hf_mim.training.evaluation.metrics import NEIGHBOURS, PENALTIES, TEMPERATURE, fit_logistic
from hf_mim.training.plots.masks import draw_masks
from hf_mim.training.run import versions
from hf_mim.training.trainer.trainer import has_bf16


NEITHER = -1  # the label of a cell without a labelled pixel
RAW_SIDE = 8  # pixels of a patch, where they stand for its token: beyond, their linear probe costs gigabytes
BATCH = 16  # images encoded at once
READERS = {"linear": "linear", "knn": "k-NN"}
PROTOCOL = {
    "patches": "A patch has the class of most labelled pixels in its cell; cells without one are left out.",
    "linear": "Linear probe: logistic regression on standardised patch tokens, fitted to convergence by L-BFGS; its "
    "penalty is the best of five by mean IoU on the patches of a held-out fifth of the training images.",
    "knn": f"k-NN: a vote of the {NEIGHBOURS} nearest training patches by cosine, each weighing "
    f"exp(cosine / {TEMPERATURE}).",
    "pixels": "Pixels: the classes' scores of the patches, upsampled bilinearly to the mask, and the best of them.",
    "raw_pixels": "Raw pixels: the normalised pixels of a patch in the place of its token, averaged down to at most "
    f"{RAW_SIDE} a side.",
}


@dataclass
class DenseArguments:
    """The section `probe` where its task is dense.

    Args:
        task: dense.
        image_size: pixels that images are brought to; None is the encoder's own, for the composed scenes theirs.
        layer: whose tokens to read; -1 is the last, 0 the embedding.
        apply_final_norm: whether the tokens pass the encoder's last norm.
        classes: how many, or their names by id; None takes the ids that the masks hold.
        patches: at most so many training patches are kept, of every image equally many, drawn at random.
        untrained: compare with the same encoder untrained.
        output_dir: None is `outputs/dense-<model>-<date>`.
    """

    task: str = "dense"
    image_size: Size | None = None
    layer: int = -1
    apply_final_norm: bool = True
    classes: int | list[str] | None = None
    patches: int = 40_000
    untrained: bool = True
    output_dir: str | None = None

    def __post_init__(self):
        if self.patches < 10:
            raise ValueError(f"probe.patches must be at least 10, not {self.patches}")


def probe_dense(source: str, overrides: list[str] = (), console: Console | None = None) -> Path:
    """Probes the patch tokens of a frozen encoder on masks and writes dense.json and dense.png into one folder.

    Args, returns: as of `probe`. Without `data.dataset` the masks are those of composed scenes.

    Raises:
        ValueError, OSError: something of the model, the data or the settings is wrong; nothing has been written.
    """
    arguments, data = read_overrides(list(overrides))
    console, started = console or Console(), time.perf_counter()
    model = load_encoder(source).float()
    size = input_size(model, arguments.image_size, data.dataset is None)
    (layer,) = choose_layers(model.encoder, [arguments.layer])
    name = Path(source).name or Path(source).absolute().name
    check_local("probe.output_dir", arguments.output_dir)
    folder = Path(arguments.output_dir or f"outputs/dense-{name}-{time.strftime('%Y-%m-%d-%H%M%S')}").expanduser()
    if (folder / "dense.json").exists():
        raise ValueError(f"{folder} holds another probing; choose another probe.output_dir, or remove it")
    console.print(f"output folder: {folder}", highlight=False, soft_wrap=True)
    splits = load_masked_splits(data, model.config.num_channels, arguments.classes, console)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    encoders = {"trained": model}
    if arguments.untrained:
        encoders["untrained"] = untrained_twin(model).to(model.device)
    readers = {
        column: Features(encoder, [layer], None, False, arguments.apply_final_norm, has_bf16())
        for column, encoder in encoders.items()
    }
    scenes = Scenery(splits, model.config, size, model.encoder.token_grid(*size), arguments.patches)
    console.print(
        f"data: {data.dataset or 'scenes composed from the shipped images'}, {len(splits.train):,} training and "
        f"{len(splits.test):,} test images at {size[0]}x{size[1]}, {len(splits.classes)} classes; patches "
        f"{scenes.grid[0]}x{scenes.grid[1]} an image, {scenes.quota * len(splits.train):,} to learn from",
        highlight=False,
        soft_wrap=True,
    )
    found = measure(scenes, {**readers, "raw_pixels": None}, layer, console)
    write(folder, found, scenes, arguments, source, time.perf_counter() - started)
    console.print(results_table(found, scenes))
    console.print(f"output folder: {folder}", highlight=False, soft_wrap=True)
    return folder


def asks_for_dense(overrides: list[str]) -> bool:
    """Whether a command line asks for this task: `task=dense`, or in full `probe.task=dense`.

    Raises:
        ValueError: it asks for a task that there is not.
    """
    asked = [word.partition("=")[2] for word in overrides if word.partition("=")[0] in ("task", "probe.task")]
    for task in asked:
        if task != "dense":
            raise unknown_choice("probe.task", task, ["dense"])
    return bool(asked)


def read_overrides(overrides: list[str]) -> tuple[DenseArguments, DataArguments]:
    """Raises:
    ValueError: an unknown section or key, or a value of another type.
    """
    words = [f"probe.{word}" if word.startswith("task=") else word for word in overrides]
    return recipes.read_sections(words, probe=DenseArguments, data=DataArguments)


# ---- patches -------------------------------------------------------------------------------------------------------
def patch_labels(ids: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """The class of most labelled pixels in every cell, the lowest of equally frequent ones: (rows * cols,), int64;
    `NEITHER` where a cell has none.

    Args:
        ids: (height, width), of any size: pixel y lies in row floor(y * rows / height).
    """
    rows, cols = ((np.arange(side) * count) // side for side, count in zip(ids.shape, grid))
    cells, known = rows[:, None] * grid[1] + cols, ids != IGNORE
    counts = np.bincount(cells[known] * classes + ids[known], minlength=grid[0] * grid[1] * classes)
    counts = counts.reshape(-1, classes)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), NEITHER)


class Scenery:
    """The images and masks of a dense probing, the same for every encoder.

    Attributes:
        quota: how many labelled patches of a training image are kept at most.
    """

    def __init__(self, splits: MaskedSplits, config: MIMConfig, size, grid: tuple[int, int], patches: int):
        self.splits, self.config, self.size, self.grid = splits, config, size, grid
        self.train, self.test = (MaskedDataset(split, config, size, False) for split in (splits.train, splits.test))
        self.quota = max(1, min(grid[0] * grid[1], patches // len(self.train)))

    @property
    def classes(self) -> int:
        return len(self.splits.classes)

    def batches(self, dataset: MaskedDataset):
        """-> `pixel_values` (batch, channels, height, width), and the masks of the images, of their own sizes."""
        collate = SegmentationCollator(self.config)
        for start in range(0, len(dataset), BATCH):
            items = [dataset[index] for index in range(start, min(start + BATCH, len(dataset)))]
            yield collate(items)["pixel_values"], [ids for _, ids in items]


def read_tokens(pixel_values: Tensor, features: Features | None, layer: int, grid: tuple[int, int]) -> Tensor:
    """What is known of every patch, (batch, rows * cols, dim) float32 on the CPU: its token, or without `features` the
    pixels in its cell, averaged down to at most `RAW_SIDE` a side."""
    if features is None:
        sides = [max(1, min(RAW_SIDE, side // count)) * count for side, count in zip(pixel_values.shape[2:], grid)]
        return patchify(F.adaptive_avg_pool2d(pixel_values, sides), grid)
    prefix = features.model.encoder.num_prefix_tokens
    return features(pixel_values)[f"tokens/{layer}"][:, prefix:].float().cpu()


def collect(scenes: Scenery, features: Features | None, layer: int, advance) -> tuple[Tensor, Tensor, Tensor]:
    """Training patches: tokens (patches, dim), labels (patches,), and the image that each is of (patches,)."""
    tokens, labels, images, at = [], [], [], 0
    for pixel_values, masks in scenes.batches(scenes.train):
        for found, ids in zip(read_tokens(pixel_values, features, layer, scenes.grid), masks):
            own = patch_labels(ids, scenes.grid, scenes.classes)
            usable = np.flatnonzero(own != NEITHER)
            kept = np.sort(np.random.default_rng((0, at)).permutation(usable)[: scenes.quota])
            tokens.append(found[kept])
            labels.append(torch.from_numpy(own[kept]))
            images.append(torch.full((len(kept),), at))
            at += 1
        advance(len(masks))
    return torch.cat(tokens), torch.cat(labels), torch.cat(images)


# ---- reading them out ----------------------------------------------------------------------------------------------
class LinearReader:
    """Logistic regression on standardised tokens; see `PROTOCOL`."""

    def __init__(self, tokens: Tensor, labels: Tensor, images: Tensor, classes: int):
        self.mean, std = tokens.mean(0), tokens.std(0)
        # A feature that is constant but for rounding says nothing, and must not be blown up.
        self.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
        tokens = (tokens - self.mean) * self.scale
        # Along the principal axes the problem is the same, the penalty being round, but the fit needs far fewer steps.
        self.axes = torch.linalg.eigh(tokens.T @ tokens).eigenvectors
        tokens = tokens @ self.axes
        held_out = images % 5 == 4
        start, best = None, (-1.0, 1.0, None)
        if held_out.any() and not held_out.all():
            for penalty in PENALTIES:
                start = fit_logistic(tokens[~held_out], labels[~held_out], classes, penalty, start)
                guesses = (tokens[held_out] @ start[0].T + start[1]).argmax(1)
                counts = pixel_counts(guesses.numpy(), labels[held_out].numpy(), classes, NEITHER)
                best = max(best, (scores(counts[None])["mean_iou"], penalty, start), key=lambda one: one[0])
        self.penalty = best[1]
        self.weight, self.bias = fit_logistic(tokens, labels, classes, self.penalty, best[2])

    def __call__(self, tokens: Tensor) -> Tensor:
        """(patches, dim) -> logits (patches, classes)."""
        return ((tokens - self.mean) * self.scale) @ self.axes @ self.weight.T + self.bias


class NeighbourReader:
    """A vote of the nearest training patches; see `PROTOCOL`."""

    def __init__(self, tokens: Tensor, labels: Tensor, images: Tensor, classes: int):
        self.tokens, self.labels, self.classes = F.normalize(tokens, dim=1), labels, classes
        self.k = min(NEIGHBOURS, len(tokens))

    def __call__(self, tokens: Tensor) -> Tensor:
        """(patches, dim) -> shares of the vote (patches, classes)."""
        found = []
        for part in F.normalize(tokens, dim=1).split(1000):
            similarity, nearest = (part @ self.tokens.T).topk(self.k)
            weights = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()
            votes = torch.zeros(len(part), self.classes).scatter_add_(1, self.labels[nearest], weights)
            found.append(votes / votes.sum(1, keepdim=True))
        return torch.cat(found)


def measure(scenes: Scenery, columns: dict[str, Features | None], layer: int, console: Console) -> dict:
    """{column: {reader: {"pixels", "patches": counts (images, 3, classes), "maps": of the first images}}}."""
    found, total = {}, len(columns) * (len(scenes.train) + len(scenes.test))
    with Progress(
        "{task.description}",
        BarColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total)
        for column, features in columns.items():
            bar.update(task, description=f"encoding, {column.replace('_', ' ')}")
            learned = collect(scenes, features, layer, lambda images: bar.advance(task, images))
            bar.update(task, description=f"fitting, {column.replace('_', ' ')}")
            readers = {"linear": LinearReader, "knn": NeighbourReader}
            readers = {name: kind(*learned, scenes.classes) for name, kind in readers.items()}
            bar.update(task, description=f"testing, {column.replace('_', ' ')}")
            found[column] = test(scenes, features, layer, readers, lambda images: bar.advance(task, images))
    return found


def test(scenes: Scenery, features: Features | None, layer: int, readers: dict, advance) -> dict:
    """Of every reader the counts of the test images, by patches and by pixels, and its first maps."""
    found = {name: {"pixels": [], "patches": [], "maps": []} for name in readers}
    for pixel_values, masks in scenes.batches(scenes.test):
        tokens = read_tokens(pixel_values, features, layer, scenes.grid)
        for name, reader in readers.items():
            logits = reader(tokens.flatten(0, 1)).view(len(masks), *scenes.grid, -1)
            for one, ids in zip(logits, masks):
                predicted = predict(one.permute(2, 0, 1), ids.shape).numpy()
                labels = patch_labels(ids, scenes.grid, scenes.classes)
                guesses = one.argmax(-1).flatten().numpy()
                found[name]["pixels"].append(pixel_counts(predicted, ids, scenes.classes))
                found[name]["patches"].append(pixel_counts(guesses, labels, scenes.classes, NEITHER))
                if len(found[name]["maps"]) < SHOWN:
                    found[name]["maps"].append(predicted)
        advance(len(masks))
    for entry in found.values():
        entry.update({of: np.stack(entry[of]) for of in ("pixels", "patches")})
    return found


# ---- report --------------------------------------------------------------------------------------------------------
def write(folder: Path, found: dict, scenes: Scenery, arguments: DenseArguments, source: str, seconds: float) -> None:
    """Writes dense.json and dense.png."""
    results = {
        column: {
            name: {of: {**scores(entry[of]), "intervals": intervals(entry[of])} for of in ("pixels", "patches")}
            for name, entry in readers.items()
        }
        for column, readers in found.items()
    }
    if "untrained" in found:
        results["trained_minus_untrained"] = {
            name: {
                of: intervals(found["trained"][name][of], found["untrained"][name][of]) for of in ("pixels", "patches")
            }
            for name in READERS
        }
    results |= {
        "most_frequent_class": constant(found["trained"]["linear"]["pixels"], scenes.splits.shares),
        "model": source,
        "layer": arguments.layer,
        "classes": scenes.splits.classes,
        "image_size": list(scenes.size),
        "grid": list(scenes.grid),
        "train_images": len(scenes.train),
        "test_images": len(scenes.test),
        "test": scenes.splits.note,
        "protocol": PROTOCOL,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    images, masks = map(list, zip(*(scenes.splits.test[i] for i in range(min(SHOWN, len(scenes.test)))), strict=True))
    maps = {"linear probe": found["trained"]["linear"]["maps"], "k-NN": found["trained"]["knn"]["maps"]}
    if "untrained" in found:
        maps["linear, untrained"] = found["untrained"]["linear"]["maps"]
    draw_masks(images, masks, maps, scenes.splits.classes).save(folder / "dense.png")
    (folder / "dense.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def constant(counts: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """The scores of saying everywhere what most training pixels are; `counts` (images, 3, classes) are of any
    prediction."""
    most, true = int(shares.argmax()), counts[:, 2]
    blind = np.zeros_like(counts)
    blind[:, 2], blind[:, 0, most], blind[:, 1, most] = true, true[:, most], true.sum(axis=1)
    return scores(blind)


def results_table(found: dict, scenes: Scenery) -> Table:
    blind = constant(found["trained"]["linear"]["pixels"], scenes.splits.shares)["mean_iou"]
    table = Table(
        title="masks from frozen patch tokens, percent",
        caption=f"{len(scenes.test):,} test images; intervals over images, 95 percent. Everywhere the most frequent "
        f"class: mean IoU {blind:.1f}",
    )
    table.add_column("")
    for column in found:
        table.add_column(column.replace("_", " "), justify="right")
    rows = [
        ("mean_iou", "mean IoU", "pixels"),
        ("pixel_accuracy", "accuracy", "pixels"),
        ("mean_iou", "patch IoU", "patches"),
    ]
    for name, words in READERS.items():
        for key, title, of in rows:
            cells = [cell(readers[name][of], key) for readers in found.values()]
            table.add_row(f"{words}, {title}", *cells)
    return table


def cell(counts: np.ndarray, key: str) -> str:
    low, high = intervals(counts)[key]
    return f"{scores(counts)[key]:.1f} ({low:.1f}-{high:.1f})"
