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
from hf_mim.analysis.interaction_models import measure_interactions, plan_of
from hf_mim.analysis.measurement import Measurement
from hf_mim.analysis.report import write_report
from hf_mim.analysis.shared_pass import measure
from hf_mim.modeling.encoder_base import Grid
from hf_mim.modeling.modeling_mim import MIMModel
from hf_mim.modeling.options import pair, unknown_choice
from hf_mim.modeling.target_base import displayable
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import load_encoder, untrained_twin
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.device import best_device
from hf_mim.training.common.errors import CheckpointError, RecipeError
from hf_mim.training.common.output_folder import choose_folder
from hf_mim.training.common.titles import name_of
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.urls import check_local
from hf_mim.training.own_data import chosen_data, dataset_title, own_data
from hf_mim.training.plots.charts import check_figures
from hf_mim.training.run import Run, versions


FORMAT = 1  # of report.json
REMEDY = "choose another analyze.output_dir, or remove that folder"
# What of a config says which encoder is built and what it sees.
ENCODER_FIELDS: tuple[str, ...] = ("encoder", "encoder_config", "image_size", "num_channels", "image_mean", "image_std")
ENCODER_FIELDS += ("value_range", "nodata", "eval_crop")


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
        figures: png; or svg or pdf, for papers: figures are written in that format too, beside the PNG.
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
    figures: str = "png"
    output_dir: str | None = None

    def __post_init__(self):
        check_figures("analyze.figures", self.figures)
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


@dataclass(kw_only=True)
class Analysis(Run):
    """An analysis that is set up."""

    arguments: AnalyzeArguments
    choice: Choice
    subjects: list[Subject]

    def write_report_json(self, results: dict) -> None:
        self.write_json("report.json", results, indent=1, allow_nan=False)


def analyze(sources: list[str], overrides: Sequence[str] = (), console: Console | RunConsole | None = None) -> Path:
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
    started, run = time.perf_counter(), set_up(sources, overrides, console)
    command = shlex.join(["hf-mim", "analyze", *sources, *overrides])
    with run.owning_folder():
        measure_and_write(run, command, started)
    run.log_next_steps(f"the report: {shlex.quote(str(run.folder / 'report.html'))}")
    return run.folder


def measure_and_write(run: Analysis, command: str, started: float) -> None:
    measure_all(run.subjects, run.arguments, run.console)
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    results = {"format": FORMAT, "command": command, "date": date, **collect(run)}
    if (plan := plan_of(run.arguments.interaction, run.arguments.seed)) is not None:
        run.write_report_json(results)  # now: this takes minutes, and may be stopped
        interactions = measure_interactions(run.subjects, plan, run.data, run.arguments, run.folder, run.console)
        for label, result in interactions.items():
            results["encoders"][label]["results"]["interaction"] = result
    results["seconds"] = round(time.perf_counter() - started, 1)
    run.write_report_json(results)
    write_report(run.folder, results, run.arguments.figures)


# ---- before --------------------------------------------------------------------------------------------------------
def set_up(sources: list[str], overrides: Sequence[str], console: Console | RunConsole | None) -> Analysis:
    """Checks everything that can be wrong, from the quickest to the slowest, and prints what will run."""
    console = RunConsole(console)
    base = {"data": own_data(sources, chosen_data(overrides), console)}
    data, arguments = recipes.read_sections(overrides, base, data=DataArguments, analyze=AnalyzeArguments)
    check_sources(sources)
    check_local("analyze.output_dir", arguments.output_dir)
    stem = f"analyze-{name_of(sources[0])}" + (f"-and-{len(sources) - 1}-more" if len(sources) > 1 else "")
    # report.json alone is of a run that was stopped
    output = choose_folder(arguments.output_dir, stem, ("report.html",), REMEDY)
    choice = choose_images(data, arguments.images, arguments.prototype_images)
    console.log("\n".join(choice.report))
    subjects = load_subjects(sources, choice, data, arguments)
    for images in {id(subject.images): subject.images for subject in subjects}.values():
        images.log_sample(console)
    console.log(f"{len(choice.measured)} images, {choice.note} of {dataset_title(data)}")
    return Analysis(
        recipe=recipes.parse_overrides(overrides),
        arguments=arguments,
        data=data,
        output=output,
        console=console,
        choice=choice,
        subjects=subjects,
    )


def check_sources(sources: list[str]) -> None:
    """Raises:
    CheckpointError: there is none, or one is given twice.
    """
    if not sources:
        raise CheckpointError("which encoder? hf-mim analyze CHECKPOINT [CHECKPOINT ...]")
    places = [os.path.realpath(source) if os.path.exists(source) else source for source in sources]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise CheckpointError(f"{sources[i]} is given twice", sources[i])


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
            nn.Module.to(subject.model, best_device())
            advance = partial(bar.advance, task)
            subject.measured = measure(subject.model, subject.images, arguments, shared, advance)
            nn.Module.to(subject.model, "cpu")


# ---- after ---------------------------------------------------------------------------------------------------------
def collect(run: Analysis) -> dict:
    """What was measured, on what; writes the example images."""
    first = run.subjects[0].images
    return {
        "versions": versions(),
        "seed": run.arguments.seed,
        "data": {
            "dataset": dataset_title(run.data),
            "from": run.choice.note,
            "images": len(first.measured),
            "prototype_images": len(first.others) if first.others is not None else 0,
            "classes": first.classes,
        },
        "examples": save_examples(first, run.folder, run.arguments.examples),
        "encoders": {subject.label: describe(subject) for subject in run.subjects},
        "between": between(run.subjects),
    }


def describe(subject: Subject) -> dict:
    """An encoder's entry in the report."""
    config, encoder = subject.model.config, subject.model.encoder
    kind = config.options("encoder").get("model_type")
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
    shown = displayable(pixel_values, *images.config.statistics(), images.config.display_bands)
    for i, image in enumerate(shown):
        names.append(f"example-{i}.png")
        to_pil_image(image).save(folder / names[-1])
    return names
