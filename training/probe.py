"""The command `probe`: what a frozen encoder is worth, and how to read it out."""

import dataclasses
import math
import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hf_mim.training import probe_report, probe_scores, sources
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.data import Splits, load_splits
from hf_mim.training.features import (
    CachedSource,
    Features,
    ImageViews,
    PoolerChoice,
    UncachedSource,
    choose_layers,
    fill,
    free_bytes,
    missing_bytes,
    plan,
)
from hf_mim.training.heads import LEARNING_RATES, OPTIMIZERS, Group, Schedule, Trained, test_heads, train_heads
from hf_mim.training.metrics import subset_indices
from hf_mim.training.sources import DataArguments
from hf_mim.training.token_cache import weights_hash
from hf_mim.training.trainer import has_bf16


DEFAULT_POOLERS = ("cls", "mean", "abmilp", "efficient")
VIEW_SCALE = [0.2, 1.0]  # area of the random crops of further views, where data.crop_scale says nothing
CACHE = "outputs/token-cache"


@dataclass
class ProbeArguments:
    """The section `probe`.

    Args:
        poolers: names of poolers; None is cls (where there is a class token), mean, abmilp and efficient.
        pooler_config: options of poolers by name. With `pooler` among them the name is one of your own:
            `{deep: {pooler: abmilp, depth: 2}}` makes `deep` a pooler.
        layers: whose tokens to read; -1 is the last, 0 the embedding.
        learning_rates: each pooler tries all of them; None is three around a usual one.
        seeds: of the held-out images, the order and the parameters; each trains everything anew.
        views: 1 sees whole images. More are random crops and flips of them, which the epochs take in turn; they too are
            encoded once.
        epochs: at most.
        patience: epochs without a better validation accuracy after which a head stops.
        batch_size: images in a step, fewer where there are few images.
        optimizer: `adamw`, or `lars`, the papers' own, with learning rates for a batch of 256. AdamW is the safer
            choice for poolers with several layers.
        weight_decay: of weights, not of biases.
        validation: share of the training images that is held out to choose settings. The test images never do.
        apply_final_norm: whether poolers see the tokens after the encoder's last norm. Beyond [cls] has them before.
        untrained: compare with the same encoder untrained.
        uncached: run the encoder again in every epoch: slow, and without the disk.
        cache: the folder that keeps the features; None is `outputs/token-cache`.
        workers: processes that decode images.
        output_dir: None is `outputs/probe-<model>-<date>`.

    Raises:
        ValueError: a value is out of range.
    """

    poolers: list[str] | None = None
    pooler_config: dict | None = None
    layers: list[int] = field(default_factory=lambda: [-1])
    learning_rates: list[float] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    views: int = 1
    epochs: int = 30
    patience: int = 6
    batch_size: int = 256
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    validation: float = 0.1
    apply_final_norm: bool = True
    untrained: bool = True
    uncached: bool = False
    cache: str | None = None
    workers: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"probe.optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.learning_rates is None:
            self.learning_rates = list(LEARNING_RATES[self.optimizer])
        for name, least in (("views", 1), ("epochs", 1), ("patience", 1), ("batch_size", 2), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"probe.{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("layers", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"probe.{name} must hold one value or more, each once, not {values}")
        if self.poolers is not None and (not self.poolers or len(set(self.poolers)) < len(self.poolers)):
            raise ValueError(f"probe.poolers must name one pooler or more, each once, not {self.poolers}")
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"probe.learning_rates must be above 0, not {self.learning_rates}")
        if not 0 < self.validation < 1:
            raise ValueError(f"probe.validation must be a share between 0 and 1, not {self.validation}")


@dataclass
class Probe:
    """A probing that is set up. `images` are those of "train" and "test", `kept` says whether only the vectors of
    poolers without parameters are kept."""

    source: str
    arguments: ProbeArguments
    data: DataArguments
    folder: Path
    console: Console
    model: torch.nn.Module
    splits: Splits
    images: dict[str, ImageViews]
    choices: list[PoolerChoice]
    layers: list[int]
    command: str
    kept: bool = False

    @property
    def title(self) -> str:
        return Path(self.source).name or Path(self.source).absolute().name

    @property
    def cache(self) -> Path:
        return Path(self.arguments.cache or CACHE).expanduser()

    @property
    def schedule(self) -> Schedule:
        return Schedule(**{one.name: getattr(self.arguments, one.name) for one in dataclasses.fields(Schedule)})


