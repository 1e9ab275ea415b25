"""The model card: what is known of a checkpoint, in the Hub's form. What nobody measured or said is not in it."""

import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

import hf_mim
from hf_mim.modeling.configuration_mim import MIMConfig, pair
from hf_mim.modeling.decoders import DECODERS
from hf_mim.modeling.encoders import ENCODERS
from hf_mim.modeling.masking import MASK_GENERATORS
from hf_mim.modeling.poolers import POOLERS
from hf_mim.modeling.targets import TARGETS
from hf_mim.training import recipe as recipes


TEMPLATE = Path(hf_mim.__file__).parent / "model_cards" / "template.md"
PICTURES = {
    "reconstructions.png": "test images: original, masked, prediction, prediction with the visible patches",
    "attention.png": "attention",
    "loss.png": "the loss while training",
    "probe.png": "accuracy behind each pooler",
    "confusion.png": "which classes are taken for which",
}
PARTS = {
    "encoder": ENCODERS,
    "masking": MASK_GENERATORS,
    "decoder": DECODERS,
    "target": TARGETS,
    "pooler": POOLERS,
}
SHIPPED = "a class-balanced subset of Fashion-MNIST (the data that ships with hf_mim)"
SCORES = {
    "knn_mean": ("k-NN, mean of the patches", "knn"),
    "linear_mean": ("linear probe, mean of the patches", "linear"),
    "knn_cls": ("k-NN, class token", None),
    "linear_cls": ("linear probe, class token", None),
}
EVALUATED = {"train_images": "images to learn from", "test_images": "to test on"}
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
    config = MIMConfig.from_pretrained(folder)
    recipe, metrics, probe = read_recipe(folder), read_json(folder / "metrics.json"), read_json(folder / "probe.json")
    data = dataset_of(recipe.get("data"))
    results = eval_results(metrics, data)
    card = ModelCard.from_template(
        card_data(config, recipe, repo, license, data, results),
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        repo=repo,
        summary=summary(config, metrics, data),
        prefix_tokens=plural(prefix_tokens(config), "vector") + " without a patch",
        pooler=f"`{config.pooler}`",
        channels=config.num_channels,
        pictures=[{"file": name, "words": words} for name, words in PICTURES.items() if (folder / name).is_file()],
        facts=[(name, clean(value)) for name, value in facts(folder, config, recipe, metrics, data) if value],
        results=result_rows(metrics),
        eval_data=data["words"],
        eval_counts=eval_counts(metrics),
        protocol=[clean(line) for line in metrics.get("evaluation", {}).get("protocol", {}).values()],
        probe=probe_rows(probe),
        limits=limits(config, recipe, metrics, data),
        papers=papers(folder, config),
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
        return {key: shareable(inner) for key, inner in value.items() if key not in secret}
    if isinstance(value, list):
        return [shareable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def is_local(text: str) -> bool:
    """Whether a text is a path on this machine, and not an id on the Hub, which has one `/` or none."""
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

    from hf_mim.modeling.modeling_mim import make_encoder

    with torch.device("meta"):
        return make_encoder(config).num_prefix_tokens


# ---- metadata --------------------------------------------------------------------------------------------------------
def card_data(config: MIMConfig, recipe: dict, repo: str, license: str | None, data: dict, results) -> ModelCardData:
    start = recipe.get("model", {}).get("init_from")
    classifies = "MIMForImageClassification" in (config.architectures or ())
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        license=license,
        base_model=start if start and "/" in start else None,
        datasets=[data["id"]] if data["id"] else None,
        tags=["hf_mim", "masked-image-modeling", "self-supervised-learning", config.encoder],
        **({"model_name": repo.split("/")[-1], "eval_results": results} if results else {}),
    )


def eval_results(metrics: dict, data: dict) -> list[EvalResult]:
    """The accuracies of the trained encoder as the Hub's evaluation results."""
    trained = metrics.get("trained", {}) if data["words"] else {}
    return [
        EvalResult(
            task_type="image-classification",
            task_name=f"Image classification, {title}, encoder frozen",
            dataset_type=data["type"],
            dataset_name=data["words"].replace("`", ""),
            metric_type="accuracy",
            metric_name=f"accuracy in percent, {title}",
            metric_value=round(trained[key], 2),
        )
        for key, (title, _) in SCORES.items()
        if is_number(trained.get(key))
    ]


# ---- the text --------------------------------------------------------------------------------------------------------
def clean(value) -> str:
    """A value on one line of a table, whatever it holds."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plural(count: int, noun: str) -> str:
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def summary(config: MIMConfig, metrics: dict, data: dict) -> str:
    height, width = pair(config.image_size)
    shape = f"{height}x{width} pixels and {plural(config.num_channels, 'channel')}"
    what = f"A {config.encoder} encoder for images of {shape}"
    if "MIMForImageClassification" in (config.architectures or ()):
        return f"{what}, with a classifier of {plural(config.num_labels, 'class')}."
    if not is_number(metrics.get("steps")):  # nothing here says that it was trained
        return f"{what}."
    return f"{what}, pretrained without labels by predicting what was hidden from it, on {images(metrics, data)}."


def teacher_of(target_config: dict) -> str | None:
    """The teacher of a target, or of the target that it wraps."""
    return target_config.get("teacher") or (target_config.get("features") or {}).get("teacher")


def facts(folder: Path, config: MIMConfig, recipe: dict, metrics: dict, data: dict) -> list[tuple[str, object]]:
    """Rows of a table; a value that is not known is empty."""
    header = recipes.read_header(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    shapes = weight_shapes(folder)
    encoder = [shape for name, shape in shapes.items() if name.removeprefix("mim.").startswith("encoder.")]
    return [
        ("recipe", "`recipe.yaml`, run by `hf-mim pretrain recipe.yaml`" if recipe else None),
        ("method", header.get("paper")),
        *((name, part(config, name)) for name in PARTS),
        ("parameters", f"{size(encoder)} in the encoder, {size(shapes.values())} in all" if shapes else None),
        ("data", data["words"] and images(metrics, data)),
        ("started from", recipe.get("model", {}).get("init_from")),
        ("teacher", teacher_of(config.target_config)),
        ("budget", budget(recipe, metrics)),
        ("final loss", f"{metrics['final_loss']:.4g}" if is_number(metrics.get("final_loss")) else None),
        ("hardware", hardware(metrics)),
        ("seed", str(metrics["seed"]) if "seed" in metrics else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics.get("versions", {}).items())),
    ]


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


def result_rows(metrics: dict) -> list[dict]:
    columns = [metrics.get(name, {}) for name in ("trained", "untrained", "raw_pixels")]
    rows = []
    for key, (title, raw) in SCORES.items():
        cells = [columns[0].get(key), columns[1].get(key), columns[2].get(raw)]
        if is_number(cells[0]):
            texts = [f"{cell:.1f}" if is_number(cell) else "" for cell in cells]
            rows.append({"name": title, **dict(zip(("trained", "untrained", "raw"), texts))})
    return rows


def eval_counts(metrics: dict) -> str:
    found = metrics.get("evaluation", {})
    counts = [f"{found[key]:,} {words}" for key, words in EVALUATED.items() if is_number(found.get(key))]
    return ", ".join([*counts, *([clean(found["test"])] if found.get("test") else [])])


def probe_rows(probe: dict) -> list[tuple[str, str]]:
    found = probe.get("poolers", probe)
    return [(clean(name), f"{value:.1f}") for name, value in found.items() if name in POOLERS and is_number(value)]


def limits(config: MIMConfig, recipe: dict, metrics: dict, data: dict) -> list[str]:
    height, width = pair(config.image_size)
    said = [f"Trained at {height}x{width} pixels. Other sizes load and run; how good they are was not measured here."]
    rows = result_rows(metrics)
    if not rows:
        return [*said, "No accuracy was measured in this run."]
    said.append("The accuracies are those of one run with one seed: their spread is not known.")
    if data["type"] == "fashion_mnist_subset":
        said.append("Being those of a subset, they are not comparable with published figures for Fashion-MNIST.")
    behind = [row for row in rows if row["raw"] and float(row["trained"]) <= float(row["raw"])]
    for row in behind:
        said.append(f"By {row['name']}, it is no better than raw pixels ({row['trained']} against {row['raw']}).")
    return said


def papers(folder: Path, config: MIMConfig) -> list[str]:
    """The recipe's paper, and those that the parts' own descriptions name: they were used too."""
    recipe = folder / "recipe.yaml"
    first = recipes.read_header(recipe).get("paper", "") if recipe.is_file() else ""
    found, seen = [clean(first)] if first else [], set(ARXIV.findall(first))
    for name, entries in PARTS.items():
        entry = entries.get(getattr(config, name))
        for line in (getattr(entry, "__doc__", None) or "").splitlines()[:1]:
            # The first one: a part that several methods share names them all.
            new = [number for number in ARXIV.findall(line)[:1] if number not in seen]
            seen.update(new)
            found += [f"{name} `{getattr(config, name)}`: arXiv:{number}" for number in new]
    return found
