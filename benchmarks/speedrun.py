"""How long until a frozen encoder knows the shipped images as well as their pixels do?

    python benchmarks/speedrun.py [--entries mae_small Muon ...] [--seeds 0 1 2] [--minutes 55]
                                  [--out outputs/speedrun]
    python benchmarks/speedrun.py --pace [--entries ...]
    python benchmarks/speedrun.py --table [--page docs/speedrun.md]

The rules stand in docs/speedrun.md. An entry (`ENTRIES`) is a recipe with settings, its number of steps among them; a
cell is one run of it with one seed, and one file. What is done is skipped, and after `--minutes` the script stops: run
it again to go on. `--pace` times a step of each entry, in turn: seconds of whole runs depend on what else the machine
did. No score is taken on test images: 3,000 of the 20,000 training images are left out of training, and scores are
taken on them.
"""

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import add_cell_options, alternate, machine, markdown_table, over_seeds, parser, write_json, write_section
from methods import refresh_statistics
from rich.console import Console
from torch.utils.data import Subset

from hf_mim.training.commands.pretrain import make_trainer, set_up, train
from hf_mim.training.evaluation import frozen
from hf_mim.training.evaluation.readouts import LinearProbe, NearestNeighbours


HELD_OUT, LABELLED = 3000, 10_000
PACE, PACE_ROUNDS = "pace.json", 20
MAE = ("mae_small", "training.max_steps=3000")
MUON = "training.optimizer=muon"
HOG = ("model.target=hog", "model.target_config={}")
CROSS = (
    "model.decoder=cross_attention",
    "model.decoder_config={hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 4, intermediate_size: 256}",
)
# 20 of the 37 hidden patches at each step, other ones each time
SOME = (*CROSS, "model.decoder_config.prediction_ratio=0.4")
TWO = ("model.masks_per_image=2", "training.per_device_train_batch_size=32", "training.learning_rate=2e-3")
SHORT = ("quick", "training.max_steps=600")
# The other small recipes, and how many steps AdamW takes; see `by_both`.
SMALL = {
    "crossmae_small": 3000,
    "pixio_small": 2000,
    "hiera_small": 2000,
    "a2mim_vit_small": 1500,
    "maskfeat_small": 1500,
    "fcmae_small": 1500,
    "data2vec_small": 800,
    "a2mim_resnet18_small": 600,
    "spark_small": 400,
}
WITH_HOG = ("crossmae_small", "pixio_small", "hiera_small", "fcmae_small")


def by_both(recipe: str, steps: int) -> dict[str, tuple[str, ...]]:
    """Two entries: AdamW, and half of the steps by Muon, with HOG beside pixels where the decoder can predict both."""
    hog = recipe in WITH_HOG
    adamw = (recipe, f"training.max_steps={steps}", "training.optimizer=null")
    half = (recipe, f"training.max_steps={steps // 2}", MUON, "training.muon_scale=3")
    return {
        f"{recipe} by AdamW": adamw,
        f"{recipe} by Muon{' with HOG' * hog}, half the steps": (*half, *["model.target_config.hog_weight=8"] * hog),
    }


# name: recipe, settings
ENTRIES = {
    "mae_small": MAE,
    "Muon": (*MAE, MUON),
    "Muon, its rate 3 times": (*MAE, MUON, "training.muon_scale=3"),
    "HOG as target": (*MAE, *HOG),
    "quick": ("quick",),
    "quick, 1,200 steps": ("quick", "training.max_steps=1200"),
    "quick, 900 steps": ("quick", "training.max_steps=900"),
    "quick, 600 steps": SHORT,
    "quick, some of the hidden patches, 900 steps": ("quick", "training.max_steps=900", *SOME),
    "quick, some of the hidden patches, 600 steps": (*SHORT, *SOME),
    "quick by AdamW, 600 steps": (*SHORT, "training.optimizer=null"),
    "quick, two masks of half the images, 600 steps": (*SHORT, *TWO),
    "quick, 300 steps of 128 images": ("quick", "training.max_steps=300", "training.per_device_train_batch_size=128"),
    "short cooldown": (
        *MAE,
        "training.lr_scheduler_type=warmup_stable_decay",
        "training.lr_scheduler_kwargs={num_decay_steps: 600, min_lr_ratio: 0.01}",
    ),
    **{name: words for recipe, steps in SMALL.items() for name, words in by_both(recipe, steps).items()},
}


