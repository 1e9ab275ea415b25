"""What continued pretraining gains on new images, and what it costs on the old ones.

    python benchmarks/adapting.py [--images 9000 500] [--seeds 0 1 2] [--steps 200] [--minutes 40]
                                  [--out outputs/adapting]
    python benchmarks/adapting.py --table [--page docs/adapting.md]

The shipped images in two halves: what is worn on the upper body (old) and the rest (new). A small encoder of the recipe
`mae_small` is pretrained on the old half, then further on the new one, in each of the ways of `WAYS`. Scored are k-NN
and linear probe of its frozen features on both halves (five classes each) and on all ten classes, and its CKA to the
start. Every cell (way, images, seed) is one file; what is done already is skipped, so the command can be stopped at any
time and run again, and after `--minutes` it stops by itself. `--table` runs nothing and writes the tables into a page.
"""

import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from measure import add_cell_options, machine, markdown_table, over_seeds, parser, write_json, write_section
from methods import slug
from transformers import set_seed

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.common.device import has_bf16
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.batches import MIMCollator
from hf_mim.training.data.images import MIMDataset
from hf_mim.training.data.sources import open_dataset
from hf_mim.training.data.splits import draw_subset
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.cka import linear_cka
from hf_mim.training.evaluation.metrics import READOUTS
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.trainer import MIMTrainer


OLD = ("T-shirt/top", "Pullover", "Dress", "Coat", "Shirt")  # the other five are new
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
SOURCE_STEPS = 700  # of pretraining on the old half
EVALUATED = {"train": 1000, "test": 1000}  # images of each half
SLOW = {"base_learning_rate": 8e-4}  # a tenth of the recipe's
# Way -> fields of the section `training`, and what is kept. The later ones run when the others are there.
WAYS = {
    "plain": ({}, {}),
    "plain, a tenth of the rate": (SLOW, {}),
    "LoRA": ({"lora": True}, {}),
    "layer decay 0.65": ({"layer_decay": 0.65}, {}),
    "near the weights, 0.01": ({}, {"keep": "weights", "keep_weight": 0.01}),
    "near the features, 1": ({}, {"keep": "features", "keep_weight": 1.0}),
    "near the features, 0.1": ({}, {"keep": "features", "keep_weight": 0.1}),
    "two of three blocks frozen": ({"freeze_layers": 2}, {}),
    "near the weights, 0.001": ({}, {"keep": "weights", "keep_weight": 0.001}),
}
LATER = tuple(WAYS)[6:]
START, SCRATCH = "start", "from scratch on the new"
REFERENCES = (START, SCRATCH, "untrained", "raw pixels")  # beside the ways
HALVES = ("old", "new", "all")


# ---- data ----------------------------------------------------------------------------------------------------------
def model_config() -> MIMConfig:
    section = recipes.resolve("mae_small")["model"]
    decoder = {**section["decoder_config"], "hidden_size": 32, "intermediate_size": 128}
    return MIMConfig(**{**section, "encoder_config": {**section["encoder_config"], **SIZES}, "decoder_config": decoder})


def open_halves(config: MIMConfig) -> dict[str, dict[str, MIMDataset]]:
    """{"old", "new": {"train", "test": images, without augmentation but for flips in training}}."""
    data, halves = DataArguments(horizontal_flip=True), {"old": {}, "new": {}}
    for split, rows in open_dataset(data).items():
        names, labels = rows.features["label"].names, np.array(rows["label"][:])
        is_old = np.isin(labels, [names.index(name) for name in OLD])
        for half, chosen in (("old", is_old), ("new", ~is_old)):
            part: datasets.Dataset = rows.select(np.flatnonzero(chosen))
            halves[half][split] = MIMDataset(part, config, data, split == "train")
    return halves


def some_of(dataset: MIMDataset, count: int, seed: int) -> MIMDataset | torch.utils.data.Dataset:
    """`count` images, drawn from the seed and of every class; all where there are not more."""
    if count >= len(dataset):
        return dataset
    return Part(dataset, draw_subset(dataset.labels.numpy(), count, seed).tolist())


