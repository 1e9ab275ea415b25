"""The results of a probing: the table, probe.json and the pictures."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import hf_mim
from hf_mim.training.commands.probe_setup import Probe
from hf_mim.training.console import make_table
from hf_mim.training.evaluation.heads import Trained
from hf_mim.training.evaluation.probe_scores import POOLINGS, PROTOCOL, SHARES, SHOTS, bootstrap, weights_over_images
from hf_mim.training.plots import pictures
from hf_mim.training.run import dataset_title, versions


POOLING_TITLES = {"mean": "mean of the patches", "cls": "class token"}
COLUMNS = {"trained": "tab:blue", "untrained": "tab:gray", "raw_pixels": "tab:olive"}
RECORDED = (  # of `ProbeArguments`, in probe.json
    *("views", "epochs", "patience", "batch_size", "optimizer"),
    *("weight_decay", "validation", "apply_final_norm", "uncached"),
)
COLUMN_TITLES = {"trained": "trained encoder", "untrained": "the same untrained", "raw_pixels": "raw pixels"}
EXAMPLES = 8  # images in attention.png
ATTENTION_NOTE = (
    "Bright: patches that count most for the pooler's vector (its weights, the mean over heads or queries), from zero "
    "to the picture's largest; the number is that largest weight as a multiple of an even share."
)


# ---- texts ---------------------------------------------------------------------------------------------------------
def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def describe_encoder(model, weights: str) -> dict:
    """What tokens follow from beside the image, for the key of a cache."""
    config = model.config
    fields = ("encoder", "encoder_config", "image_size", "num_channels", "image_mean", "image_std")
    made_by = {"hf_mim": hf_mim.__version__, **{name: versions()[name] for name in ("torch", "transformers")}}
    return {"weights": weights, **{name: getattr(config, name) for name in fields}, "made by": made_by}


def describe(run: Probe) -> None:
    """Prints what will be done."""
    arguments = run.arguments
    views = f", {arguments.views} views" if arguments.views > 1 else ""
    run.describe(
        data=f"{dataset_title(run.data)}, {len(run.images['train']):,} training images{views}, "
        f"{len(run.images['test']):,} test images ({run.splits.note})",
        model=f"{run.source}, {run.model.config.encoder} encoder, {run.model.num_parameters() / 1e6:.2f} M parameters",
        poolers=f"{', '.join(choice.name for choice in run.choices)}; layers {', '.join(map(str, run.layers))}; "
        f"learning rates {', '.join(f'{rate:g}' for rate in arguments.learning_rates)}; "
        f"seeds {', '.join(map(str, arguments.seeds))}",
    )


# ---- numbers -------------------------------------------------------------------------------------------------------
def entry(members: list[Trained], right: dict[int, Tensor]) -> dict:
    """The results of a pooler's best setting; `members` are its heads, one for each seed."""
    first = members[0]
    return {
        **bootstrap(torch.stack([right[id(member)] for member in members])),
        "seeds": [100 * right[id(member)].double().mean().item() for member in members],
        "layer": first.layer,
        "learning_rate": first.learning_rate,
        "epochs": [member.epoch for member in members],
        "parameters": first.parameters,
    }


def settings(trained: list[Trained]) -> list[dict]:
    """Every head that was trained, with its accuracy on the held-out training images."""
    return [
        {
            "pooler": head.name,
            "layer": head.layer,
            "learning_rate": head.learning_rate,
            "seed": head.seed,
            "validation_accuracy": head.accuracy,
            "epoch": head.epoch,
        }
        for head in trained
    ]


def to_json(results: dict, run: Probe) -> dict:
    """probe.json: {"model", "protocol", "data", "seeds", "poolers": {name: {"accuracy", "low", "high", ...}}, "knn" and
    "linear": {pooling: {"accuracy", "low", "high"}}, "low_shot": {pooling: {"1", "5", "10", "1%", "10%": ...}},
    "settings", "untrained": the same five, "raw_pixels", "arguments", "versions", "seconds", "command"}; accuracies in
    percent, layers as blocks passed."""
    columns, arguments = results["columns"], run.arguments
    labels = run.images["train"].labels
    poolers = {choice.name: {"pooler": choice.kind, **choice.options} for choice in run.choices}
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
        "arguments": {**{name: getattr(arguments, name) for name in RECORDED}, "pooler_options": poolers},
        "versions": {"hf_mim": hf_mim.__version__, **versions()},
        "device": run.model.device.type,
        "seconds": results["seconds"],
        "command": run.command,
    }


# ---- the table -----------------------------------------------------------------------------------------------------
def interval(result: dict | None) -> str:
    return f"{result['accuracy']:.1f} ({result['low']:.1f}-{result['high']:.1f})" if result else ""


def pooler_rows(results: dict) -> list[tuple[str, dict]]:
    """Rows of a table or a picture: a title, and {column: entry}."""
    columns = results["columns"]
    return [(name, {c: column["poolers"].get(name) for c, column in columns.items()}) for name in poolers_of(results)]


