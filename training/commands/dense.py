"""The command `probe` with `task=dense`: what the patch tokens of a frozen encoder say of the place that they see."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import Size, size_title, unknown_choice
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.commands.probe_setup import REMEDY
from hf_mim.training.commands.segmentation import SHOWN, input_size
from hf_mim.training.common.console import RunConsole, make_table
from hf_mim.training.common.device import best_device, has_bf16, on_device
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.common.output_folder import choose_folder
from hf_mim.training.common.titles import name_of
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.masked import load_masked_splits
from hf_mim.training.data.urls import check_local
from hf_mim.training.evaluation.dense import UNITS, DenseProbeData, dense_protocol, measure
from hf_mim.training.evaluation.features import Features, choose_layers
from hf_mim.training.evaluation.metrics import READOUTS, SEGMENTATION, mask_intervals, score_masks
from hf_mim.training.own_data import SCENES, chosen_data, dataset_title, own_data
from hf_mim.training.plots.pictures import draw_masks
from hf_mim.training.run import Run, versions


TASKS = ("dense",)


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
    images: DenseProbeData

    def readers(self) -> dict[str, Features | None]:
        """{column: what reads the tokens of an encoder}; None for the raw pixels."""
        encoders = {"trained": self.model}
        if self.arguments.untrained:
            encoders["untrained"] = on_device(untrained_twin(self.model), self.model.device)
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
        images.splits.report,
        data=f"{dataset_title(run.data, SCENES)}, {len(images.train):,} training and {len(images.test):,} test images "
        f"at {size_title(images.size)}, {images.classes} classes; patches {size_title(images.grid)} an image, "
        f"{images.quota * len(images.train):,} training patches",
    )
    with run.owning_folder():
        results = measure(images, run.readers(), run.layer, SHOWN, run.console)
        write(run, results, time.perf_counter() - started)
    if (bad := images.splits.bad_images()).count:
        run.console.log(str(bad))
    run.console.show(results_table(results, images))
    run.log_next_steps()
    return run.folder


def set_up(source: str, overrides: Sequence[str], console: Console | RunConsole | None = None) -> DenseProbe:
    """Checks everything that can be wrong, from the quickest to the slowest, and prints where results will be."""
    console = RunConsole(console)
    overrides = recipes.expand_task(overrides, "probe")
    base = {"data": own_data([source], chosen_data(overrides), console, SCENES)}
    arguments, data = recipes.read_sections(overrides, base, probe=DenseArguments, data=DataArguments)
    check_local("probe.output_dir", arguments.output_dir)
    model = load_encoder(source).float()
    size = input_size(model, arguments.image_size, data.dataset is None)
    (layer,) = choose_layers(model.encoder, [arguments.layer])
    output = choose_folder(arguments.output_dir, f"dense-{name_of(source)}", ("dense.json",), REMEDY)
    splits = load_masked_splits(data, model.config, arguments.classes, console)
    run = DenseProbe(
        recipe=recipes.parse_overrides(overrides),
        arguments=arguments,
        data=data,
        output=output,
        console=console,
        source=source,
        model=on_device(model, best_device()),
        layer=layer,
        images=DenseProbeData(splits, model.config, size, model.encoder.token_grid(*size), arguments.patches),
    )
    run.log_sample(splits.sample)
    return run


def asks_for_dense(overrides: Sequence[str]) -> bool:
    """Whether a command line asks for this task: `task=dense`, or in full `probe.task=dense`.

    Raises:
        OptionError: it asks for an unknown task.
    """
    tasks = [word.partition("=")[2] for word in overrides if word.partition("=")[0] in ("task", "probe.task")]
    for task in tasks:
        if task not in TASKS:
            raise unknown_choice("probe.task", task, TASKS)
    return bool(tasks)


# ---- report --------------------------------------------------------------------------------------------------------
def write(run: DenseProbe, counted: dict, seconds: float) -> None:
    """Writes dense.json and dense.png; `counted` as of `measure`."""
    images = run.images
    results: dict = {
        column: {
            name: {unit: {**score_masks(entry[unit]), "intervals": mask_intervals(entry[unit])} for unit in UNITS}
            for name, entry in readers.items()
        }
        for column, readers in counted.items()
    }
    if "untrained" in counted:
        trained, untrained = counted["trained"], counted["untrained"]
        results["trained_minus_untrained"] = {
            name: {unit: mask_intervals(trained[name][unit], untrained[name][unit]) for unit in UNITS}
            for name in READOUTS
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
        "bad_images": asdict(images.splits.bad_images()),
        "protocol": dense_protocol(),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    draw_examples(images, counted, run.folder / "dense.png")
    run.write_json("dense.json", results)


def draw_examples(data: DenseProbeData, counted: dict, path: Path) -> None:
    """dense.png: the first test images, their masks, and what is read from the tokens of each encoder."""
    examples = [data.splits.test[i] for i in range(min(SHOWN, len(data.test)))]
    images, masks = map(list, zip(*examples, strict=True))
    maps = {readout.title: counted["trained"][name]["maps"] for name, readout in READOUTS.items()}
    if "untrained" in counted:
        maps["linear probe, untrained"] = counted["untrained"]["linear"]["maps"]
    draw_masks(images, masks, maps, data.splits.classes).save(path)


def constant(counts: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """The scores of saying everywhere what most training pixels are; `counts` (images, 3, classes) are of any
    prediction."""
    frequent, true = int(shares.argmax()), counts[:, 2]
    blind = np.zeros_like(counts)
    blind[:, 2], blind[:, 0, frequent], blind[:, 1, frequent] = true, true[:, frequent], true.sum(axis=1)
    return score_masks(blind)


def results_table(counted: dict, images: DenseProbeData) -> Table:
    blind = constant(counted["trained"]["linear"]["pixels"], images.splits.shares)["mean_iou"]
    measures = [(key, metric.title, "pixels") for key, metric in SEGMENTATION.items()]
    measures.append(("mean_iou", "mean IoU of patches", "patches"))
    return make_table(
        ("", *(column.replace("_", " ") for column in counted)),
        [
            (f"{readout.title}, {title}", *(cell(readouts[name][unit], key) for readouts in counted.values()))
            for name, readout in READOUTS.items()
            for key, title, unit in measures
        ],
        title="masks from frozen patch tokens, percent",
        caption=f"{len(images.test):,} test images; intervals over images, 95 percent. Everywhere the most frequent "
        f"class: mean IoU {blind:.1f}",
    )


def cell(counts: np.ndarray, key: str) -> str:
    low, high = mask_intervals(counts)[key]
    return f"{score_masks(counts)[key]:.1f} ({low:.1f}-{high:.1f})"
