"""The model card: what is known of a checkpoint, in the Hub's form. What nobody measured or said is not in it."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from safetensors import safe_open
from yaml import YAMLError

import hf_mim
from hf_mim.hub import card_results as results_of
from hf_mim.hub.card_results import clean, is_number
from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.decoders import DECODERS
from hf_mim.modeling.encoders import ENCODERS
from hf_mim.modeling.masking import MASK_GENERATORS
from hf_mim.modeling.options import pair
from hf_mim.modeling.poolers import POOLERS
from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe as recipes


TEMPLATE = Path(hf_mim.__file__).parent / "model_cards" / "template.md"
PICTURES = {
    "reconstructions.png": "test images: original, masked, prediction, prediction with the visible patches",
    "attention.png": "where the poolers look: test images, and the weights of their patches",
    "loss.png": "the loss while training",
    "probe.png": "accuracy behind each pooler",
    "segmentation.png": "test images, their masks and those that the model finds",
    "confusion.png": "which classes are taken for which",
}
PARTS = {
    "encoder": ENCODERS,
    "masking": MASK_GENERATORS,
    "decoder": DECODERS,
    "target": TARGETS,
    "pooler": POOLERS,
}
# What a checkpoint does: its tag on the Hub, its Auto class, what that returns, and the parts that are in it.
TASKS = {
    "features": ("image-feature-extraction", "AutoModel", None, tuple(PARTS)),
    "classification": (
        "image-classification",
        "AutoModelForImageClassification",
        "one value per class of `model.config.id2label`",
        ("encoder", "pooler"),
    ),
    "segmentation": (
        "image-segmentation",
        "AutoModelForSemanticSegmentation",
        "a map of values for each class of `model.config.id2label`",
        ("encoder",),
    ),
}
SHIPPED = "a class-balanced subset of Fashion-MNIST (the data that ships with hf_mim)"
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")


def make_card(folder: Path, repo: str, license: str | None = None) -> ModelCard:
    """The card of a checkpoint, from the files in its folder: config.json, recipe.yaml, metrics.json, probe.json.

    Args:
        folder: the output folder of a run; all but config.json and the weights may be absent.
        repo: the id under which it is to be loaded.
        license: as the Hub names it; nothing is said of it where it is None.

    Raises:
        ValueError, OSError: a file cannot be read, or is none of this project's.
    """
    whole = read_config(folder)
    config, task = getattr(whole, "backbone_config", whole), task_of(whole)
    size = size_words(folder, config)
    recipe = read_recipe(folder)
    metrics, probe = (shareable(read_json(folder / f"{name}.json")) for name in ("metrics", "probe"))
    data = dataset_of(recipe.get("data"))
    results = results_of.eval_results(metrics, data)
    card = ModelCard.from_template(
        card_data(config, task, recipe, repo, license, data, results),
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        repo=repo,
        summary=summary(config, size, task, whole.num_labels, metrics, data),
        auto_class=TASKS[task][1],
        logits=TASKS[task][2],
        prefix_tokens=plural(prefix_tokens(config), "vector") + " without a patch",
        pooler=f"`{config.pooler}`",
        channels=config.num_channels,
        pictures=[{"file": name, "words": words} for name, words in PICTURES.items() if (folder / name).is_file()],
        facts=[(name, clean(value)) for name, value in facts(folder, config, task, recipe, metrics, data) if value],
        **results_of.template_fields(metrics, probe),
        eval_data=data["words"],
        limits=limits(size, metrics, data),
        papers=papers(folder, config, task),
    )
    # Jinja leaves the blank lines of what was absent.
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


# ---- what the folder says --------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON") from None
    return found if isinstance(found, dict) else {}


def read_recipe(folder: Path) -> dict:
    """{section: {key: value}} of recipe.yaml without what must not leave this machine, {} without one."""
    path = folder / "recipe.yaml"
    recipe = recipes.parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    return shareable({name: values for name, values in (recipe or {}).items() if isinstance(values, dict)})


def shareable(value):
    """A value of a recipe or of JSON as it may be published: no tokens, and of local paths only the last name."""
    if isinstance(value, dict):
        secret = {key for key, inner in value.items() if isinstance(inner, str) and str(key).endswith("token")}
        secret |= {"command"} & value.keys()  # as typed on this machine; the settings are beside it
        return {key: shareable(inner) for key, inner in value.items() if key not in secret}
    if isinstance(value, list):
        return [shareable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine or in somebody's bucket, and not an id on the Hub, which has one `/` or
    none, or a page on the web."""
    if re.match(r"(?!https?:)[A-Za-z][A-Za-z0-9+.-]+://\S+$", text):
        return True
    if text.startswith(("/", "./", "../", "~/")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    return "/" in text and " " not in text and "://" not in text and (text.count("/") > 1 or Path(text).exists())


def dataset_of(data: dict | None) -> dict:
    """{"words", "type", "id"}: how to call the data set, for people and for the Hub; `id` only if it is on the Hub."""
    if data is None:
        return {"words": None, "type": None, "id": None}
    name = data.get("dataset")
    if name is None:
        return {"words": SHIPPED, "type": "fashion_mnist_subset", "id": None}
    if "://" in name:
        return {"words": clean(name), "type": "web", "id": None}
    if "/" in name:  # local paths have lost theirs
        return {"words": f"`{clean(name)}`", "type": name, "id": name}
    return {"words": f"`{clean(name)}`, a local data set", "type": "local", "id": None}


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes by name, from the headers of the safetensors files."""
    shapes = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no dict)
    return shapes


def prefix_tokens(config: MIMConfig) -> int:
    import torch

    from hf_mim.modeling.parts import make_encoder

    with torch.device("meta"):
        return make_encoder(config).num_prefix_tokens


def read_config(folder: Path):
    """The config of a checkpoint, of whichever model of this project.

    Raises:
        ValueError, OSError: there is none, or it is another project's.
    """
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == "upernet":
        from hf_mim.modeling.modeling_upernet import MIMUperNetConfig

        found = results_of.section(fields, "backbone_config").get("model_type")
        if found != MIMConfig.model_type:
            raise ValueError(f"{folder} holds an UperNet over {found!r}, and only one over 'mim' can be published here")
        return MIMUperNetConfig.from_pretrained(folder)
    return MIMConfig.from_pretrained(folder)


def size_words(folder: Path, config: MIMConfig) -> str:
    """`height x width` of the images that the model was made for: a segmentation model's are its processor's."""
    said = results_of.section(read_json(folder / "preprocessor_config.json"), "size")
    sides = (said.get("height"), said.get("width"))
    height, width = sides if all(isinstance(side, int) for side in sides) else pair(config.image_size)
    return f"{height}x{width}"


def task_of(config) -> str:
    if config.model_type == "upernet":
        return "segmentation"
    return "classification" if "MIMForImageClassification" in (config.architectures or ()) else "features"


# ---- metadata --------------------------------------------------------------------------------------------------------
def card_data(
    config: MIMConfig, task: str, recipe: dict, repo: str, license: str | None, data: dict, results
) -> ModelCardData:
    start = recipe.get("model", {}).get("init_from")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[task][0],
        license=license,
        base_model=start if start and "/" in start and "://" not in start else None,
        datasets=[data["id"]] if data["id"] else None,
        tags=["hf_mim", "masked-image-modeling", "self-supervised-learning", config.encoder],
        **({"model_name": repo.split("/")[-1], "eval_results": results} if results else {}),
    )


# ---- the text --------------------------------------------------------------------------------------------------------
def plural(count: int, noun: str) -> str:
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def summary(config: MIMConfig, size: str, task: str, num_labels: int, metrics: dict, data: dict) -> str:
    shape = f"{size} pixels and {plural(config.num_channels, 'channel')}"
    what = f"A {config.encoder} encoder for images of {shape}"
    if task != "features":
        head = "a classifier" if task == "classification" else "UperNet for the segmentation"
        return f"{what}, with {head} of {plural(num_labels, 'class')}."
    if not is_number(metrics.get("steps")):  # nothing here says that it was trained
        return f"{what}."
    return f"{what}, pretrained without labels by predicting what was hidden from it, on {images(metrics, data)}."


def teacher_of(target_config: dict) -> str | None:
    """The teacher of a target, or of the target that it wraps."""
    return target_config.get("teacher") or (target_config.get("features") or {}).get("teacher")


def teacher_row(config: MIMConfig) -> str | None:
    """The teacher, and what its own card says of its licence."""
    teacher = teacher_of(config.target_config)
    if teacher is None:
        return None
    license = license_of(teacher)
    return shareable(teacher) + (f", whose own card says: licence {license}" if license else "")


def license_of(source: str) -> str | None:
    """The licence of a model, a local folder or an id on the Hub, by its own card; None where nothing says it."""
    try:
        path = Path(source) / "README.md"
        if not path.is_file():
            path = hf_hub_download(source, "README.md")
        data = ModelCard.load(path).data
        said = data.get("license_name") or data.license
        return said if isinstance(said, str) else None
    except (OSError, ValueError, YAMLError):  # none, no access, no network, or no card that can be read
        return None


def facts(
    folder: Path, config: MIMConfig, task: str, recipe: dict, metrics: dict, data: dict
) -> list[tuple[str, object]]:
    """Rows of a table; a value that is not known is empty."""
    header = recipes.read_header(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    shapes = weight_shapes(folder)
    encoder = [shape for name, shape in shapes.items() if re.match(r"(backbone\.)?(mim\.)?encoder\.", name)]
    return [
        ("recipe", f"`recipe.yaml`, run by `{command_of(recipe)}`" if recipe else None),
        ("method", header.get("paper")),
        *((name, part(config, name)) for name in TASKS[task][3]),
        ("parameters", f"{size(encoder)} in the encoder, {size(shapes.values())} in all" if shapes else None),
        ("data", data["words"] and images(metrics, data)),
        ("started from", recipe.get("model", {}).get("init_from")),
        ("teacher", teacher_row(config)),
        ("budget", budget(recipe, metrics)),
        ("final loss", f"{metrics['final_loss']:.4g}" if is_number(metrics.get("final_loss")) else None),
        ("hardware", hardware(metrics)),
        ("seed", str(metrics["seed"]) if "seed" in metrics else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())),
    ]


def command_of(recipe: dict) -> str:
    """What runs a recipe again."""
    start = recipe.get("model", {}).get("init_from") or "CHECKPOINT"
    return f"hf-mim finetune {start} recipe.yaml" if "finetune" in recipe else "hf-mim pretrain recipe.yaml"


def part(config: MIMConfig, name: str) -> str:
    options = getattr(config, f"{name}_config")
    said = ", ".join(f"{key}: {value}" for key, value in shareable(options).items())
    return f"`{getattr(config, name)}`" + (f" ({said})" if said else "")


def size(shapes) -> str:
    return f"{sum(math.prod(shape) for shape in shapes) / 1e6:.2f} M"


def images(metrics: dict, data: dict) -> str:
    count = metrics.get("num_train_images")
    return (f"{count:,} images of " if is_number(count) else "") + (data["words"] or "data that no recipe names")


def budget(recipe: dict, metrics: dict) -> str | None:
    training, said = recipe.get("training", {}), []
    if is_number(training.get("num_train_epochs")) and not training.get("max_steps"):
        said.append(f"{training['num_train_epochs']} epochs")
    if is_number(metrics.get("steps")):
        said.append(f"{metrics['steps']:,} steps")
    if is_number(metrics.get("seconds")):
        said.append(f"{metrics['seconds'] / 60:,.1f} minutes")
    if metrics.get("images_per_second"):
        said.append(f"{metrics['images_per_second']:,.0f} images per second")
    return ", ".join(said)


def hardware(metrics: dict) -> str | None:
    if "device" not in metrics:
        return None
    said = [str(metrics.get("device_name") or metrics["device"])]
    for key, noun in (("processes", "process"), ("threads", "thread"), ("cpus", "CPU")):
        if is_number(metrics.get(key)) and not (key == "processes" and metrics[key] == 1):
            said.append(plural(metrics[key], noun))
    return ", ".join([*said, *([metrics["precision"]] if "precision" in metrics else [])])


def limits(size: str, metrics: dict, data: dict) -> list[str]:
    said = [f"Trained at {size} pixels. Other sizes load and run; how good they are was not measured here."]
    rows = results_of.result_rows(metrics)
    if not rows and not results_of.finetuned_rows(metrics):
        return [*said, "No accuracy was measured in this run."]
    said.append("The accuracies are those of one run with one seed: their spread is not known.")
    if data["type"] == "fashion_mnist_subset":
        said.append("Being those of a subset, they are not comparable with published figures for Fashion-MNIST.")
    behind = [row for row in rows if row["raw"] and float(row["trained"]) <= float(row["raw"])]
    for row in behind:
        said.append(f"By {row['name']}, it is no better than raw pixels ({row['trained']} against {row['raw']}).")
    return said


def papers(folder: Path, config: MIMConfig, task: str) -> list[str]:
    """The recipe's paper, and those that the parts' own descriptions name: they were used too."""
    recipe = folder / "recipe.yaml"
    first = recipes.read_header(recipe).get("paper", "") if recipe.is_file() else ""
    found, seen = [clean(first)] if first else [], set(ARXIV.findall(first))
    for name in TASKS[task][3]:
        entry = PARTS[name].get(getattr(config, name))
        for line in (getattr(entry, "__doc__", None) or "").splitlines()[:1]:
            # The first one: a part that several methods share names them all.
            new = [number for number in ARXIV.findall(line)[:1] if number not in seen]
            seen.update(new)
            found += [f"{name} `{getattr(config, name)}`: arXiv:{number}" for number in new]
    return found