@dataclass
class Part:
    """The images of a data set at `indices`, in the way that `MIMTrainer` wants them."""

    dataset: object
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[int(self.indices[index])]

    def __getitems__(self, indices: list[int]) -> list:
        return self.dataset.__getitems__(self.indices[indices].tolist())

    def __getattr__(self, name: str):
        return getattr(self.dataset, name)


def run_cell(entry: str, seed: int, args) -> dict:
    """Trains one encoder: seconds and images of its training, and its scores on the images left out, percent."""
    recipe, *words = ENTRIES[entry]
    folder = args.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    words += [f"training.seed={seed}", f"training.output_dir={folder}", "training.save_strategy=no"]
    words += [f"training.max_steps={args.steps}"] if args.steps else []
    run = set_up(recipe, [*words, "training.watch_every=0"], Console(quiet=True))
    order = np.random.default_rng(args.draw).permutation(len(run.splits.train))
    whole, run.splits.train = run.splits.train_eval, Part(run.splits.train, np.sort(order[HELD_OUT:]))
    started = time.process_time()
    with run.owning_folder():
        trainer = train(run)
    seconds = time.process_time() - started
    shutil.rmtree(folder)
    encoder = run.model.mim.eval()
    refresh_statistics(encoder)
    sides = [Subset(whole, part.tolist()) for part in (order[HELD_OUT:][:LABELLED], order[:HELD_OUT])]
    scores = accuracies(
        [frozen.extract_features(encoder, frozen.pixel_loader(side, run.config))["mean"] for side in sides], sides
    )
    pixels = accuracies([frozen.raw_pixels(frozen.pixel_loader(side, run.config)) for side in sides], sides)
    images = trainer.state.max_steps * run.arguments.total_batch_size
    recipe = {section: run.recipe[section] for section in ("model", "data", "training")}
    return {**scores, "raw_pixels": pixels, "seconds": round(seconds, 1), "images": images, "recipe": recipe}


