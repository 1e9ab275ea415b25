"""The model card: what is known of a checkpoint, in the Hub's form. What nobody measured or said is not in it."""

import math
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from yaml import YAMLError

from hf_mim.hub import card_results as results_of
from hf_mim.hub.card_results import clean, code, is_number
from hf_mim.hub.files import PICTURES, read_json, read_recipe, weight_files
from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.loading import config_fields, load_whole
from hf_mim.modeling.masking import hides_tokens
from hf_mim.modeling.modeling_mim import MIMForImageClassification, MIMForPreTraining, MIMModel
from hf_mim.modeling.options import pair
from hf_mim.modeling.parts import TABLES as PARTS
from hf_mim.modeling.parts import is_own
from hf_mim.training import recipe as recipes
from hf_mim.training.checkpoint import checkpoint_errors
from hf_mim.training.common.errors import CheckpointError
from hf_mim.training.common.sharing import file_inside, shareable


TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
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
OWN = "MIMImageProcessor"  # the image processor of this project
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")


def make_card(folder: Path, repo: str, license: str | None = None) -> ModelCard:
    """The card of a checkpoint, from the files in its folder: config.json, recipe.yaml, metrics.json, probe.json. Text
    from them is text in the card: it makes no link, picture or heading.

    Args:
        folder: the output folder of a run; all but config.json and the weights may be absent.
        repo: the id under which it is to be loaded.
        license: as the Hub names it; nothing is said of it where it is None.

    Raises:
        ValueError, OSError: a file cannot be read, or is none of this project's.
    """
    validate_repo_id(repo)
    whole = read_config(folder)
    config, task = getattr(whole, "backbone_config", whole), task_of(whole)
    size = size_words(folder, config)
    recipe = read_recipe(folder)
    metrics, probe = (shareable(read_json(file_inside(folder, f"{name}.json"))) for name in ("metrics", "probe"))
    processor = read_json(file_inside(folder, "preprocessor_config.json"))
    data = dataset_of(recipe.get("data"))
    card = ModelCard.from_template(
        card_data(config, task, recipe, repo, license, data, results_of.eval_results(metrics, data)),
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        repo=repo,
        summary=summary(config, size, task, whole.num_labels, metrics, data),
        auto_class=TASKS[task][1],
        logits=TASKS[task][2],
        prefix_tokens=plural(prefix_tokens(config), "vector") + " without a patch",
        pooler=code(config.pooler),
        channels=config.num_channels,
        own_processor=processor.get("image_processor_type") == OWN,
        preparing=preparing(processor),
        pictures=[{"file": name, "words": text} for name, text in PICTURES.items() if file_inside(folder, name)],
        facts=[(name, value) for name, value in facts(folder, config, task, recipe, metrics, data) if value],
        **results_of.template_fields(metrics, probe),
        eval_data=data["words"],
        limits=limits(size, metrics, data),
        papers=papers(folder, config, task),
    )
    # Jinja leaves the blank lines of what was absent.
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


def preparing(processor: dict) -> str:
    """How to prepare an image, from the fields of an image processor."""
    if processor.get("image_processor_type") != OWN:
        return "Open photographs with `transformers.image_utils.load_image`, which turns them upright."
    lines = [
        "The image processor is a part of this repository's code. Give it the path of a file (also .npy and TIFF), or "
        "an array of the values in the file: what transformers' pipelines open has 8 bits and three channels."
    ]
    if processor.get("value_range") is not None:
        lines.append(f"Values of {clean(str(processor['value_range']))} become 0 to 255, others are clipped.")
    if processor.get("nodata") is not None:
        lines.append(f"The value {clean(str(processor['nodata']))} stands for missing ones and becomes the mean.")
    return " ".join(lines)


# ---- what the folder says --------------------------------------------------------------------------------------------
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
        return {"words": code(name), "type": name, "id": name}
    return {"words": f"{code(name)}, a local data set", "type": "local", "id": None}


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes by name, from the headers of the safetensors files that are sent."""
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder).values():
        if path.suffix != ".safetensors":
            continue
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
        CheckpointError: there is none, it is damaged, or another project's.
    """
    source = str(folder)
    if file_inside(folder, "config.json") is None:
        raise CheckpointError(f"no checkpoint at {source}: there is no config.json", source)
    with checkpoint_errors(source):
        fields = config_fields(source)
    upernet = fields.get("model_type") == "upernet"
    kind = (results_of.section(fields, "backbone_config") if upernet else fields).get("model_type")
    if kind != MIMConfig.model_type:
        content = f"an UperNet over {kind!r}, and only one over 'mim'" if upernet else f"{kind!r}, and only 'mim'"
        raise CheckpointError(f"{source} holds {content} can be published here", source)
    with checkpoint_errors(source):
        if not upernet:
            return MIMConfig.from_dict(fields)
        from hf_mim.modeling.modeling_upernet import MIMUperNetConfig

        return MIMUperNetConfig.from_dict(fields)


