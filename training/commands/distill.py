"""The command `distill`: a pretraining run whose student and teachers are named on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair, unknown_choice
from hf_mim.modeling.parts import make_encoder
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import RecipeError


RECIPE, SMALL = "distill", "distill_small"  # for one's own images, and for the shipped ones
OWN = "vit"  # the student that a recipe describes
CUT = ("resnet", "convnext", "convnextv2")  # models of transformers that encoder `convnet` takes
UNFIT = {"levit": "its class of transformers fails in training behind an evaluation; take levit_128s of timm"}
STUDENTS = (
    "a student is 'vit' (that of the recipe), a model of timm (resnet18, efficientnet_b0, mobilenetv3_small_100), a "
    "model type of transformers (resnet, swin, mobilevit), or, to start from its weights, a folder, a URL or an id on "
    "the Hub"
)


def distill(
    teachers: Sequence[str],
    student: str,
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    console: Console | RunConsole | None = None,
    preview: bool = False,
) -> Path:
    """Trains a student on the features of one or several teachers: `pretrain` with a recipe of target
    `teacher_features`. Returns the folder.

    Args:
        teachers: Hub ids, local folders, or `lite0`.
        student: see `STUDENTS`.
        overrides: `section.key=value`.
        preview: as of `pretrain`.
        recipe: a name or file; None: `distill`, or `distill_small` for the shipped images.

    Raises:
        ValueError, OSError: as of `pretrain`, or the student is unknown.
    """
    tree = recipes.parse_overrides(overrides)
    name = recipe or (RECIPE if tree.get("data", {}).get("dataset") else SMALL)
    section = recipes.read_words(name, overrides)[0].get("model", {})
    if section.get("target") != "teacher_features":
        raise RecipeError(f"recipe {name} has no target teacher_features: hf-mim pretrain {name} runs it", name)
    if "teachers" in (tree.get("model", {}).get("target_config") or {}):
        raise RecipeError("the teachers are named before the student", "model.target_config.teachers")
    console = RunConsole(console)
    words = [
        f"model.target_config.teachers={json.dumps(teacher_entries(teachers, section))}",
        *student_overrides(student, recipes.resolve(name, overrides)["model"], console),
    ]
    return pretrain(name, [*words, *overrides], console, preview)


def teacher_entries(teachers: Sequence[str], section: dict) -> list:
    """The teachers as the target takes them: those that the recipe has options for, with these."""
    entries = (section.get("target_config") or {}).get("teachers") or []
    known = {entry["teacher"]: entry for entry in entries if isinstance(entry, dict)}
    return [known.get(teacher, teacher) for teacher in teachers]


def student_overrides(student: str, section: dict, console: RunConsole) -> list[str]:
    """The overrides that make a student of this name; what it becomes is printed.

    Args:
        section: `model` of the recipe, with the overrides of the user.

    Raises:
        RecipeError: there is no such model, or it cannot be a student at this image size.
    """
    if student == OWN:
        console.log(f"student: {OWN}, as the recipe describes it, from random weights")
        return []
    if "/" in student or Path(student).expanduser().exists():
        return [f"model.init_from={student}"]
    fields = {name: section[name] for name in ("image_size", "num_channels") if name in section}
    encoder, options = choose_encoder(student, fields)
    console.log(f"student: {student}, encoder {encoder}, from random weights")
    return [f"model.encoder={encoder}", f"model.encoder_config={json.dumps(options)}"]


def choose_encoder(student: str, fields: dict) -> tuple[str, dict]:
    """The encoder for a model of timm or transformers, and its options: the first that can be made and run.

    Raises:
        RecipeError: there is no such model, or none of the encoders takes it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

    if student in UNFIT:
        raise RecipeError(f"{student} cannot be a student here: {UNFIT[student]}", student)
    candidates: list[tuple[str, dict]] = []
    if student in CONFIG_MAPPING:
        candidates = [("convnet" if student in CUT else "native", {"model_type": student})]
    elif student in timm_models():
        candidates = [("convnet", {"model_type": "timm", "model_name": student}), ("timm", {"model_name": student})]
    if not candidates:
        near = str(unknown_choice("student", student, [*timm_models(), *MODEL_FOR_IMAGE_MAPPING_NAMES])).partition(
            "Choices"
        )[0]
        raise RecipeError(f"{near.strip()} {STUDENTS}", student)
    for encoder, options in candidates:
        if (problem := check_student(encoder, options, fields)) is None:
            return encoder, options
    raise RecipeError(f"{student} cannot be a student here: {problem}", student)


def timm_models() -> list[str]:
    try:
        import timm  # slow to import
    except ImportError:
        return []
    return timm.list_models()


def check_student(encoder: str, options: dict, fields: dict) -> str | None:
    """What is wrong with a student that is built and run without memory; None where it works."""
    try:
        with torch.device("meta"), torch.no_grad():
            config = MIMConfig(**fields, encoder=encoder, encoder_config=options, masking="none")
            network, size = make_encoder(config).eval(), pair(config.image_size)
            tokens = network(torch.zeros(1, config.num_channels, *size)).tokens
            rows, cols = network.target_grid(*size)
    except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        return str(error).partition("\n")[0]
    expected = (network.num_prefix_tokens + rows * cols, network.hidden_size)
    return None if tuple(tokens.shape[1:]) == expected else f"its tokens are {tuple(tokens.shape[1:])}, not {expected}"