def probe(source: str, overrides: list[str] = (), console: Console | None = None) -> Path:
    """Probes a frozen encoder and writes everything into one folder.

    Args:
        source: a checkpoint of this project or a vision model of transformers: a folder, or an id on the Hub.
        overrides: `data.key=value` and `probe.key=value`.

    Returns:
        the folder.

    Raises:
        ValueError, OSError: something of the model, the data or the settings is wrong; nothing has been written but
            features that are worth keeping.
        KeyboardInterrupt: after Ctrl-C; what is in the cache stays there.
    """
    run = set_up(source, list(overrides), console or Console())
    started = time.perf_counter()
    try:
        results = measure(run)
    except KeyboardInterrupt:
        words = "stopped" if run.arguments.uncached else f"stopped; what was encoded stays in {run.cache}"
        run.console.print(f"{words}; go on with: {run.command}", highlight=False, soft_wrap=True)
        raise
    results["seconds"] = round(time.perf_counter() - started, 1)
    probe_report.write(results, run)
    run.console.print(f"output folder: {run.folder}", highlight=False, soft_wrap=True)
    return run.folder


# ---- before --------------------------------------------------------------------------------------------------------
def set_up(source: str, overrides: list[str], console: Console) -> Probe:
    """Checks everything that can be wrong, from the quickest to the slowest, and prints what will run."""
    changes = recipes.parse_overrides(overrides)
    for section in changes:
        if section not in ("data", "probe"):
            raise ValueError(f"hf-mim probe has the sections data and probe, and no {section!r}")
    recipes.check(changes, "the overrides")
    arguments, data = ProbeArguments(**changes.get("probe", {})), DataArguments(**changes.get("data", {}))
    if arguments.views > 1 and data.crop_scale is None:
        data = replace(data, crop_scale=VIEW_SCALE)
    check_labels(data)
    model = load_encoder(source).float()
    name = Path(source).name or Path(source).absolute().name
    folder = Path(arguments.output_dir or f"outputs/probe-{name}-{time.strftime('%Y-%m-%d-%H%M%S')}").expanduser()
    if (folder / "probe.json").exists():
        raise ValueError(f"{folder} holds another probing; choose another probe.output_dir, or remove it")
    console.print(f"output folder: {folder}", highlight=False, soft_wrap=True)
    choices = choose_poolers(arguments, model)
    needs = any(choice.make(model).needs_attentions for choice in choices)
    layers = choose_layers(model.encoder, arguments.layers, needs)
    splits = load_splits(data, model.config, seed=0)
    images = open_images(splits, data, model.config, arguments.views)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)
    command = shlex.join(["hf-mim", "probe", source, *overrides])
    return Probe(source, arguments, data, folder, console, model, splits, images, choices, layers, command)


def check_labels(data: DataArguments) -> None:
    """Raises:
    ValueError: there are no labels, or of a type that names no classes.
    """
    if data.streaming:
        raise ValueError("probing keeps what it has read and cannot stream: leave out data.streaming")
    splits = sources.open_dataset(data)
    features = splits[sources.choose_splits(splits, data)[0]].features
    _, label = sources.find_columns(features, data)
    if label is None:
        raise ValueError(
            f"probing needs labels, and no column seems to hold any; the columns are {', '.join(features)}. If one "
            "does, name it in data.label_column; of image files, put those of each class into a folder"
        )
    if not sources._is_class(features[label]):
        kind = getattr(features[label], "dtype", None) or type(features[label]).__name__
        raise ValueError(f"column {label!r} holds {kind}; labels are whole numbers or text: see data.label_column")


def choose_poolers(arguments: ProbeArguments, model) -> list[PoolerChoice]:
    """The poolers that were asked for, or the default ones.

    Raises:
        ValueError: one is unknown, or does not fit the encoder.
    """
    config = {name: dict(options) for name, options in (arguments.pooler_config or {}).items()}
    names = arguments.poolers
    if names is None:
        names = [name for name in DEFAULT_POOLERS if name != "cls" or model.encoder.has_cls_token]
        names += [name for name in config if name not in names]
        # As many queries as its default or, for widths that 32 does not divide, the most that do.
        config.setdefault("efficient", {}).setdefault("num_queries", math.gcd(32, model.encoder.hidden_size))
    for name in config:
        if name not in names and name != "efficient":
            raise ValueError(f"probe.pooler_config has options of {name!r}, which is not among probe.poolers")
        if "apply_final_norm" in config[name]:
            raise ValueError("apply_final_norm is the same for all poolers: set probe.apply_final_norm")
    options = {name: config.get(name, {}) for name in names}
    choices = [PoolerChoice(name, own.pop("pooler", name), own) for name, own in options.items()]
    for choice in choices:
        choice.make(model)  # that it fits the encoder
    return choices