def check_weights(folder: Path, config) -> None:
    """Loads a checkpoint once: what is published is to load.

    Raises:
        CheckpointError: its weights are damaged, or do not fit its config.
    """
    heads = {head.__name__: head for head in (MIMForPreTraining, MIMForImageClassification)}
    model_class: type = heads.get((config.architectures or [""])[0], MIMModel)
    if config.model_type == "upernet":
        from hf_mim.modeling.modeling_upernet import MIMUperNet

        model_class = MIMUperNet
    new = ("pooler.", "pooled_norm.") if model_class is MIMModel else ()
    with checkpoint_errors(str(folder)):
        load_whole(model_class, str(folder), config, new, use_safetensors=True)


def size_words(folder: Path, config: MIMConfig) -> str:
    """`height x width` of the images that the model was made for: a segmentation model's are its processor's."""
    saved = results_of.section(read_json(file_inside(folder, "preprocessor_config.json")), "size")
    sides = (saved.get("height"), saved.get("width"))
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
    subject = f"A {config.encoder} encoder for images of {shape}"
    if task != "features":
        head = "a classifier" if task == "classification" else "UperNet for the segmentation"
        return f"{subject}, with {head} of {plural(num_labels, 'class')}."
    if not is_number(metrics.get("steps")):  # nothing here says that it was trained
        return f"{subject}."
    how = "predicting what was hidden from it" if hides_tokens(config) else "predicting features of whole images"
    return f"{subject}, pretrained without labels by {how}, on {images(metrics, data)}."


def teachers_of(target_config: dict) -> list[str]:
    """The teachers of a target, or of the target that it wraps."""
    options = target_config.get("features") or target_config
    entries = options.get("teachers") or [options.get("teacher")]
    names = [entry.get("teacher") if isinstance(entry, dict) else entry for entry in entries]
    return [name for name in dict.fromkeys(names) if isinstance(name, str)]


def teacher_row(config: MIMConfig) -> str:
    """The teachers, and what the card of each says of its licence."""
    rows = []
    for teacher in teachers_of(config.target_config or {}):
        license = license_of(teacher)
        says = f", whose own card says: licence {clean(license)}" if license else ""
        rows.append(clean(shareable(teacher)) + says)
    return "; ".join(rows)


def license_of(source: str) -> str | None:
    """The licence of a model, a local folder or an id on the Hub, by its own card; None where nothing says it."""
    try:
        path = Path(source) / "README.md"
        if not path.is_file():
            path = Path(hf_hub_download(source, "README.md"))
        data = ModelCard.load(path).data
        license = data.get("license_name") or data.get("license")
        return license if isinstance(license, str) else None
    except (OSError, ValueError, YAMLError):  # none, no access, no network, or no card that can be read
        return None


