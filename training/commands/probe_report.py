"""What a probing found: the table, probe.json and the pictures."""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import hf_mim
from hf_mim.training.evaluation.probe_scores import POOLINGS, PROTOCOL, SHARES, SHOTS, bootstrap, weights_over_images
from hf_mim.training.plots import pictures
from hf_mim.training.run import versions


POOLING_WORDS = {"mean": "mean of the patches", "cls": "class token"}
COLUMNS = {"trained": "tab:blue", "untrained": "tab:gray", "raw_pixels": "tab:olive"}
EXAMPLES = 8  # images in attention.png
ATTENTION_NOTE = (
    "Bright: patches that count most for the pooler's vector (its weights, the mean over heads or queries), from zero "
    "to the picture's largest; the number is that largest weight as a multiple of an even share."
)


# ---- words ---------------------------------------------------------------------------------------------------------
def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def describe_encoder(model, weights: str) -> dict:
    """What tokens follow from beside the image, for the key of a cache."""
    config = model.config
    fields = ("encoder", "encoder_config", "image_size", "num_channels", "image_mean", "image_std")
    made_by = {"hf_mim": hf_mim.__version__, **{name: versions()[name] for name in ("torch", "transformers")}}
    return {"weights": weights, **{name: getattr(config, name) for name in fields}, "made by": made_by}


def describe(run) -> None:
    """Prints what will be done."""
    arguments, names = run.arguments, ", ".join(choice.name for choice in run.choices)
    views = f", {arguments.views} views" if arguments.views > 1 else ""
    run.console.print(
        f"data: {run.data.dataset or 'Fashion-MNIST subset (shipped)'}, {len(run.images['train']):,} training images"
        f"{views}, {len(run.images['test']):,} test images ({run.splits.note})\n"
        f"model: {run.source}, {run.model.config.encoder} encoder, "
        f"{run.model.num_parameters() / 1e6:.2f} M parameters\n"
        f"poolers: {names}; layers {', '.join(map(str, run.layers))}; learning rates "
        f"{', '.join(f'{rate:g}' for rate in arguments.learning_rates)}; seeds {', '.join(map(str, arguments.seeds))}",
        highlight=False,
        soft_wrap=True,
    )


# ---- numbers -------------------------------------------------------------------------------------------------------
def entry(members: list, right: dict[int, Tensor]) -> dict:
    """What is said of a pooler's best setting; `members` are its heads, one for each seed."""
    one = members[0]
    return {
        **bootstrap(torch.stack([right[id(member)] for member in members])),
        "seeds": [100 * right[id(member)].double().mean().item() for member in members],
        "layer": one.layer,
        "learning_rate": one.learning_rate,
        "epochs": [member.epoch for member in members],
        "parameters": one.parameters,
    }


def settings(trained: list) -> list[dict]:
    """Every head that was trained, with its accuracy on the held-out training images."""
    return [
        {
            "pooler": one.name,
            "layer": one.layer,
            "learning_rate": one.learning_rate,
            "seed": one.seed,
            "validation_accuracy": one.accuracy,
            "epoch": one.epoch,
        }
        for one in trained
    ]


def to_json(results: dict, run) -> dict:
    """probe.json: {"model", "protocol", "data", "seeds", "poolers": {name: {"accuracy", "low", "high", ...}}, "knn" and
    "linear": {pooling: {"accuracy", "low", "high"}}, "low_shot": {pooling: {"1", "5", "10", "1%", "10%": ...}},
    "settings", "untrained": the same five, "raw_pixels", "arguments", "versions", "seconds", "command"}; accuracies in
    percent, layers as blocks passed."""
    columns, arguments = results["columns"], run.arguments
    labels = run.images["train"].labels
    said = {name: getattr(arguments, name) for name in ("views", "epochs", "patience", "batch_size", "optimizer")}
    said |= {name: getattr(arguments, name) for name in ("weight_decay", "validation", "apply_final_norm", "uncached")}
    return {
        "model": run.source,
        "protocol": PROTOCOL,
        "data": {
            "dataset": run.data.dataset,
            "train_images": len(run.images["train"]),
            "test_images": len(run.images["test"]),
            "test": run.splits.note,
            "classes": len(labels.unique()),
            "image_size": run.model.config.image_size,
        },
        "seeds": arguments.seeds,
        **columns["trained"],
        **({"untrained": columns["untrained"]} if "untrained" in columns else {}),
        "raw_pixels": results["raw_pixels"],
        "arguments": {**said, "pooler_options": {one.name: {"pooler": one.kind, **one.options} for one in run.choices}},
        "versions": {"hf_mim": hf_mim.__version__, **versions()},
        "device": run.model.device.type,
        "seconds": results["seconds"],
        "command": run.command,
    }