def open_images(splits: Splits, data: DataArguments, config, views: int) -> dict[str, ImageViews]:
    """The images of both splits.

    Raises:
        ValueError: they cannot be probed on: labels are missing, there is one class, or fewer images than classes.
    """
    if splits.test is None:
        raise ValueError(f"probing needs labelled images, some of them to test on; here: {splits.note}")
    labels, classes = splits.train_eval.labels, splits.train_eval.classes
    if len(labels.unique()) < 2:
        raise ValueError(
            f"all {len(labels):,} training images are of one class, {classes[int(labels[0])]!r}: probing tells classes "
            "apart. Check data.label_column and, if the images are sorted by class, data.max_train_images"
        )
    if len(labels) < len(classes):
        raise ValueError(
            f"{len(labels):,} training images are fewer than the {len(classes):,} classes: give more images, or check "
            "data.label_column"
        )
    test = subset_indices(len(splits.test), data.max_eval_images or len(splits.test))
    augmented = splits.train if views > 1 else None
    return {
        "train": ImageViews(splits.train_eval, augmented, list(range(len(labels))), config, "train"),
        "test": ImageViews(splits.test, None, test, config, "test"),
    }


# ---- encoding ------------------------------------------------------------------------------------------------------
def make_features(run: Probe, model) -> Features:
    poolers = None
    if run.kept:
        scored = [PoolerChoice(name, name, {}) for name in probe_scores.POOLINGS]
        scored = [choice for choice in scored if choice.name != "cls" or model.encoder.has_cls_token]
        poolers = list({choice.name: choice for choice in [*scored, *run.choices]}.values())
    attention = any(choice.make(model).needs_attentions for choice in run.choices)
    final_norm = run.arguments.apply_final_norm
    return Features(model, run.layers, poolers, attention, final_norm, has_bf16())


def make_plans(run: Probe, models: dict) -> dict:
    """{column: {split: files}}; see `plan`."""
    found = {}
    for column, model in models.items():
        features = make_features(run, model)
        said = probe_report.describe_encoder(model, weights_hash(model))
        title = run.title if column == "trained" else f"{run.title}-untrained"
        views = {"train": run.arguments.views, "test": 1}
        found[column] = {
            split: plan(features, images, views[split], run.cache, said, title) for split, images in run.images.items()
        }
    return found


def encode(run: Probe, models: dict) -> dict:
    """Runs every encoder once over the data, unless its features are there. -> {column: {split: source}}

    Raises:
        ValueError: the disk is too small for the tokens that a pooler needs.
    """
    if run.arguments.uncached:
        views = {"train": run.arguments.views, "test": 1}
        return {
            column: {s: UncachedSource(make_features(run, model), run.images[s], views[s]) for s in run.images}
            for column, model in models.items()
        }
    run.kept = not any(is_learned(choice, run.model) for choice in run.choices)
    plans = fit_disk(run, models, make_plans(run, models))
    with progress(run.console, "{task.completed:,.0f}/{task.total:,.0f} images") as bar:
        for column, by_split in plans.items():
            features = make_features(run, models[column])
            for split, files in by_split.items():
                left = sum(max(file.count - file.done for file in view.values()) for view in files)
                task = bar.add_task(f"encoding, {column}, {split}", total=max(left, 1), visible=left > 0)
                fill(files, features, run.images[split], run.arguments.workers, lambda n, t=task: bar.advance(t, n))
    device = run.model.device
    return {column: {s: CachedSource(files, device) for s, files in found.items()} for column, found in plans.items()}


def is_learned(choice: PoolerChoice, model) -> bool:
    return any(True for _ in choice.make(model).parameters())


