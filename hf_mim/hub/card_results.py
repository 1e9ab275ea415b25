"""The results of a model card: rows of its tables and evaluation results, from metrics.json and probe.json."""

import math
import re

from huggingface_hub import EvalResult

from hf_mim.training.evaluation.metrics import (
    CLASSIFICATION,
    FORGETTING,
    READOUTS,
    SEGMENTATION,
    format_forgetting,
    frozen_scores,
)


EVALUATED = {"train_images": "training images", "test_images": "test images"}
KEEPING = ("freeze_layers", "layer_decay", "lora", "lora_rank")  # of the section `training`
FINETUNED = CLASSIFICATION | SEGMENTATION  # what fine-tuning measures on the test images


def clean(value) -> str:
    """A value as text on one line of a table: it makes no Markdown, no HTML, and no link, a bare one neither."""
    text = re.sub(r"([\\`\[\]*|])", r"\\\1", " ".join(str(value).split()))
    text = text.replace("<", "&lt;").replace("://", ":&#47;&#47;").replace("@", "&#64;")
    return re.sub(r"(?i)\b(www)\.", r"\1&#46;", text)


def code(value) -> str:
    """A value between backticks, in a table too."""
    return "`" + " ".join(str(value).replace("`", "'").replace("|", "\\|").split()) + "`"


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def section(values: dict, name: str) -> dict:
    """What lies under this name, {} where something else or nothing does."""
    inner = values.get(name)
    return inner if isinstance(inner, dict) else {}


def counts(evaluation: dict) -> str:
    parts = [f"{evaluation[key]:,} {text}" for key, text in EVALUATED.items() if is_number(evaluation.get(key))]
    return ", ".join([*parts, *([clean(evaluation["test"])] if evaluation.get("test") else [])])