# ---- the table -----------------------------------------------------------------------------------------------------
def interval(found: dict | None) -> str:
    return f"{found['accuracy']:.1f} ({found['low']:.1f}-{found['high']:.1f})" if found else ""


def pooler_rows(results: dict) -> list[tuple[str, dict]]:
    """Rows of a table or a picture: a title, and {column: entry}."""
    columns = results["columns"]
    return [(name, {c: found["poolers"].get(name) for c, found in columns.items()}) for name in poolers_of(results)]


def other_rows(results: dict) -> list[tuple[str, dict]]:
    """As of `pooler_rows`: k-NN, linear probe and few labels."""
    columns, rows = results["columns"], []
    for kind, title in (("linear", "linear probe"), ("knn", "k-NN")):
        for pooling in POOLINGS:
            entries = {c: found[kind].get(pooling) for c, found in columns.items()}
            if pooling == "mean":
                entries["raw_pixels"] = results["raw_pixels"][kind]
            if entries["trained"]:
                rows.append((f"{title}, {POOLING_WORDS[pooling]}", entries))
    for shots in (*(str(count) for count in SHOTS), *(f"{share:.0%}" for share in SHARES)):
        entries = {c: found["low_shot"]["mean"].get(shots) for c, found in columns.items()}
        if entries["trained"]:
            what = "of the labels" if "%" in shots else "label a class" if shots == "1" else "labels a class"
            rows.append((f"{shots} {what}", entries))
    return rows


def poolers_of(results: dict) -> dict[str, dict]:
    return results["columns"]["trained"]["poolers"]


def tables_of(results: dict, run) -> list[Table]:
    seeds = ", ".join(map(str, run.arguments.seeds))
    sizes = f"{len(run.images['train']):,} images to learn from, {len(run.images['test']):,} to test on"
    table = Table(
        title=f"{run.title}, encoder frozen: accuracy behind trained poolers, percent (95 percent interval)",
        caption=f"{sizes}, seeds {seeds}. Layer and learning rate are the best on held-out training images.",
    )
    others = Table(
        title="the same features without a trained pooler",
        caption="Few labels: linear probe on the mean of the patches.",
    )
    columns = list(results["columns"])
    for one, names in ((table, columns), (others, [*columns, "raw_pixels"])):
        one.add_column("")
        for name in names:
            one.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for title in ("layer", "rate", "parameters"):
        table.add_column(title, justify="right")
    for name, entries in pooler_rows(results):
        best = poolers_of(results)[name]
        setting = (str(best["layer"]), f"{best['learning_rate']:g}", f"{best['parameters']:,}")
        table.add_row(name, *(interval(entries[column]) for column in columns), *setting)
    for title, entries in other_rows(results):
        others.add_row(title, *(interval(entries.get(column)) for column in [*columns, "raw_pixels"]))
    return [table, others]