def fit_disk(run: Probe, models: dict, plans: dict) -> dict:
    """The plans, or those that keep less, if the disk is too small; says what will be written.

    Raises:
        ValueError: poolers were asked for that need more than there is.
    """

    def amount(of: dict) -> int:
        return sum(missing_bytes(files) for by_split in of.values() for files in by_split.values())

    needed, free = amount(plans), free_bytes(run.cache)
    what = "vectors of poolers without parameters" if run.kept else "tokens"
    numbers = f"{probe_report.size(needed)} in {run.cache}, where {probe_report.size(free)} are free"
    if needed > free:
        fixed = [choice for choice in run.choices if not is_learned(choice, run.model)]
        if run.kept or run.arguments.poolers is not None or not fixed:
            names = ", ".join(choice.name for choice in fixed) or "cls, mean, max"
            raise ValueError(
                f"the {what} need {numbers}: set probe.cache to a larger disk, take fewer probe.layers or probe.views, "
                f"set probe.untrained=false, or choose probe.poolers from those without parameters ({names})"
            )
        run.console.print(f"the tokens need {numbers}", style="yellow", highlight=False, soft_wrap=True)
        run.choices, run.kept = fixed, True
        names = ", ".join(choice.name for choice in fixed)
        words = f"so only pooled vectors are kept, and only the poolers without parameters are tried: {names}"
        run.console.print(words, style="yellow", highlight=False, soft_wrap=True)
        return fit_disk(run, models, make_plans(run, models))
    words = f"{what}: {numbers}" if needed else f"{what}: all of them are in {run.cache} already"
    run.console.print(words, highlight=False, soft_wrap=True)
    return plans


def progress(console: Console, counted: str = "") -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), *([TextColumn(counted)] if counted else [])]
    return Progress(*columns, TimeRemainingColumn(compact=True), console=console, transient=True)


# ---- measuring -----------------------------------------------------------------------------------------------------
def measure(run: Probe) -> dict:
    """Everything that goes into the report."""
    models = {"trained": run.model}
    if run.arguments.untrained:
        models["untrained"] = untrained_twin(run.model, seed=0).to(run.model.device)
    probe_report.describe(run)
    sources_of = encode(run, models)
    columns, examples = {}, {}
    for column, model in models.items():
        columns[column], heads, groups = probe_encoder(run, column, model, sources_of[column])
        if column == "trained":
            examples = probe_report.examples(run, sources_of[column]["test"], heads, groups)
    with run.console.status("k-NN and linear probe of the raw pixels"):
        raw = probe_scores.score_raw_pixels(run.images)
    return {"columns": columns, "raw_pixels": raw, "examples": examples}


def probe_encoder(run: Probe, column: str, model, sides: dict) -> tuple[dict, list[Trained], dict]:
    """Scores of one encoder, the best head of each pooler, and the groups that they belong to."""
    arguments, labels = run.arguments, run.images["train"].labels
    groups = [Group(choice, layer, model, run.kept) for choice in run.choices for layer in run.layers]
    rates, seeds = arguments.learning_rates, arguments.seeds
    many = f"{len(groups) * len(rates)} heads"
    trained = []
    with progress(run.console) as bar:
        for seed in seeds:
            task = bar.add_task(f"training, {column}, {many}, seed {seed}", total=1)
            trained += train_heads(
                sides["train"],
                labels,
                len(run.splits.train_eval.classes),
                groups,
                rates,
                run.schedule,
                arguments.validation,
                seed,
                lambda share, task=task: bar.advance(task, share),
            )
    by_setting = {(group.choice.name, group.layer): group for group in groups}
    best = choose_settings(trained)
    heads = {}
    for one in (one for members in best.values() for one in members):
        heads.setdefault(by_setting[one.name, one.layer], []).append(one)
    right = test_heads(sides["test"], run.images["test"].labels, heads, arguments.batch_size)
    with run.console.status(f"k-NN, linear probe and few labels, {column}"):
        scores = probe_scores.score_features(sides, run.images, run.layers[-1], model, seeds)
    poolers = {name: probe_report.entry(members, right) for name, members in best.items()}
    scores = {"poolers": poolers, **scores, "settings": probe_report.settings(trained)}
    return scores, [members[0] for members in best.values()], by_setting


def choose_settings(trained: list[Trained]) -> dict[str, list[Trained]]:
    """{pooler: its heads, one for each seed, of the layer and learning rate with the best mean validation accuracy}."""
    settings = {}
    for one in trained:
        settings.setdefault(one.setting, []).append(one)
    best = {}
    for (name, _, _), members in settings.items():
        accuracy = sum(one.accuracy for one in members) / len(members)
        loss = sum(one.loss for one in members) / len(members)
        if name not in best or (accuracy, -loss) > best[name][0]:
            best[name] = ((accuracy, -loss), members)
    return {name: members for name, (_, members) in best.items()}