def other_rows(results: dict) -> list[tuple[str, dict]]:
    """As of `pooler_rows`: k-NN, linear probe and few labels."""
    columns, rows = results["columns"], []
    for kind, title in (("linear", "linear probe"), ("knn", "k-NN")):
        for pooling in POOLINGS:
            entries = {c: column[kind].get(pooling) for c, column in columns.items()}
            if pooling == "mean":
                entries["raw_pixels"] = results["raw_pixels"][kind]
            if entries["trained"]:
                rows.append((f"{title}, {POOLING_TITLES[pooling]}", entries))
    for shots in (*(str(count) for count in SHOTS), *(f"{share:.0%}" for share in SHARES)):
        entries = {c: column["low_shot"]["mean"].get(shots) for c, column in columns.items()}
        if entries["trained"]:
            unit = "of the labels" if "%" in shots else "label a class" if shots == "1" else "labels a class"
            rows.append((f"{shots} {unit}", entries))
    return rows


def poolers_of(results: dict) -> dict[str, dict]:
    return results["columns"]["trained"]["poolers"]


def tables_of(results: dict, run: Probe) -> list[Table]:
    columns = list(results["columns"])
    return [
        make_table(
            ("", *(column.replace("_", " ") for column in columns), "layer", "rate", "parameters"),
            [
                (name, *(interval(entries[column]) for column in columns), *setting(poolers_of(results)[name]))
                for name, entries in pooler_rows(results)
            ],
            title=f"{run.title}, encoder frozen: accuracy behind trained poolers, percent (95 percent interval)",
            caption=f"{len(run.images['train']):,} training images, {len(run.images['test']):,} test images, seeds "
            f"{', '.join(map(str, run.arguments.seeds))}. Layer and learning rate are the best on held-out training "
            "images.",
        ),
        make_table(
            ("", *(column.replace("_", " ") for column in columns), "raw pixels"),
            [
                (title, *(interval(entries.get(column)) for column in [*columns, "raw_pixels"]))
                for title, entries in other_rows(results)
            ],
            title="the same features without a trained pooler",
            caption="Few labels: linear probe on the mean of the patches.",
        ),
    ]


def setting(best: dict) -> tuple[str, str, str]:
    return str(best["layer"]), f"{best['learning_rate']:g}", f"{best['parameters']:,}"


# ---- pictures ------------------------------------------------------------------------------------------------------
def draw(results: dict, run: Probe, path: Path) -> None:
    """probe.png: every row of the table as points with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, learned = pooler_rows(results) + other_rows(results), len(poolers_of(results))
    figure = Figure(figsize=(8.5, 1.6 + 0.36 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    present = [column for column in COLUMNS if any(entries.get(column) for _, entries in rows)]
    for place, column in enumerate(present):
        points = [(i, entries[column]) for i, (_, entries) in enumerate(rows) if entries.get(column)]
        height = np.array([i for i, _ in points]) + 0.22 * (place - (len(present) - 1) / 2)
        accuracy, low, high = (np.array([point[key] for _, point in points]) for key in ("accuracy", "low", "high"))
        ends = np.stack([accuracy - low, high - accuracy]).clip(0)
        color, label = COLUMNS[column], COLUMN_TITLES[column]
        axes.errorbar(accuracy, height, xerr=ends, fmt="o", ms=5, capsize=3, color=color, label=label)
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


def examples(run: Probe, source, heads: list[Trained], groups: dict) -> dict:
    """{"images": (count, 1 or 3, height, width) in [0, 1], "weights": {pooler: (count, rows, cols)}} of test images."""
    images = run.images["test"]
    chosen = pictures.examples(images, EXAMPLES)
    weights = weights_over_images(source, torch.tensor(chosen), groups, heads)
    config = run.model.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    pixels = images.fetch(0, torch.tensor(chosen)) * std + mean
    grid = next(iter(groups.values())).grid
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return {"images": shown, "weights": {name: weight.unflatten(1, grid) for name, weight in weights.items()}}


def draw_attention(examples: dict, results: dict, path: Path) -> None:
    """attention.png: a column for every image, the image on top, below it the weights of each pooler over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, weights = examples["images"].clamp(0, 1).permute(0, 2, 3, 1).numpy(), examples["weights"]
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
def write(results: dict, run: Probe) -> None:
    """Writes probe.json and the pictures, and prints the table."""
    run.folder.mkdir(parents=True, exist_ok=True)
    draw(results, run, run.folder / "probe.png")
    made = ["probe.png"]
    if results["examples"].get("weights"):
        draw_attention(results["examples"], results, run.folder / "attention.png")
        made.append("attention.png")
    run.write_json("probe.json", to_json(results, run))
    for table in tables_of(results, run):
        run.console.show(table)
    run.console.log(f"pictures and numbers: {', '.join(f'{run.folder}/{name}' for name in [*made, 'probe.json'])}")
    if not run.arguments.uncached:
        run.console.log(
            f"the features stay in {run.cache}: the next probing of this encoder starts with them; remove the folder "
            "to free the space"
        )
