"""Setting up a probing: its arguments, and everything that can be wrong before it runs."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.device import best_device, on_device
from hf_mim.training.common.errors import DataError, RecipeError
from hf_mim.training.common.output_folder import choose_folder
from hf_mim.training.common.titles import name_of
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.columns import find_columns, is_class
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.pretraining import Splits, load_splits
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import choose_splits, draw_labelled
from hf_mim.training.data.urls import check_local
from hf_mim.training.evaluation.features import ImageViews, PoolerChoice, choose_layers
from hf_mim.training.evaluation.heads import LEARNING_RATES, OPTIMIZERS, Schedule
from hf_mim.training.own_data import chosen_data, own_data
from hf_mim.training.plots.charts import check_figures
from hf_mim.training.run import Run


DEFAULT_POOLERS = ("cls", "mean", "abmilp", "efficient")
VIEW_SCALE = [0.2, 1.0]  # area of the random crops of further views, where data.crop_scale says nothing
CACHE = "outputs/token-cache"
REMEDY = "choose another probe.output_dir, or remove that folder"


@dataclass
class ProbeArguments:
    """The section `probe`.

    Args:
        poolers: names of poolers; None is cls (where there is a class token), mean, abmilp and efficient.
        pooler_config: options of poolers by name. With `pooler` among them the name is one of your own:
            `{deep: {pooler: abmilp, depth: 2}}` makes `deep` a pooler.
        layers: whose tokens to read; -1 is the last, 0 the embedding.
        learning_rates: each pooler tries all of them; None is three around a usual one.
        seeds: of the held-out images, the order and the parameters. The first chooses each pooler's layer and learning
            rate, the others train only those.
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
        figures: png; or svg or pdf, for papers: the chart is written in that format too, beside the PNG.
        output_dir: None is `outputs/probe-<model>-<date>`.

    Raises:
        RecipeError: a value is out of range.
    """

    poolers: list[str] | None = None
    pooler_config: dict | None = None
    layers: list[int] = field(default_factory=lambda: [-1])
    learning_rates: list[float] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    views: int = 1
    epochs: int = 20
    patience: int = 5
    batch_size: int = 256
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    validation: float = 0.1
    apply_final_norm: bool = True
    untrained: bool = True
    uncached: bool = False
    cache: str | None = None
    workers: int = 0
    figures: str = "png"
    output_dir: str | None = None

    def __post_init__(self):
        check_figures("probe.figures", self.figures)
        if self.optimizer not in OPTIMIZERS:
            raise out_of_range("optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer)
        if self.learning_rates is None:
            self.learning_rates = list(LEARNING_RATES[self.optimizer])
        for name, least in (("views", 1), ("epochs", 1), ("patience", 1), ("batch_size", 2), ("workers", 0)):
            if getattr(self, name) < least:
                raise out_of_range(name, f"at least {least}", getattr(self, name))
        for name in ("layers", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise RecipeError(f"probe.{name} must hold one value or more, each once, not {values}", f"probe.{name}")
        if self.poolers is not None and (not self.poolers or len(set(self.poolers)) < len(self.poolers)):
            message = f"probe.poolers must name one pooler or more, each once, not {self.poolers}"
            raise RecipeError(message, "probe.poolers")
        for name, options in (self.pooler_config or {}).items():
            key = f"probe.pooler_config.{name}"
            if not isinstance(options, dict):
                raise RecipeError(f"{key} must be options, such as {{depth: 2}}, not {options}", "probe.pooler_config")
            if not isinstance(options.get("pooler", ""), str):
                message = f"{key}.pooler must be the name of a pooler, not {options['pooler']}"
                raise RecipeError(message, "probe.pooler_config")
        if not all(rate > 0 for rate in self.learning_rates):
            raise out_of_range("learning_rates", "above 0", self.learning_rates)
        if not 0 < self.validation < 1:
            raise out_of_range("validation", "a share between 0 and 1", self.validation)

    @property
    def rates(self) -> list[float]:
        """The learning rates, of which None has become the usual ones."""
        return self.learning_rates or []


def out_of_range(name: str, requirement: str, value: object) -> RecipeError:
    return RecipeError(f"probe.{name} must be {requirement}, not {value!r}", f"probe.{name}")


@dataclass(kw_only=True)
class Probe(Run):
    """A probing that is set up.

    Args:
        images: those of "train" and "test".
        command: that runs it again.
        vectors_only: whether only the vectors of poolers without parameters are kept.
    """

    source: str
    arguments: ProbeArguments
    model: MIMModel = field(repr=False)
    splits: Splits
    images: dict[str, ImageViews]
    choices: list[PoolerChoice]
    layers: list[int]
    command: str
    vectors_only: bool = False

    @property
    def title(self) -> str:
        return name_of(self.source)

    @property
    def num_classes(self) -> int:
        return 0 if self.splits.train_eval is None else len(self.splits.train_eval.classes)

    @property
    def cache(self) -> Path:
        return Path(self.arguments.cache or CACHE).expanduser()

    @property
    def schedule(self) -> Schedule:
        names = [entry.name for entry in dataclasses.fields(Schedule)]
        return Schedule(**{name: getattr(self.arguments, name) for name in names})


def set_up(source: str, overrides: Sequence[str], console: Console | RunConsole | None = None) -> Probe:
    """Checks everything that can be wrong, from the quickest to the slowest, and prints where results will be."""
    console = RunConsole(console)
    base = {"data": own_data([source], chosen_data(overrides), console)}
    arguments, data = recipes.read_sections(overrides, base, probe=ProbeArguments, data=DataArguments)
    check_local("probe.output_dir", arguments.output_dir)
    if arguments.views > 1 and data.crop_scale is None:
        data = replace(data, crop_scale=VIEW_SCALE)
    check_labels(data)
    model = load_encoder(source).float()
    output = choose_folder(arguments.output_dir, f"probe-{name_of(source)}", ("probe.json",), REMEDY)
    choices = choose_poolers(arguments, model)
    needs_attentions = any(choice.make(model).needs_attentions for choice in choices)
    layers = choose_layers(model.encoder, arguments.layers, needs_attentions)
    splits = load_splits(data, model.config, seed=0)
    data = splits.data
    images = open_images(splits, data, model.config, arguments.views)
    run = Probe(
        recipe=recipes.parse_overrides(overrides),
        arguments=arguments,
        data=data,
        output=output,
        console=console,
        source=source,
        model=on_device(model, best_device()),
        splits=splits,
        images=images,
        choices=choices,
        layers=layers,
        command=shlex.join(["hf-mim", "probe", source, *overrides]),
    )
    run.log_sample(splits.sample)
    return run


def check_labels(data: DataArguments) -> None:
    """Raises:
    RecipeError: the data is streamed.
    DataError: there are no labels, or of a type that names no classes.
    """
    if data.streaming:
        raise RecipeError("probing reads its images more than once: set data.streaming=false", "data.streaming")
    splits = open_dataset(data)
    features = splits[choose_splits(splits, data)[0]].features
    _, label = find_columns(features, data)
    if label is None:
        raise DataError(
            f"probing needs labels, and no column seems to hold any; the columns are {', '.join(features)}. If one "
            "does, name it in data.label_column; of image files, put those of each class into a folder"
        )
    if not is_class(features[label]):
        kind = getattr(features[label], "dtype", None) or type(features[label]).__name__
        message = f"column {label!r} holds {kind}; labels are whole numbers or text: see data.label_column"
        raise DataError(message, label)


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
            message = f"probe.pooler_config has options of {name!r}, which is not among probe.poolers"
            raise RecipeError(message, "probe.pooler_config")
        if "apply_final_norm" in config[name]:
            message = "apply_final_norm is the same for all poolers: set probe.apply_final_norm"
            raise RecipeError(message, "probe.pooler_config")
    options = {name: config.get(name, {}) for name in names}
    choices = [PoolerChoice(name, chosen.pop("pooler", name), chosen) for name, chosen in options.items()]
    for choice in choices:
        choice.make(model)  # that it fits the encoder
    return choices


def open_images(splits: Splits, data: DataArguments, config, views: int) -> dict[str, ImageViews]:
    """The images of both splits.

    Raises:
        DataError: they cannot be probed on: labels are missing, there is one class, or fewer images than classes.
    """
    labels, test_labels = (None if split is None else split.labels for split in (splits.train_eval, splits.test))
    if splits.test is None or splits.train_eval is None or labels is None or test_labels is None:
        raise DataError(f"probing needs labelled images, some of them to test on; here: {splits.note}")
    classes, train = splits.train_eval.classes, draw_labelled(labels.numpy()).tolist()
    labels = labels[train]
    if len(labels.unique()) < 2:
        raise DataError(
            f"all {len(labels):,} training images are of one class, {classes[int(labels[0])]!r}: probing tells classes "
            "apart. Check data.label_column and, if the images are sorted by class, data.max_train_images"
        )
    if len(labels) < len(classes):
        raise DataError(
            f"{len(labels):,} training images are fewer than the {len(classes):,} classes: give more images, or check "
            "data.label_column"
        )
    test = draw_labelled(test_labels.numpy(), data.max_eval_images or len(splits.test)).tolist()
    augmented = splits.train if views > 1 and isinstance(splits.train, MIMDataset) else None
    return {
        "train": ImageViews(splits.train_eval, augmented, train, config, "train"),
        "test": ImageViews(splits.test, None, test, config, "test"),
    }
