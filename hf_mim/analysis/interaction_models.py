"""Interactions of encoders, as a measurement of its own: `analyze.interaction=true`. The estimator is in
`interaction.py`."""

import dataclasses
import hashlib
import inspect
import math
from pathlib import Path
from typing import get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.analysis import interaction
from hf_mim.analysis.images import EncoderImages, choose_images
from hf_mim.analysis.interaction import PAPER, Partial, Plan
from hf_mim.analysis.measurement import number
from hf_mim.modeling.modeling_mim import MIMForImageClassification, MIMModel
from hf_mim.modeling.options import is_of, unknown_choice
from hf_mim.training.checkpoint import load_checkpoint, load_config
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.device import best_device
from hf_mim.training.common.errors import RecipeError
from hf_mim.training.evaluation.frozen import extract_features, pixel_loader
from hf_mim.training.evaluation.readouts import LinearProbe


TITLE = "Interaction strength"
NORMAL = (
    "Networks tend to have their strongest interactions where very few or nearly all other parts are present, and weak "
    "ones in between (Deng et al.); masked image modeling is reported to raise the middle orders (A2MIM). Curves that "
    "lie within each other's bands are not different. A sign of trouble is a trained encoder whose curve is that of "
    "its untrained twin."
)
PROBE_IMAGES = 1000  # labelled images that the linear probe is fitted on
MIDDLE = (0.25, 0.75)  # the orders that are called middle
# name of a number -> what `summarize` calls it, and its title
SIZES = (
    ("size", "mean", "Interaction of two parts, size"),
    ("between_images", "between_images", "Its spread between images"),
    ("between_pairs", "between_pairs", "Its spread between pairs"),
    ("from_contexts", "from_contexts", "Its error by few contexts"),
)
MINUTES = 10  # beyond, the estimate says how to make it shorter


def plan_of(option, seed: int = 0) -> Plan | None:
    """What `analyze.interaction` says: false, true, paper, or a dict of fields of `Plan`. -> None for false.

    Raises:
        ValueError: none of these, or a field is unknown or has a bad value.
    """
    if option is None or option is False:
        return None
    if isinstance(option, str):
        if option != "paper":
            message = f"analyze.interaction must be true, false, paper or options, not {option!r}"
            raise RecipeError(message, "analyze.interaction")
        option = PAPER
    options = dict(option) if isinstance(option, dict) else {}
    annotations = get_type_hints(Plan)
    for name, value in options.items():
        if name not in annotations:
            raise unknown_choice("option of analyze.interaction", name, annotations)
        if not is_of(value, annotations[name]):
            expected = inspect.formatannotation(annotations[name])
            raise RecipeError(f"analyze.interaction.{name} must be {expected}, not {value!r}", "analyze.interaction")
        options[name] = tuple(value) if isinstance(value, list) else value
    return Plan(**{"seed": seed, **options})


def measure_interactions(
    subjects: list, plan: Plan, data, arguments, folder: Path, console: RunConsole
) -> dict[str, dict]:
    """The results of several encoders with the same images, pairs and contexts: {label: result}.

    What is done is kept in `folder`/interaction: the same command goes on there after an interruption.

    Args:
        subjects: with `label`, `source`, `model`, `images`; see `run.Subject`.
        data, arguments: `DataArguments` and `AnalyzeArguments`.
    """
    if subjects[0].images.others is None:
        return {
            subject.label: {"title": TITLE, "absent": "It needs labels, and the images have none."}
            for subject in subjects
        }
    # The same images as in the shared pass, with more labelled others beside them.
    choice = choose_images(data, max(arguments.images, plan.images), PROBE_IMAGES)
    jobs = []
    with console.rich.status("interactions: fitting the classifiers"):
        for subject in subjects:
            subject.model.to(best_device())
            images = EncoderImages(choice, subject.model.config, data, arguments.image_size)
            jobs.append(Job(subject, plan, images, arguments.batch_size, folder / "interaction"))
    console.log(estimate(jobs, plan))
    with console.progress("{task.completed:,.0f}/{task.total:,.0f} masked images") as bar:
        task = bar.add_task("", total=sum(job.rows_left for job in jobs))
        try:
            for job in jobs:
                bar.update(task, description=f"interactions: {job.label}")
                job.run(lambda rows: bar.advance(task, rows))
        except KeyboardInterrupt:
            console.log(f"stopped; to go on, run the same command with analyze.output_dir={folder}")
            raise
    return {job.label: job.result() for job in jobs}


def estimate(jobs: list["Job"], plan: Plan) -> str:
    """How much there is to do, and how long it takes."""
    left = sum(job.rows_left for job in jobs)
    minutes = sum(job.rows_left * job.seconds_per_row() for job in jobs) / 60
    done = sum(int(job.partial.done.sum()) for job in jobs)
    message = f"interactions: {left:,} masked images for {len(jobs)} encoders, about "
    message += f"{minutes:.0f} minutes" if minutes >= 2 else f"{max(1, round(60 * minutes))} seconds"
    message += f"; {done} of {len(jobs) * plan.images} images were done before" if done else ""
    message += f"; fewer with analyze.interaction.images={max(2, plan.images // 4)}" if minutes > MINUTES else ""
    return message