def facts(
    folder: Path, config: MIMConfig, task: str, recipe: dict, metrics: dict, data: dict
) -> list[tuple[str, object]]:
    """Rows of a table, as Markdown; a value that is not known is empty."""
    header = header_of(folder)
    shapes = weight_shapes(folder)
    encoder = [shape for name, shape in shapes.items() if re.match(r"(backbone\.)?(mim\.)?encoder\.", name)]
    return [
        ("recipe", f"`recipe.yaml`, run by {code(command_of(recipe))}" if recipe else None),
        ("method", clean(header.get("paper") or "")),
        *((name, part(config, name)) for name in TASKS[task][3]),
        ("parameters", f"{size(encoder)} in the encoder, {size(shapes.values())} in all" if shapes else None),
        *(("plug-in", f"{clean(note)}") for note in plugin_notes(config)),
        ("data", data["words"] and images(metrics, data)),
        ("started from", clean(recipe.get("model", {}).get("init_from") or "")),
        ("kept of the start", clean(results_of.kept_of_start(recipe))),
        ("teacher" if len(teachers_of(config.target_config or {})) < 2 else "teachers", teacher_row(config)),
        ("budget", budget(recipe, metrics)),
        ("final loss", f"{metrics['final_loss']:.4g}" if is_number(metrics.get("final_loss")) else None),
        ("hardware", hardware(metrics)),
        ("seed", clean(metrics["seed"]) if "seed" in metrics else None),
        ("versions", clean(", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items()))),
    ]


def plugin_notes(config: MIMConfig) -> list[str]:
    """What does not travel: a sentence about each plug-in that a part comes from."""
    config = getattr(config, "backbone_config", config)
    entries = {kind: table.get(getattr(config, kind)) for kind, table in PARTS.items()}
    kinds = [kind for kind, entry in entries.items() if not is_own(getattr(entry, "__module__", ""))]
    use = "the encoder loads without it, and pretraining further needs it"
    if {"encoder", "pooler"} & {*kinds}:
        use = "nothing loads before it is imported"
    parts = ", ".join(f"{kind} {getattr(config, kind)}" for kind in kinds) or "a part"
    return [f"{plugin} ({parts}) is code that is not uploaded: {use}" for plugin in config.plugins or []]


def header_of(folder: Path) -> dict:
    path = file_inside(folder, "recipe.yaml")
    return recipes.read_header(path) if path else {}


def command_of(recipe: dict) -> str:
    """What runs a recipe again."""
    start = recipe.get("model", {}).get("init_from") or "CHECKPOINT"
    return f"hf-mim finetune {start} recipe.yaml" if "finetune" in recipe else "hf-mim pretrain recipe.yaml"


def part(config: MIMConfig, name: str) -> str:
    options = shareable(getattr(config, f"{name}_config"))
    text = clean(", ".join(f"{key}: {value}" for key, value in options.items()))
    return code(getattr(config, name)) + (f" ({text})" if text else "")


def size(shapes) -> str:
    return f"{sum(math.prod(shape) for shape in shapes) / 1e6:.2f} M"


def images(metrics: dict, data: dict) -> str:
    count = metrics.get("num_train_images")
    return (f"{count:,} images of " if is_number(count) else "") + (data["words"] or "data that no recipe names")


def budget(recipe: dict, metrics: dict) -> str | None:
    training, parts = recipe.get("training", {}), []
    if is_number(training.get("num_train_epochs")) and not training.get("max_steps"):
        parts.append(f"{training['num_train_epochs']} epochs")
    if is_number(metrics.get("steps")):
        parts.append(f"{metrics['steps']:,} steps")
    if is_number(metrics.get("seconds")):
        parts.append(f"{metrics['seconds'] / 60:,.1f} minutes")
    if is_number(metrics.get("images_per_second")) and metrics["images_per_second"]:
        parts.append(f"{metrics['images_per_second']:,.0f} images per second")
    return ", ".join(parts)


def hardware(metrics: dict) -> str | None:
    if "device" not in metrics:
        return None
    parts = [clean(metrics.get("device_name") or metrics["device"])]
    for key, noun in (("processes", "process"), ("threads", "thread"), ("cpus", "CPU")):
        if is_number(metrics.get(key)) and not (key == "processes" and metrics[key] == 1):
            parts.append(plural(metrics[key], noun))
    return ", ".join([*parts, *([clean(metrics["precision"])] if "precision" in metrics else [])])


def limits(size: str, metrics: dict, data: dict) -> list[str]:
    sentences = [f"Trained at {size} pixels. Other sizes load and run; how good they are was not measured here."]
    rows = results_of.result_rows(metrics)
    if not rows and not results_of.finetuned_rows(metrics):
        return [*sentences, "No accuracy was measured in this run."]
    sentences.append("The accuracies are those of one run with one seed: their spread is not known.")
    if data["type"] == "fashion_mnist_subset":
        sentences.append("Being those of a subset, they are not comparable with published figures for Fashion-MNIST.")
    behind = [row for row in rows if row["raw"] and float(row["trained"]) <= float(row["raw"])]
    for row in behind:
        sentences.append(f"By {row['name']}, it is no better than raw pixels ({row['trained']} against {row['raw']}).")
    return sentences


def papers(folder: Path, config: MIMConfig, task: str) -> list[str]:
    """The recipe's paper, and those that the parts' own descriptions name: they were used too."""
    first = header_of(folder).get("paper", "")
    entries, seen = [clean(first)] if first else [], set(ARXIV.findall(first))
    for name in TASKS[task][3]:
        entry = PARTS[name].get(getattr(config, name))
        summary = (getattr(entry, "__doc__", None) or "").partition("\n\n")[0]
        # The first one: a part that several methods share names them all.
        new = [number for number in ARXIV.findall(summary)[:1] if number not in seen]
        seen.update(new)
        entries += [f"{name} {code(getattr(config, name))}: arXiv:{number}" for number in new]
    return entries
