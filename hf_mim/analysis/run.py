"""The command `analyze`: several encoders, and each one untrained, measured on the same images in one pass each."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torchvision.transforms.functional import to_pil_image

from hf_mim.analysis import MEASUREMENTS
from hf_mim.analysis.images import Choice, EncoderImages, choose_images
from hf_mim.analysis.interaction_models import device, measure_interactions, plan_of
from hf_mim.analysis.measurement import Measurement
from hf_mim.analysis.report import write_report
from hf_mim.analysis.shared_pass import measure
from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair, unknown_choice
from hf_mim.modeling.target_base import displayable
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.console import RunConsole
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.urls import check_local
from hf_mim.training.errors import CheckpointError, FolderError, RecipeError
from hf_mim.training.run import versions


FORMAT = 1  # of report.json
SHIPPED = "the Fashion-MNIST subset (shipped)"
# What of a config says which encoder is built and what it sees.
ENCODER_FIELDS = ("encoder", "encoder_config", "image_size", "num_channels", "image_mean", "image_std")


@dataclass
class AnalyzeArguments:
    """The section `analyze` of the overrides.

    Args:
        images: how many to measure on, at most.
        prototype_images: how many labelled others class prototypes come from, at most.
        examples: of how many images maps are shown.
        measurements: which ones; null is all of them.
        image_size: to look at all encoders at this size; null is each one's own.
        interaction: true also measures interactions of parts of images, which takes minutes; paper with the published
            counts; or fields of `interaction.Plan`, as in analyze.interaction.pairs=50.
        batch_size: how many images at a time. The results do not depend on it.
        seed: of the untrained encoders, and of what is drawn at random.
        output_dir: the folder to write into; null makes one below `outputs`.
    """

    images: int = 500
    prototype_images: int = 200
    examples: int = 6
    measurements: list[str] | None = None
    image_size: int | list[int] | None = None
    interaction: bool | str | dict = False
    batch_size: int = 32
    seed: int = 0
    output_dir: str | None = None

    def __post_init__(self):
        for name, least in (("images", 2), ("prototype_images", 1), ("examples", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                message = f"analyze.{name} must be at least {least}, not {getattr(self, name)}"
                raise RecipeError(message, f"analyze.{name}")
        for name in self.measurements or []:
            if name not in MEASUREMENTS:
                raise unknown_choice("measurement", name, MEASUREMENTS)
        if self.image_size is not None:
            pair(self.image_size)
        plan_of(self.interaction)  # raises where it is wrong


@dataclass
class Subject:
    """An encoder that is measured.

    source: what was given; None where it is untrained.
    twin: the label of the untrained encoder of the same config; None where it is one.
    images: as this encoder sees them.
    """

    label: str
    model: MIMModel
    source: str | None
    twin: str | None
    images: EncoderImages
    measured: dict[str, Measurement] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        return self.model.encoder.token_grid(*self.images.size)


def analyze(sources: list[str], overrides: Sequence[str] = (), console: Console | None = None) -> Path:
    """Measures encoders, always with the untrained encoder of the same config beside them, and writes a report.

    Args:
        sources: checkpoints of this project, or vision models of transformers; folders, or ids on the Hub.
        overrides: `data.key=value` and `analyze.key=value`; see `DataArguments` and `AnalyzeArguments`.
        console: where to print; None is the terminal.

    Returns:
        the folder, with `report.json` and what `report.write_report` makes of it.

    Raises:
        ValueError, OSError: a source, an override or the data is wrong; nothing has been written.
    """
    screen, started = RunConsole(console), time.perf_counter()
    data, arguments = recipes.read_sections(list(overrides), data=DataArguments, analyze=AnalyzeArguments)
    folder = choose_folder(check_sources(sources), arguments.output_dir)
    screen.log(f"output folder: {folder}")
    choice = choose_images(data, arguments.images, arguments.prototype_images)
    subjects = load_subjects(sources, choice, data, arguments)
    screen.log(f"{len(choice.measured)} images, {choice.note} of {data.dataset or SHIPPED}")
    measure_all(subjects, arguments, screen)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "format": FORMAT,
        "command": shlex.join(["hf-mim", "analyze", *sources, *overrides]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        **collect(subjects, choice, data, arguments, folder),
    }
    if (plan := plan_of(arguments.interaction, arguments.seed)) is not None:
        write_json(results, folder / "report.json")  # now: this takes minutes, and may be stopped
        for label, result in measure_interactions(subjects, plan, data, arguments, folder, screen).items():
            results["encoders"][label]["results"]["interaction"] = result
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(results, folder / "report.json")
    write_report(folder, results)
    screen.log(f"output folder: {folder}")
    return folder


# ---- before --------------------------------------------------------------------------------------------------------
def check_sources(sources: list[str]) -> list[str]:
    """Raises:
    CheckpointError: there is none, or one is given twice.
    """
    if not sources:
        raise CheckpointError("which encoder? hf-mim analyze CHECKPOINT [CHECKPOINT ...]")
    places = [os.path.realpath(source) if os.path.exists(source) else source for source in sources]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise CheckpointError(f"{sources[i]} is given twice", sources[i])
    return sources


def choose_folder(sources: list[str], output_dir: str | None) -> Path:
    """Raises:
    FolderError: there is a file, or another report.
    """
    check_local("analyze.output_dir", output_dir)
    name = Path(sources[0]).resolve().name if os.path.exists(sources[0]) else sources[0].rpartition("/")[2]
    name += f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
    folder = Path(output_dir or f"outputs/analyze-{name}-{time.strftime('%Y-%m-%d-%H%M%S')}").expanduser()
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"the output folder {folder} is a file", str(folder))
    if (folder / "report.html").exists():  # report.json alone is of a run that was stopped, and can go on
        message = f"{folder} holds another report; choose another analyze.output_dir, or remove it"
        raise FolderError(message, str(folder))
    return folder


def labels_for(sources: list[str]) -> list[str]:
    """Short names, all different: the last part of each path, or as much more as it takes."""
    parts = [os.path.normpath(source).split(os.sep) for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(sources)


def load_subjects(sources: list[str], choice: Choice, data: DataArguments, arguments) -> list[Subject]:
    """Every encoder, and after those of the same config their untrained twin."""
    models = [load_encoder(source).float() for source in sources]
    subjects, twins, images = [], {}, {}
    for label, source, model in zip(labels_for(sources), sources, models):
        config = model.config
        key = json.dumps([getattr(config, name) for name in ENCODER_FIELDS], sort_keys=True, default=str)
        sees = json.dumps([getattr(config, name) for name in ENCODER_FIELDS[2:]])
        if sees not in images:
            images[sees] = EncoderImages(choice, config, data, arguments.image_size)
        if key not in twins:
            twin = untrained_twin(model, arguments.seed).float()
            twins[key] = Subject(f"untrained {label}", twin, None, None, images[sees])
        subjects.append(Subject(label, model, source, twins[key].label, images[sees]))
        check_tokens(label, model, subjects[-1].images.size)
    return subjects + list(twins.values())


@torch.inference_mode()
def check_tokens(label: str, model: MIMModel, size: tuple[int, int]) -> None:
    """Raises:
    CheckpointError: images of this size do not fit the encoder, or its tokens are not finite, or not those of a grid.
    """
    rows, cols = model.encoder.token_grid(*size)
    try:
        tokens = model(torch.zeros(1, model.config.num_channels, *size)).last_hidden_state
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        message = f"{label} cannot be run on images of {size[0]}x{size[1]} pixels: {reason}"
        raise CheckpointError(message, label) from error
    if not tokens.isfinite().all():
        raise CheckpointError(f"{label} gives values that are not finite; run hf-mim doctor on it", label)
    if tokens.shape[1] != model.encoder.num_prefix_tokens + rows * cols:
        raise CheckpointError(
            f"{label} cannot be analysed: it gives {tokens.shape[1]} tokens, where a {rows}x{cols} grid and "
            f"{model.encoder.num_prefix_tokens} prefix tokens were expected",
            label,
        )


def common_grid(grids: list[Grid]) -> Grid | None:
    """The largest number of rows and columns that all grids have; those of fewer than four tokens do not count."""
    grids = [grid for grid in grids if grid[0] * grid[1] >= 4]
    return (min(rows for rows, _ in grids), min(cols for _, cols in grids)) if grids else None


# ---- the pass ------------------------------------------------------------------------------------------------------
def measure_all(subjects: list[Subject], arguments: AnalyzeArguments, console: RunConsole) -> None:
    shared = common_grid([subject.grid for subject in subjects])
    with console.progress("{task.completed:,.0f}/{task.total:,.0f} images") as bar:
        task = bar.add_task("", total=sum(subject.images.passes for subject in subjects))
        for subject in subjects:
            bar.update(task, description=subject.label)
            nn.Module.to(subject.model, device())
            advance = partial(bar.advance, task)
            subject.measured = measure(subject.model, subject.images, arguments, shared, advance)
            nn.Module.to(subject.model, "cpu")


# ---- after ---------------------------------------------------------------------------------------------------------
def collect(subjects: list[Subject], choice: Choice, data: DataArguments, arguments, folder: Path) -> dict:
    """What was measured, on what; writes the example images."""
    first = subjects[0].images
    return {
        "versions": versions(),
        "seed": arguments.seed,
        "data": {
            "dataset": data.dataset or SHIPPED,
            "from": choice.note,
            "images": len(first.measured),
            "prototype_images": len(first.others) if first.others is not None else 0,
            "classes": first.classes,
        },
        "examples": save_examples(first, folder, arguments.examples),
        "encoders": {subject.label: describe(subject) for subject in subjects},
        "between": between(subjects),
    }


def describe(subject: Subject) -> dict:
    """An encoder's entry in the report."""
    config, encoder = subject.model.config, subject.model.encoder
    kind = config.encoder_config.get("model_type")
    return {
        "source": subject.source,
        "untrained": subject.source is None,
        "twin": subject.twin,
        "encoder": f"{config.encoder} {kind}" if kind else config.encoder,
        "parameters": subject.model.num_parameters(),
        "hidden_size": encoder.hidden_size,
        "layers": len(encoder.stage_names) - 1,
        "image_size": list(subject.images.size),
        "grid": list(subject.grid),
        "has_cls_token": encoder.has_cls_token,
        "prefix_tokens": encoder.num_prefix_tokens,
        "results": {
            name: {"title": measured.title, "absent": measured.absent} if measured.absent else measured.result()
            for name, measured in subject.measured.items()
        },
    }


def between(subjects: list[Subject]) -> dict:
    """What measurements say of several encoders together: {measurement: its result}."""
    results = {}
    for name in subjects[0].measured:
        measured = {subject.label: subject.measured[name] for subject in subjects}
        present = {label: measurement for label, measurement in measured.items() if measurement.absent is None}
        result = MEASUREMENTS[name].compare(present)
        if result is not None:
            results[name] = result
    return results


def save_examples(images: EncoderImages, folder: Path, count: int) -> list[str]:
    """Writes the first images as `example-<i>.png`, as the first encoder sees them; returns the files' names."""
    count = min(count, len(images.measured))
    if count == 0:
        return []
    names, (pixel_values, _) = [], next(images.batches(count))
    shown = displayable(pixel_values, images.config.image_mean, images.config.image_std)
    for i, image in enumerate(shown):
        names.append(f"example-{i}.png")
        to_pil_image(image).save(folder / names[-1])
    return names


def write_json(results: dict, path: Path) -> None:
    """Atomically: a report that is there is whole."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