def step_of(entry: str, args) -> Callable[[], None]:
    """One step of the entry's training: batch, masks, loss, gradient, optimizer."""
    recipe, *words = ENTRIES[entry]
    run = set_up(recipe, [*words, f"training.output_dir={args.out / 'pace'}"], Console(quiet=True))
    trainer = make_trainer(run)
    trainer.create_optimizer_and_scheduler(run.arguments.max_steps)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare(trainer.model).train()
    batches = itertools.chain.from_iterable(trainer.get_train_dataloader() for _ in itertools.count())

    def step() -> None:
        trainer.training_step(model, next(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def measure_pace(args) -> None:
    """Milliseconds of a step of each entry, the median of `PACE_ROUNDS` in which all take turns."""
    different = {setting(entry): entry for entry in args.entries}.values()
    times = alternate({entry: step_of(entry, args) for entry in different}, PACE_ROUNDS, warmup=3)
    pace = {entry: round(1000 * statistics.median(seconds), 2) for entry, seconds in times.items()}
    write_json(args.out / PACE, {"milliseconds": pace, "machine": machine()})


def read_pace(folder: Path) -> dict[str, float]:
    """Milliseconds of a step by entry; entries that differ in their length alone have one pace."""
    if not (folder / PACE).exists():
        return {}
    measured = json.loads((folder / PACE).read_text())["milliseconds"]
    paces = {setting(entry): pace for entry, pace in measured.items() if entry in ENTRIES}
    return {entry: paces[setting(entry)] for entry in ENTRIES if setting(entry) in paces}


def setting(entry: str) -> tuple[str, ...]:
    return tuple(word for word in ENTRIES[entry] if not word.startswith("training.max_steps="))


def accuracies(features: list[torch.Tensor], sides: list[Subset]) -> dict[str, float]:
    labels = [side.dataset.labels[side.indices] for side in sides]
    readouts = {"knn": NearestNeighbours, "linear": LinearProbe}
    return {
        name: frozen.readout_accuracy(fit, features[0], labels[0], features[1], labels[1])
        for name, fit in readouts.items()
    }


def report(cells: dict[str, list[dict]], paces: dict[str, float]) -> str:
    """Markdown: the entries with the linear probe's goal reached first, the quickest first.

    Args:
        paces: milliseconds of a step by entry; seconds are those of the runs where there is none.
    """
    if not cells:
        raise SystemExit("no results: run without --table and --pace first")
    pixels = next(iter(cells.values()))[0]["raw_pixels"]

    def rank(entry: str) -> tuple[bool, float]:
        reached = np.mean([cell["linear"] for cell in cells[entry]]) >= pixels["linear"]
        return not reached, np.mean(seconds_of(entry)) if reached else 0

    def seconds_of(entry: str) -> list[float]:
        if entry not in paces:
            return [cell["seconds"] for cell in cells[entry]]
        cell = cells[entry][0]
        return [cell["images"] / cell["recipe"]["training"]["per_device_train_batch_size"] * paces[entry] / 1000]

    rows = []
    for entry in sorted(cells, key=rank):
        found = cells[entry]
        scores = [over_seeds([cell[name] for cell in found]) for name in ("knn", "linear")]
        seconds = over_seeds(seconds_of(entry), digits=0)
        pace = f"{paces[entry]:.0f}" if entry in paces else ""
        reached = "no" if rank(entry)[0] else "yes" if len(found) > 2 else "so far"
        rows.append([entry, f"{found[0]['images']:,}", pace, seconds, *scores, reached, len(found)])
    rows.append(["raw pixels", "", "", "", f"{pixels['knn']:.1f}", f"{pixels['linear']:.1f}", "", ""])
    header = ["entry", "images seen", "ms a step", "processor seconds", "k-NN", "linear probe", "reached", "seeds"]
    machines = " ".join(sorted({cell["machine"] for found in cells.values() for cell in found}))
    return f"{machines}\n\n{markdown_table(header, rows)}"


def main(arguments: list[str] | None = None) -> str:
    options = parser(
        __doc__,
        out=None,
        steps=(None, "in place of the entries' own"),
        minutes=55.0,
        draw=(0, "which images are left out"),
    )
    options.add_argument("--entries", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    options.add_argument("--pace", action="store_true", help="time a step of each entry, and run nothing else")
    add_cell_options(options, "outputs/speedrun", "docs/speedrun.md")
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pace:
        measure_pace(args)
    deadline, cells = time.monotonic() + 60 * args.minutes, {}
    for seed in args.seeds:
        for entry in args.entries:
            name = "-".join("".join(c if c.isalnum() else " " for c in entry).split())
            draw = f"-draw{args.draw}" if args.draw else ""
            file = args.out / f"{name}-{args.steps or 'own'}{draw}-seed{seed}.json"
            if not file.exists() and not (args.table or args.pace) and time.monotonic() < deadline:
                write_json(file, {**run_cell(entry, seed, args), "machine": machine()})
                print(entry, seed, file.read_text(), flush=True)
            if file.exists():
                cells.setdefault(entry, []).append(json.loads(file.read_text()))
    text = report(cells, read_pace(args.out))
    print(text)
    if args.table:
        write_section(args.page, "speedrun", text)
    return text


if __name__ == "__main__":
    main()