# ---- metadata --------------------------------------------------------------------------------------------------------
def eval_results(metrics: dict, data: dict) -> list[EvalResult]:
    """The accuracies of the trained encoder, or of the fine-tuned model, as the Hub's evaluation results."""
    if not data["words"]:
        return []
    trained = section(metrics, "trained")
    frozen, segments = "Image classification, {}, encoder frozen", metrics.get("task") == "segmentation"
    results = [
        (frozen.format(row.title), "accuracy", f"accuracy in percent, {row.title}", trained[row.key])
        for row in frozen_scores()
        if is_number(trained.get(row.key))
    ]
    task = "Image segmentation" if segments else "Image classification"
    scores = {FINETUNED[name]: value for name, value in finetuned(metrics).items()}
    results += [(task, metric.hub_type, metric.title, value) for metric, value in scores.items()]
    return [
        EvalResult(
            task_type="image-segmentation" if segments else "image-classification",
            task_name=task,
            dataset_type=data["type"],
            dataset_name=data["words"].replace("`", ""),
            metric_type=kind,
            metric_name=name if "percent" in name else f"{name} in percent",
            metric_value=round(value, 2),
        )
        for task, kind, name, value in results
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------
def result_rows(metrics: dict) -> list[dict]:
    """Of the frozen encoder, beside the untrained one and the raw pixels."""
    columns = [section(metrics, name) for name in ("trained", "untrained", "raw_pixels")]
    rows = []
    for row in frozen_scores():
        cells = [columns[0].get(row.key), columns[1].get(row.key), columns[2].get(row.raw_key)]
        if is_number(cells[0]):
            texts = [f"{cell:.1f}" if is_number(cell) else "" for cell in cells]
            rows.append({"name": row.title, **dict(zip(("trained", "untrained", "raw"), texts))})
    return rows


def finetuned(metrics: dict) -> dict[str, float]:
    """What fine-tuning measured on the test images."""
    scores = metrics if metrics.get("task") == "segmentation" else section(metrics, "test")
    return {kind: scores[kind] for kind in FINETUNED if is_number(scores.get(kind))}


def finetuned_rows(metrics: dict) -> list[tuple[str, str]]:
    """With intervals where there are any."""
    rows = []
    for kind, value in finetuned(metrics).items():
        ends = section(metrics, "intervals").get(kind)
        low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
        interval = f" ({low:.1f}-{high:.1f})" if is_number(low) and is_number(high) else ""
        rows.append((FINETUNED[kind].title, f"{value:.1f}{interval}"))
    return rows


def finetuned_counts(metrics: dict) -> str:
    if metrics.get("task") == "segmentation":
        return counts(section(metrics, "evaluation"))
    test = section(metrics, "test")
    images = [f"{test['images']:,} images"] if is_number(test.get("images")) else []
    return ", ".join([*images, *([clean(test["from"])] if test.get("from") else [])])


def kept_of_start(recipe: dict) -> str:
    """What a recipe does so that its encoder does not forget; "" where it does nothing."""
    options = {f"model.{name}": recipe.get("model", {}).get(name) for name in ("keep", "keep_weight")}
    options |= {f"training.{name}": recipe.get("training", {}).get(name) for name in KEEPING}
    return ", ".join(f"{key}: {value}" for key, value in options.items() if value not in (None, False, 0, 1.0))


def forgetting_rows(metrics: dict) -> list[dict]:
    """{"name", "before", "after"} of every score on every set of images, of a run that started from another encoder."""
    rows = []
    for images in section(metrics, "forgetting").values():
        before, after = (section(images, end) for end in ("before", "after")) if isinstance(images, dict) else ({}, {})
        for name, metric in FORGETTING.items():
            if is_number(before.get(name)) and is_number(after.get(name)):
                ends = {"before": before[name], "after": after[name]}
                texts = {end: format_forgetting(name, value) for end, value in ends.items()}
                rows.append({"name": f"{metric.title}, {clean(images.get('data', ''))}", **texts})
    return rows


def with_interval(entry) -> str:
    """`76.6 (74.1-79.1)` of {"accuracy", "low", "high"}; "" where there is no accuracy."""
    if not isinstance(entry, dict) or not is_number(entry.get("accuracy")):
        return ""
    ends = [entry.get(name) for name in ("low", "high")]
    return f"{entry['accuracy']:.1f}" + (f" ({ends[0]:.1f}-{ends[1]:.1f})" if all(map(is_number, ends)) else "")


def probe_rows(probe: dict) -> list[dict]:
    """{"name", "trained", "untrained", "setting"} for every trained pooler, and below them k-NN and linear probe."""
    untrained, rows = section(probe, "untrained"), []
    for name, entry in section(probe, "poolers").items():
        if with_interval(entry):
            setting = [f"layer {entry['layer']}"] if is_number(entry.get("layer")) else []
            setting += [f"{entry['parameters']:,} parameters"] if is_number(entry.get("parameters")) else []
            beside = with_interval(section(untrained, "poolers").get(name))
            row = {"trained": with_interval(entry), "untrained": beside, "setting": ", ".join(setting)}
            rows.append({"name": f"trained classifier behind {code(name)}", **row})
    for score in frozen_scores():
        cells = [with_interval(section(part, score.readout).get(score.pooling)) for part in (probe, untrained)]
        if cells[0]:
            rows.append({"name": score.title, "trained": cells[0], "untrained": cells[1], "setting": ""})
    return rows


def probe_protocol(probe: dict) -> list[str]:
    """What the rows mean, as far as they are there."""
    shown = {"poolers", "interval", *(name for name in READOUTS if section(probe, name))}
    return [clean(line) for name, line in section(probe, "protocol").items() if name in shown]


def probe_counts(probe: dict) -> str:
    data, seeds = section(probe, "data"), probe.get("seeds")
    name = code(data["dataset"]) if data.get("dataset") else "the data that ships with hf_mim" if data else None
    many = clean(f"seeds {', '.join(map(str, seeds))}") if isinstance(seeds, list) and seeds else None
    return ", ".join(part for part in (name, counts(data), many) if part)


def template_fields(metrics: dict, probe: dict) -> dict:
    """What the template shows of metrics.json and probe.json."""
    evaluation = metrics.get("evaluation") or {}
    return {
        "results": result_rows(metrics),
        "finetuned": finetuned_rows(metrics),
        "finetuned_counts": finetuned_counts(metrics),
        "eval_counts": counts(evaluation),
        "protocol": [clean(line) for line in evaluation.get("protocol", {}).values()],
        "forgetting": forgetting_rows(metrics),
        "forgetting_protocol": FORGETTING["cka"].protocol,
        "probe": probe_rows(probe),
        "probe_counts": probe_counts(probe),
        "probe_protocol": probe_protocol(probe),
    }
