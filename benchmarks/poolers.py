"""Which pooler reads which encoder best: an autoencoder, a distilled and a supervised one, and an untrained one.

    python benchmarks/poolers.py [--seeds 0 1 2] [--images 2000] [--steps 400] [--minutes 25] [--out outputs/poolers]

The encoders are ViTs of one size on the shipped images. `mae` is the recipe `quick`; `supervised` a classifier that
reads the class token, trained for `--steps` steps of 64 images with the labels of all training images; `distilled` the
recipe `maskdistill_small` for as many steps, with the supervised one of the same seed as its teacher, whose mean token
its class token predicts too. Each is probed by `hf-mim probe` on the first `--images` training images (a tenth) and all
test images, with that seed. What is done is skipped, and after `--minutes` the script stops by itself: run it again to
go on.
"""

import json
import time
from pathlib import Path

import numpy as np
from measure import markdown_table, parser, write_section
from methods import train_supervised
from rich.console import Console
from transformers import set_seed

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.pretrain import pretrain
from hf_mim.training.commands.probe import encode, probe_poolers
from hf_mim.training.commands.probe_setup import set_up


ENCODERS = {
    "mae": "masked autoencoder",
    "distilled": "distilled",
    "supervised": "supervised",
    "untrained": "untrained",
}
POOLERS = ("cls", "mean", "abmilp", "efficient")
OURS, USUAL = "abmilp", "cls"


# ---- encoders ------------------------------------------------------------------------------------------------------
def make_encoder(name: str, seed: int, args) -> Path:
    """The folder of an encoder, trained unless it is there."""
    folder = args.out / f"{name}-seed{seed}"
    if (folder / "config.json").exists():
        return folder
    quiet = Console(quiet=True)
    settings = [f"training.seed={seed}", f"training.output_dir={folder}", "data.max_eval_images=0"]
    settings += ["training.save_strategy='no'", "training.watch_every=0"]
    if name == "mae":
        steps = [f"training.max_steps={args.mae_steps}"] if args.mae_steps else []
        pretrain("quick", [*settings, *steps], quiet)
    elif name == "distilled":
        teacher = make_encoder("supervised", seed, args)
        target = [f"model.target_config={{teacher: {teacher}, layers: [-1], match: interpolate, global_weight: 1}}"]
        pretrain("maskdistill_small", [*settings, *target, f"training.max_steps={args.steps}"], quiet)
    elif name == "supervised":
        config = MIMConfig(**{**recipes.resolve("quick")["model"], "num_labels": 10, "pooler": "cls"})
        train_supervised(config, folder, args.steps, seed, seed=seed)
    else:
        set_seed(seed)
        MIMForPreTraining(MIMConfig(**recipes.resolve("quick")["model"])).save_pretrained(folder)
    return folder


# ---- probing -------------------------------------------------------------------------------------------------------
def probe_encoder(name: str, seed: int, args) -> dict:
    """What `hf-mim probe` finds of the poolers; kept in a file."""
    file = args.out / f"{name}-seed{seed}-{args.images}.json"
    if file.exists():
        return json.loads(file.read_text())
    started, quiet = time.process_time(), Console(quiet=True)
    options = [f"probe.poolers=[{', '.join(POOLERS)}]", f"probe.seeds=[{seed}]", f"probe.epochs={args.epochs}"]
    options += [f"data.max_train_images={args.images}", f"probe.cache={args.out / 'tokens'}"]
    options += [f"data.max_eval_images={args.test_images}"] if args.test_images else []
    run = set_up(str(make_encoder(name, seed, args)), options, quiet)
    sides = encode(run, {"trained": run.model})["trained"]
    found = {"poolers": probe_poolers(run, "trained", run.model, sides)[0]}
    found["seconds"] = time.process_time() - started
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


# ---- report --------------------------------------------------------------------------------------------------------
def cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def report(results: dict[str, dict[int, dict]], args) -> str:
    """Markdown: mean and standard deviation over the seeds that are there."""
    rows = []
    for name, title in ENCODERS.items():
        found = list(results.get(name, {}).values())
        if found:
            accuracies = [cell([one["poolers"][pooler]["accuracy"] for one in found]) for pooler in POOLERS]
            gains = [cell(gain_of(found, pooler)) for pooler in (OURS, "efficient")]
            rows.append([title, *accuracies, *gains, len(found)])
    header = ["encoder", *POOLERS, "abmilp less cls", "efficient less cls", "seeds"]
    command = f"python benchmarks/poolers.py --seeds {' '.join(map(str, args.seeds))} --images {args.images}"
    command += f" --steps {args.steps} --epochs {args.epochs}"
    mae = f"{args.mae_steps:,} steps" if args.mae_steps else "the recipe's 20 epochs"
    words = f"`{command}`\n\nAccuracy on the {args.test_images or 3000:,} test images, percent, of poolers trained on "
    words += f"{args.images:,} of the 20,000 training images; mean and standard deviation over encoders and probes of "
    words += f"different seeds. Budgets: `quick` {mae}, the others {args.steps:,} steps of 64 images."
    return f"{words}\n\n{markdown_table(header, rows)}"


def gain_of(found: list[dict], pooler: str) -> list[float]:
    return [one["poolers"][pooler]["accuracy"] - one["poolers"][USUAL]["accuracy"] for one in found]


def arguments(argv: list[str] | None):
    numbers = {
        "images": (2000, "training images with a label"),
        "test_images": (None, "test on so many, always the same; by default all"),
        "steps": (400, "of the supervised and the distilled encoder"),
        "mae_steps": (None, "of the autoencoder; by default the whole recipe"),
        "epochs": (20, "of the poolers, at most"),
        "minutes": 25.0,
    }
    options = parser(__doc__, out=None, **numbers)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--out", type=Path, default=Path("outputs/poolers"))
    options.add_argument("--page", help="put the table into this Markdown page")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> str:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + 60 * args.minutes, {}
    for seed in args.seeds:  # a whole table of one seed first
        for name in ENCODERS:
            if time.monotonic() > deadline:
                print("out of time: run it again to go on", flush=True)
                break
            results.setdefault(name, {})[seed] = found = probe_encoder(name, seed, args)
            shown = {pooler: round(entry["accuracy"], 1) for pooler, entry in found["poolers"].items()}
            print(f"{name}, seed {seed}: {shown}, {found['seconds']:.0f} s of the processor", flush=True)
    text = report(results, args)
    print(text)
    if args.page:
        write_section(args.page, "poolers", text)
    return text


if __name__ == "__main__":
    main()
