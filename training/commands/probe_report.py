"""The results of a probing: the table, probe.json and the pictures."""

from dataclasses import asdict

import torch
from rich.table import Table
from torch import Tensor

import hf_mim
from hf_mim.training.commands.probe_setup import Probe
from hf_mim.training.common.console import make_table
from hf_mim.training.evaluation.bootstrap import accuracy_interval
from hf_mim.training.evaluation.heads import Trained
from hf_mim.training.evaluation.metrics import frozen_scores
from hf_mim.training.evaluation.probe_scores import SHARES, SHOTS, probe_protocol, weights_over_images
from hf_mim.training.own_data import dataset_title
from hf_mim.training.plots.charts import draw_accuracies
from hf_mim.training.plots.pictures import draw_attention
from hf_mim.training.plots.pictures import examples as examples_of
from hf_mim.training.run import versions


RECORDED = (  # of `ProbeArguments`, in probe.json
    *("views", "epochs", "patience", "batch_size", "optimizer"),
    *("weight_decay", "validation", "apply_final_norm", "uncached"),
)
EXAMPLES = 8  # images in attention.png


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
        run.splits.report,
        data=f"{dataset_title(run.data)}, {len(run.images['train']):,} training images{views}, "
        f"{len(run.images['test']):,} test images ({run.splits.note})",
        model=f"{run.source}, {run.model.config.encoder} encoder, {run.model.num_parameters() / 1e6:.2f} M parameters",
        poolers=f"{', '.join(choice.name for choice in run.choices)}; layers {', '.join(map(str, run.layers))}; "
        f"learning rates {', '.join(f'{rate:g}' for rate in arguments.rates)}; "
        f"seeds {', '.join(map(str, arguments.seeds))}",
    )


# ---- numbers -------------------------------------------------------------------------------------------------------
def entry(members: list[Trained], right: dict[int, Tensor]) -> dict:
    """The results of a pooler's best setting; `members` are its heads, one for each seed."""
    first = members[0]
    return {
        **accuracy_interval(torch.stack([right[id(member)] for member in members])),
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
        "protocol": probe_protocol(),
        "data": {
            "dataset": run.data.dataset,
            "train_images": len(run.images["train"]),
            "test_images": len(run.images["test"]),
            "test": run.splits.note,
            "classes": len(labels.unique()),
            "image_size": run.model.config.image_size,
            "bad_images": asdict(run.splits.bad_images()),
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
    for score in frozen_scores():
        entries = {c: column[score.readout].get(score.pooling) for c, column in columns.items()}
        if score.raw_key:
            entries["raw_pixels"] = results["raw_pixels"][score.raw_key]
        if entries["trained"]:
            rows.append((score.title, entries))
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
def examples(run: Probe, source, heads: list[Trained], groups: dict) -> dict:
    """{"images": (count, 1 or 3, height, width) in [0, 1], "weights": {pooler: (count, rows, cols)}} of test images."""
    images = run.images["test"]
    chosen = examples_of(images, EXAMPLES)
    weights = weights_over_images(source, torch.tensor(chosen), groups, heads)
    config = run.model.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    pixels = images.fetch(0, torch.tensor(chosen)) * std + mean
    grid = next(iter(groups.values())).grid
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return {"images": shown, "weights": {name: weight.unflatten(1, grid) for name, weight in weights.items()}}


# ---- the folder ----------------------------------------------------------------------------------------------------
def write(results: dict, run: Probe) -> None:
    """Writes probe.json and the pictures, and prints the table."""
    run.output.check()
    if (bad := run.splits.bad_images()).count:
        run.console.log(str(bad))
    rows, poolers = pooler_rows(results), poolers_of(results)
    title, chart = f"{run.title}, encoder frozen", run.folder / "probe.png"
    draw_accuracies(rows + other_rows(results), title, len(rows), chart, run.arguments.figures)
    made = ["probe.png"]
    if weights := results["examples"].get("weights"):
        titles = {name: f"{name} {poolers[name]['accuracy']:.1f} %" for name in weights}
        picture = draw_attention(results["examples"]["images"], {titles[name]: weights[name] for name in weights})
        picture.save(run.folder / "attention.png")
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