class Job:
    """The interactions of one encoder.

    Attributes:
        rows_left: masked images that are still to be classified.
    """

    def __init__(self, subject, plan: Plan, images: EncoderImages, batch_size: int, folder: Path):
        plan = dataclasses.replace(plan, images=min(plan.images, len(images.measured)))
        self.label, self.plan, self.batch_size = subject.label, plan, max(batch_size, 64)
        pixel_values, labels = next(images.batches(plan.images))
        self.pixel_values, self.labels = pixel_values.to(best_device()), labels.tolist()
        self.classify, self.classifier = classifier_of(subject.source, subject.model, images)
        self.right = accuracy_of(self.classify, images)
        digest = hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest()
        # With the label: two encoders of equal weights must not write one file.
        identity = f"{self.label} {interaction.weights_of(subject.model)} {digest} {self.labels} {self.classifier}"
        self.partial = Partial(folder, plan, identity)

    @property
    def rows_left(self) -> int:
        return int((~self.partial.done).sum()) * self.plan.rows_per_image

    def seconds_per_row(self) -> float:
        return (
            interaction.seconds_per_row(self.classify, self.pixel_values[0], self.batch_size) if self.rows_left else 0
        )

    def run(self, advance) -> None:
        for i in range(self.plan.images):
            if not self.partial.done[i]:
                image, label = self.pixel_values[i], self.labels[i]
                arguments = (self.classify, image, label, self.plan, i, self.batch_size, advance)
                self.partial.add(i, *interaction.interactions_of_image(*arguments))

    def result(self) -> dict:
        """In the form of `measurement.py`."""
        plan, found = self.plan, interaction.summarize(self.partial.found, self.partial.errors, self.plan.seed)
        middle = [MIDDLE[0] <= order <= MIDDLE[1] for order in plan.orders]
        axes = {"x": list(plan.orders), "x_label": "share of the other parts that are present", "unit": ""}
        curve = {name: found[key].tolist() for name, key in (("mean", "J"), ("low", "low"), ("high", "high"))}
        strongest = plan.orders[int(found["J"].argmax())]
        summary = f"Two parts of an image interact most where {100 * strongest:.0f} % of the others are present"
        scalars = {}
        if any(middle) and not all(middle):
            level, low, high = interaction.mean_strength(self.partial.found, middle, plan.seed)
            summary += f"; with {100 * MIDDLE[0]:.0f} to {100 * MIDDLE[1]:.0f} % of them it is {level:.2f} "
            summary += f"({low:.2f} to {high:.2f}) times their average over all orders"
            middle_strength = number("Strength at the middle orders", level, "of the mean over orders")
            scalars["middle"] = {**middle_strength, "low": low, "high": high}
        scalars |= {name: number(title, finite(found[key].mean()), "log-odds") for name, key, title in SIZES}
        scalars["accuracy"] = number("Images classified right", finite(self.right), "%")
        summary += (
            f". {plan.images} images, {plan.pairs} pairs each, up to {plan.contexts} contexts; {self.classifier}."
        )
        return {
            "title": TITLE,
            "summary": summary,
            "normal": NORMAL,
            "images": plan.images,
            "curves": {
                "strength": {
                    **axes,
                    **curve,
                    "title": "Strength of interactions",
                    "y_label": "times the mean of all orders",
                }
            },
            "scalars": scalars,
        }


def finite(value: float) -> float | None:
    """None for what is no number: JSON has no word for it."""
    return float(value) if math.isfinite(value) else None


# ---- the classifier ------------------------------------------------------------------------------------------------
def classifier_of(source: str | None, model: MIMModel, images: EncoderImages):
    """-> (normalised images (rows, channels, height, width) -> logits (rows, classes) on the CPU), and what it is.

    A checkpoint of `MIMForImageClassification` with these classes has its own; for others a linear probe is fitted.
    """
    own = None if source is None else own_classifier(source, len(images.classes))
    if own is not None:
        nn.Module.to(own, best_device())
        return (
            lambda pixel_values: own(pixel_values.to(best_device())).logits.cpu()
        ), "classified by the checkpoint's own head"
    weight, bias, count = fit_probe(model, images)
    prefix = model.encoder.num_prefix_tokens

    def classify(pixel_values: Tensor) -> Tensor:
        pooled = model(pixel_values.to(model.device)).last_hidden_state[:, prefix:].mean(dim=1)
        return F.linear(pooled.cpu(), weight, bias)

    return classify, f"classified by a linear probe of the mean patch, fitted on {count} images"


def own_classifier(source: str, classes: int) -> MIMForImageClassification | None:
    try:
        config = load_config(source)
    except ValueError:  # a model of transformers
        return None
    if "MIMForImageClassification" not in (config.architectures or []) or config.num_labels != classes:
        return None
    return load_checkpoint(MIMForImageClassification, source, config).float().eval().requires_grad_(False)


def fit_probe(model: MIMModel, images: EncoderImages) -> tuple[Tensor, Tensor, int]:
    """The linear probe of the mean patch tokens of the labelled images set aside. -> weight (classes, dim) and bias
    (classes,) on plain features, and how many images."""
    features = extract_features(model, pixel_loader(images.labelled, images.config))["mean"]
    labels, classes = images.labelled.true_labels(list(range(len(images.labelled)))), len(images.classes)
    probe = LinearProbe(features, labels, classes)
    weight = torch.zeros(classes, features.shape[1])
    weight[:, probe.varies] = probe.weight.T
    return weight, probe.bias - weight @ probe.mean, len(features)


@torch.inference_mode()
def accuracy_of(classify, images: EncoderImages) -> float:
    """Percent of the images that are measured."""
    right = [(classify(pixels).argmax(dim=1) == labels).float() for pixels, labels in images.batches(64)]
    return 100 * torch.cat(right).mean().item()
