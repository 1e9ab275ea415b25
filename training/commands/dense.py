"""The command `probe` with `task=dense`: what the patch tokens of a frozen encoder say of the place that they see."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.encoder_base import Grid, patchify
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import Size, unknown_choice
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.commands.segmentation import SCENES, SHOWN, input_size, predict
from hf_mim.training.console import RunConsole, make_table
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.masked import MaskedSplits, load_masked_splits
from hf_mim.training.data.masks import IGNORE
from hf_mim.training.data.segmentation import MaskedDataset, SegmentationCollator
from hf_mim.training.data.urls import check_local
from hf_mim.training.errors import RecipeError
from hf_mim.training.evaluation.features import Features, choose_layers
from hf_mim.training.evaluation.iou import intervals, pixel_counts, scores
from hf_mim.training.evaluation.metrics import NEIGHBOURS, PENALTIES, TEMPERATURE, fit_logistic
from hf_mim.training.plots.masks import draw_masks
from hf_mim.training.run import Run, best_device, choose_folder, dataset_title, name_of, size_title, versions
from hf_mim.training.trainer.trainer import has_bf16


NEITHER = -1  # the label of a cell without a labelled pixel
RAW_SIDE = 8  # pixels of a patch, where they stand for its token: beyond, their linear probe costs gigabytes
BATCH = 16  # images encoded at once
UNITS = ("pixels", "patches")  # that are counted
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
            raise RecipeError(f"probe.patches must be at least 10, not {self.patches}", "probe.patches")


@dataclass(kw_only=True)
class DenseProbe(Run):
    """A dense probing that is set up."""

    source: str
    arguments: DenseArguments
    model: MIMModel = field(repr=False)
    layer: int
    images: "DenseProbeData"

    def readers(self) -> dict[str, Features | None]:
        """{column: what reads the tokens of an encoder}; None for the raw pixels."""
        encoders = {"trained": self.model}
        if self.arguments.untrained:
            encoders["untrained"] = untrained_twin(self.model).to(self.model.device)
        norm, columns = self.arguments.apply_final_norm, {}
        for column, encoder in encoders.items():
            columns[column] = Features(encoder, [self.layer], None, False, norm, has_bf16())
        return {**columns, "raw_pixels": None}


def probe_dense(source: str, overrides: Sequence[str] = (), console: Console | RunConsole | None = None) -> Path:
    """Probes the patch tokens of a frozen encoder on masks and writes dense.json and dense.png into one folder.

    Args, returns: as of `probe`. Without `data.dataset` the masks are those of composed scenes.

    Raises:
        ValueError, OSError: something of the model, the data or the settings is wrong; nothing has been written.
    """
    started = time.perf_counter()
    run = set_up(source, overrides, console)
    images = run.images
    run.describe(
        data=f"{dataset_title(run.data, SCENES)}, {len(images.train):,} training and {len(images.test):,} test images "
        f"at {size_title(images.size)}, {images.classes} classes; patches {size_title(images.grid)} an image, "
        f"{images.quota * len(images.train):,} training patches",
    )
    results = measure(images, run.readers(), run.layer, run.console)
    write(run, results, time.perf_counter() - started)
    run.console.show(results_table(results, images))
    run.log_next_steps()
    return run.folder


def set_up(source: str, overrides: Sequence[str], console: Console | RunConsole | None = None) -> DenseProbe:
    """Checks everything that can be wrong, from the quickest to the slowest, and prints where results will be."""
    console = RunConsole(console)
    overrides = recipes.expand_task(overrides, "probe")
    arguments, data = recipes.read_sections(overrides, probe=DenseArguments, data=DataArguments)
    check_local("probe.output_dir", arguments.output_dir)
    model = load_encoder(source).float()
    size = input_size(model, arguments.image_size, data.dataset is None)
    (layer,) = choose_layers(model.encoder, [arguments.layer])
    folder = choose_folder(arguments.output_dir, f"dense-{name_of(source)}", ("dense.json",), "probe.output_dir")
    console.log(f"output folder: {folder}")
    splits = load_masked_splits(data, model.config.num_channels, arguments.classes, console.rich)
    return DenseProbe(
        recipe=recipes.parse_overrides(overrides),
        arguments=arguments,
        data=data,
        folder=folder,
        console=console,
        source=source,
        model=model.to(best_device()),
        layer=layer,
        images=DenseProbeData(splits, model.config, size, model.encoder.token_grid(*size), arguments.patches),
    )


def asks_for_dense(overrides: Sequence[str]) -> bool:
    """Whether a command line asks for this task: `task=dense`, or in full `probe.task=dense`.

    Raises:
        OptionError: it asks for an unknown task.
    """
    tasks = [word.partition("=")[2] for word in overrides if word.partition("=")[0] in ("task", "probe.task")]
    for task in tasks:
        if task != "dense":
            raise unknown_choice("probe.task", task, ["dense"])
    return bool(tasks)


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


class DenseProbeData:
    """The images and masks of a dense probing, the same for every encoder.

    Attributes:
        quota: how many labelled patches of a training image are kept at most.
    """

    def __init__(self, splits: MaskedSplits, config: MIMConfig, size: tuple[int, int], grid: Grid, patches: int):
        self.splits, self.config, self.size, self.grid = splits, config, size, grid
        self.train, self.test = (MaskedDataset(split, config, size, False) for split in (splits.train, splits.test))
        self.quota = max(1, min(grid[0] * grid[1], patches // len(self.train)))

    @property
    def classes(self) -> int:
        return len(self.splits.classes)

    def batches(self, dataset: MaskedDataset) -> Iterator[tuple[Tensor, list[np.ndarray]]]:
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


def collect(images: DenseProbeData, features: Features | None, layer: int, advance) -> tuple[Tensor, Tensor, Tensor]:
    """Training patches: tokens (patches, dim), labels (patches,), and the image that each is of (patches,)."""
    tokens, labels, sources = [], [], []
    for pixel_values, masks in images.batches(images.train):
        for image_tokens, ids in zip(read_tokens(pixel_values, features, layer, images.grid), masks):
            number, classes = len(tokens), patch_labels(ids, images.grid, images.classes)
            usable = np.flatnonzero(classes != NEITHER)
            kept = np.sort(np.random.default_rng((0, number)).permutation(usable)[: images.quota])
            tokens.append(image_tokens[kept])
            labels.append(torch.from_numpy(classes[kept]))
            sources.append(torch.full((len(kept),), number))
        advance(len(masks))
    return torch.cat(tokens), torch.cat(labels), torch.cat(sources)


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
        start: tuple[Tensor, Tensor] | None = None
        best: tuple[float, float, tuple[Tensor, Tensor] | None] = (-1.0, 1.0, None)
        if held_out.any() and not held_out.all():
            for penalty in PENALTIES:
                start = fit_logistic(tokens[~held_out], labels[~held_out], classes, penalty, start)
                guesses = (tokens[held_out] @ start[0].T + start[1]).argmax(1)
                counts = pixel_counts(guesses.numpy(), labels[held_out].numpy(), classes, NEITHER)
                best = max(best, (scores(counts[None])["mean_iou"], penalty, start), key=lambda trial: trial[0])
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
        shares = []
        for part in F.normalize(tokens, dim=1).split(1000):
            similarity, nearest = (part @ self.tokens.T).topk(self.k)
            weights = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()
            votes = torch.zeros(len(part), self.classes).scatter_add_(1, self.labels[nearest], weights)
            shares.append(votes / votes.sum(1, keepdim=True))
        return torch.cat(shares)


Reader = LinearReader | NeighbourReader


def measure(images: DenseProbeData, columns: dict[str, Features | None], layer: int, console: RunConsole) -> dict:
    """{column: {reader: {"pixels", "patches": counts (images, 3, classes), "maps": of the first images}}}."""
    results = {}
    with console.progress() as bar:
        task = bar.add_task("", total=len(columns) * (len(images.train) + len(images.test)))
        advance = partial(bar.advance, task)
        for column, features in columns.items():
            title = column.replace("_", " ")
            bar.update(task, description=f"encoding, {title}")
            patches = collect(images, features, layer, advance)
            bar.update(task, description=f"fitting, {title}")
            readers: dict[str, Reader] = {
                "linear": LinearReader(*patches, images.classes),
                "knn": NeighbourReader(*patches, images.classes),
            }
            bar.update(task, description=f"testing, {title}")
            results[column] = test(images, features, layer, readers, advance)
    return results


def test(images: DenseProbeData, features: Features | None, layer: int, readers: dict[str, Reader], advance) -> dict:
    """Of every reader the counts of the test images, by patches and by pixels, and its first maps."""
    results: dict[str, dict] = {name: {"pixels": [], "patches": [], "maps": []} for name in readers}
    for pixel_values, masks in images.batches(images.test):
        tokens = read_tokens(pixel_values, features, layer, images.grid)
        for name, reader in readers.items():
            logits = reader(tokens.flatten(0, 1)).view(len(masks), *images.grid, -1)
            for image_logits, ids in zip(logits, masks):
                predicted = predict(image_logits.permute(2, 0, 1), ids.shape).numpy()
                labels = patch_labels(ids, images.grid, images.classes)
                guesses = image_logits.argmax(-1).flatten().numpy()
                results[name]["pixels"].append(pixel_counts(predicted, ids, images.classes))
                results[name]["patches"].append(pixel_counts(guesses, labels, images.classes, NEITHER))
                if len(results[name]["maps"]) < SHOWN:
                    results[name]["maps"].append(predicted)
        advance(len(masks))
    for entry in results.values():
        entry.update({unit: np.stack(entry[unit]) for unit in UNITS})
    return results


# ---- report --------------------------------------------------------------------------------------------------------
def write(run: DenseProbe, counted: dict, seconds: float) -> None:
    """Writes dense.json and dense.png; `counted` as of `measure`."""
    images = run.images
    results: dict = {
        column: {
            name: {unit: {**scores(entry[unit]), "intervals": intervals(entry[unit])} for unit in UNITS}
            for name, entry in readers.items()
        }
        for column, readers in counted.items()
    }
    if "untrained" in counted:
        trained, untrained = counted["trained"], counted["untrained"]
        results["trained_minus_untrained"] = {
            name: {unit: intervals(trained[name][unit], untrained[name][unit]) for unit in UNITS} for name in READERS
        }
    results |= {
        "most_frequent_class": constant(counted["trained"]["linear"]["pixels"], images.splits.shares),
        "model": run.source,
        "layer": run.arguments.layer,
        "classes": images.splits.classes,
        "image_size": list(images.size),
        "grid": list(images.grid),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "test": images.splits.note,
        "protocol": PROTOCOL,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    draw_examples(images, counted, run.folder / "dense.png")
    run.write_json("dense.json", results)


def draw_examples(data: DenseProbeData, counted: dict, path: Path) -> None:
    """dense.png: the first test images, their masks, and what is read from the tokens of each encoder."""
    examples = [data.splits.test[i] for i in range(min(SHOWN, len(data.test)))]
    images, masks = map(list, zip(*examples, strict=True))
    maps = {"linear probe": counted["trained"]["linear"]["maps"], "k-NN": counted["trained"]["knn"]["maps"]}
    if "untrained" in counted:
        maps["linear, untrained"] = counted["untrained"]["linear"]["maps"]
    draw_masks(images, masks, maps, data.splits.classes).save(path)


def constant(counts: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """The scores of saying everywhere what most training pixels are; `counts` (images, 3, classes) are of any
    prediction."""
    frequent, true = int(shares.argmax()), counts[:, 2]
    blind = np.zeros_like(counts)
    blind[:, 2], blind[:, 0, frequent], blind[:, 1, frequent] = true, true[:, frequent], true.sum(axis=1)
    return scores(blind)


def results_table(counted: dict, images: DenseProbeData) -> Table:
    blind = constant(counted["trained"]["linear"]["pixels"], images.splits.shares)["mean_iou"]
    measures = [
        ("mean_iou", "mean IoU", "pixels"),
        ("pixel_accuracy", "accuracy", "pixels"),
        ("mean_iou", "patch IoU", "patches"),
    ]
    return make_table(
        ("", *(column.replace("_", " ") for column in counted)),
        [
            (f"{reader_title}, {title}", *(cell(readers[name][unit], key) for readers in counted.values()))
            for name, reader_title in READERS.items()
            for key, title, unit in measures
        ],
        title="masks from frozen patch tokens, percent",
        caption=f"{len(images.test):,} test images; intervals over images, 95 percent. Everywhere the most frequent "
        f"class: mean IoU {blind:.1f}",
    )


def cell(counts: np.ndarray, key: str) -> str:
    low, high = intervals(counts)[key]
    return f"{scores(counts)[key]:.1f} ({low:.1f}-{high:.1f})"