class Part(torch.utils.data.Dataset):
    """Some images of a data set, which is told the epoch."""

    def __init__(self, dataset: MIMDataset, indices: list[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __getitems__(self, positions: list[int]):
        return self.dataset.__getitems__([self.indices[position] for position in positions])


# ---- cells ---------------------------------------------------------------------------------------------------------
def pretrain(model: MIMForPreTraining, dataset, steps: int, seed: int, training: dict, kept: dict, folder: Path):
    """Trains in place, by the recipe `mae_small` but for its length."""
    section = {**recipes.resolve("mae_small")["training"], **training}
    section |= {"output_dir": str(folder), "max_steps": steps, "seed": seed, "save_strategy": "no", "report_to": "none"}
    trainer = MIMTrainer(
        model=model,
        args=MIMTrainingArguments(**section),
        train_dataset=dataset,
        data_collator=MIMCollator(model.config, model.mask_grid(28, 28), normalized=False),
        **kept,
    )
    trainer.train()
    losses = [entry["loss"] - entry.get("keep_loss", 0) for entry in trainer.state.log_history if "loss" in entry]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def source_of(halves, seed: int, args) -> MIMForPreTraining:
    """The encoder that was pretrained on the old half."""
    folder = args.out / f"source-{args.source_steps}-seed{seed}"
    if not (folder / "model.safetensors").exists():
        set_seed(seed)
        model = MIMForPreTraining(model_config())
        pretrain(model, halves["old"]["train"], args.source_steps, seed, {}, {}, folder)
        model.save_pretrained(folder)
    return MIMForPreTraining.from_pretrained(folder)


references: dict[int, dict] = {}  # features of the start, by seed


def run_cell(way: str, images: int, seed: int, halves, args) -> dict:
    """{"old", "new", "all": {"knn", "linear": percent}, "cka": {"old", "new"}} and more."""
    started, loss = time.process_time(), None
    if way == "raw pixels":
        return scores_of({key: frozen.raw_pixels(pixels(halves, *key, args)) for key in sides()}, halves, args)
    start = source_of(halves, seed, args)
    if seed not in references:
        references[seed] = features_of(start, halves, args)
    set_seed(seed + 1000)
    model = MIMForPreTraining(model_config()) if way in (SCRATCH, "untrained") else start
    if way in WAYS or way == SCRATCH:
        training, kept = WAYS.get(way, ({}, {}))
        new = some_of(halves["new"]["train"], images, seed)
        loss = pretrain(model, new, args.steps, seed, training, kept, args.out / "runs")
    seconds = time.process_time() - started
    features = features_of(model, halves, args)
    cka = {half: linear_cka(references[seed][half, "test"], features[half, "test"]) for half in ("old", "new")}
    return {**scores_of(features, halves, args), "cka": cka, "loss": loss, "seconds": round(seconds, 1)}


def sides() -> list[tuple[str, str]]:
    return [(half, split) for half in ("old", "new") for split in ("train", "test")]


def chosen(halves, half: str, split: str, args) -> tuple[torch.utils.data.Dataset, torch.Tensor]:
    """The images that are scored, always the same, and their labels."""
    most = EVALUATED[split] if args.evaluated is None else args.evaluated
    return frozen.subset(halves[half][split].without_augmentation(), most)


def pixels(halves, half: str, split: str, args):
    return frozen.pixel_loader(chosen(halves, half, split, args)[0], model_config())


def features_of(model, halves, args) -> dict[tuple[str, str], torch.Tensor]:
    """Means of the patch tokens, by half and split."""
    return {
        key: frozen.extract_features(model.mim, pixels(halves, *key, args), has_bf16())["mean"].clone()
        for key in sides()
    }


def scores_of(features: dict[tuple[str, str], torch.Tensor], halves, args) -> dict[str, dict[str, float]]:
    """Accuracies of k-NN and linear probe on each half and on both together, percent."""
    scores = {}
    labels = {key: chosen(halves, *key, args)[1] for key in features}
    for half in HALVES:
        parts = ("old", "new") if half == "all" else (half,)
        (train, train_labels), (test, test_labels) = (
            tuple(torch.cat([table[part, split] for part in parts]) for table in (features, labels))
            for split in ("train", "test")
        )
        scores[half] = {
            name: frozen.readout_accuracy(metric.compute, train, train_labels, test, test_labels)
            for name, metric in READOUTS.items()
        }
    return scores


# ---- tables --------------------------------------------------------------------------------------------------------
def change_table(cells: dict[tuple[str, int, int], dict], images: int, seeds: list[int]) -> str:
    """Of each way: accuracies less those of the start of the same seed, with their deviation over the seeds."""
    rows = []
    for way in (START, *WAYS, *REFERENCES[1:]):
        known = [seed for seed in seeds if (way, images, seed) in cells and (START, images, seed) in cells]
        if not known:
            continue
        row: list = [way]
        for half in ("new", "old", "all"):
            for name in READOUTS:
                values = [cells[way, images, seed][half][name] for seed in known]
                start = [cells[START, images, seed][half][name] for seed in known]
                row.append(over_seeds(values) if way == START else over_seeds(np.subtract(values, start), sign=True))
        ckas = [cells[way, images, seed].get("cka") for seed in known]
        row += [over_seeds([cka[half] for cka in ckas], digits=2) if ckas[0] else "" for half in ("new", "old")]
        rows.append([*row, len(known)])
    accuracies = [f"{half}: {metric.title}" for half in ("new", "old", "all ten") for metric in READOUTS.values()]
    return markdown_table(["", *accuracies, "new: CKA to the start", "old: CKA", "seeds"], rows)


def report(cells: dict[tuple[str, int, int], dict], args) -> str:
    parts = [*sorted({cell["machine"] for cell in cells.values()})]
    for images in args.images:
        if any(key[1] == images for key in cells):
            parts += [f"### {images:,} new images, {args.steps} steps of 64", change_table(cells, images, args.seeds)]
    return "\n\n".join(parts)


# ---- all of them ---------------------------------------------------------------------------------------------------
def cell_file(way: str, images: int, seed: int, args) -> Path:
    """Its name holds what its scores depend on."""
    name = f"{slug(way)}-{images}-{args.source_steps}-{args.steps}-{args.evaluated or 'all'}-seed{seed}.json"
    return args.out / name


def read_arguments(arguments: list[str] | None):
    numbers = {"steps": 200, "source_steps": SOURCE_STEPS, "minutes": 40.0}
    numbers["evaluated"] = (None, f"images of each half and split; by default {EVALUATED}")
    options = parser(__doc__, out=None, **numbers)
    options.add_argument("--images", nargs="+", type=int, default=[9000, 500], help="new images to train on")
    add_cell_options(options, "outputs/adapting", "docs/adapting.md")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> str:
    args = read_arguments(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    groups = ((*REFERENCES, *(way for way in WAYS if way not in LATER)), LATER)
    order = [(way, n, seed) for n in args.images for group in groups for seed in args.seeds for way in group]
    missing = [cell for cell in order if not cell_file(*cell, args).exists()]
    halves = open_halves(model_config()) if missing and not args.table else {}
    while missing and not args.table and time.monotonic() < deadline:
        cell = missing.pop(0)
        scores = run_cell(*cell, halves, args)
        write_json(cell_file(*cell, args), {**scores, "machine": machine()})
        print(f"{cell}: {json.dumps(scores)}; {len(missing)} to go", flush=True)
    cells = {cell: json.loads(file.read_text()) for cell in order if (file := cell_file(*cell, args)).exists()}
    shown = report(cells, args)
    if args.table:
        write_section(args.page, "adapting", shown)
    print(f"{shown}\n\n{len(missing)} cells to go: run the command again" if missing else shown)
    return shown


if __name__ == "__main__":
    main()