# ---- pictures ------------------------------------------------------------------------------------------------------
def draw(results: dict, run, path: Path) -> None:
    """probe.png: every row of the table as points with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, learned = pooler_rows(results) + other_rows(results), len(poolers_of(results))
    figure = Figure(figsize=(8.5, 1.6 + 0.36 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    present = [column for column in COLUMNS if any(entries.get(column) for _, entries in rows)]
    for place, column in enumerate(present):
        found = [(i, entries[column]) for i, (_, entries) in enumerate(rows) if entries.get(column)]
        at = np.array([i for i, _ in found]) + 0.22 * (place - (len(present) - 1) / 2)
        middle = np.array([one["accuracy"] for _, one in found])
        ends = np.array([[one["accuracy"] - one["low"], one["high"] - one["accuracy"]] for _, one in found]).T
        words = {"trained": "trained encoder", "untrained": "the same untrained", "raw_pixels": "raw pixels"}[column]
        axes.errorbar(middle, at, xerr=ends.clip(0), fmt="o", ms=5, capsize=3, color=COLUMNS[column], label=words)
    axes.axhline(learned - 0.5, color="lightgray", linewidth=0.8)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[f"{title} (pooler)" if i < learned else title for i, (title, _) in enumerate(rows)],
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="accuracy on the test images, percent, with 95 percent intervals",
        title=f"{run.title}, encoder frozen",
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(present), frameon=False)
    figure.savefig(path)


def examples(run, source, heads: list, groups: dict) -> dict:
    """{"images": (count, 1 or 3, height, width) in [0, 1], "weights": {pooler: (count, rows, cols)}} of test images."""
    images = run.images["test"]
    chosen = pictures.examples(images, EXAMPLES)
    weights = weights_over_images(source, torch.tensor(chosen), groups, heads)
    config = run.model.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    pixels = images.fetch(0, torch.tensor(chosen)) * std + mean
    grid = next(iter(groups.values())).grid
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return {"images": shown, "weights": {name: found.unflatten(1, grid) for name, found in weights.items()}}


def draw_attention(found: dict, results: dict, path: Path) -> None:
    """attention.png: a column for every image, the image on top, below it the weights of each pooler over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, weights = found["images"].clamp(0, 1).permute(0, 2, 3, 1).numpy(), found["weights"]
    height, width = images.shape[1:3]
    rows, columns, side = 1 + len(weights), len(images), 1.4
    size = (max(4.0, side * columns * width / height + 0.9), (side + 0.15) * rows + 0.7)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    titles = ["image", *(f"{name}\n{poolers_of(results)[name]['accuracy']:.1f} %" for name in weights)]
    for ax, title in zip(axes[:, 0], titles, strict=True):
        ax.set_ylabel(title, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for column, image in enumerate(images):
        grey, whole = image.mean(axis=2), {"extent": (0, width, height, 0)}
        axes[0, column].imshow(image if image.shape[2] == 3 else grey, cmap="gray", vmin=0, vmax=1, **whole)
        for ax, maps in zip(axes[1:, column], weights.values(), strict=True):
            heat = maps[column].numpy()
            ax.imshow(grey, cmap="gray", vmin=0, vmax=1, **whole)
            ax.imshow(heat, cmap="magma", vmin=0, vmax=heat.max(), alpha=0.65, **whole)
            ax.set_title(f"x {heat.max() * heat.size:.1f}", fontsize=7, pad=2)
    figure.supxlabel(textwrap.fill(ATTENTION_NOTE, int(size[0] * 16)), fontsize=7)
    figure.savefig(path)


# ---- the folder ----------------------------------------------------------------------------------------------------
def write(results: dict, run) -> None:
    """Writes probe.json and the pictures, and prints the table."""
    run.folder.mkdir(parents=True, exist_ok=True)
    draw(results, run, run.folder / "probe.png")
    made = ["probe.png"]
    if results["examples"].get("weights"):
        draw_attention(results["examples"], results, run.folder / "attention.png")
        made.append("attention.png")
    (run.folder / "probe.json").write_text(json.dumps(to_json(results, run), indent=2) + "\n", encoding="utf-8")
    for table in tables_of(results, run):
        run.console.print(table)
    names = ", ".join(f"{run.folder}/{name}" for name in [*made, "probe.json"])
    run.console.print(f"pictures and numbers: {names}", highlight=False, soft_wrap=True)
    if not run.arguments.uncached:
        run.console.print(
            f"the features stay in {run.cache}: the next probing of this encoder starts with them; remove the folder "
            "to have the space back",
            highlight=False,
            soft_wrap=True,
        )
