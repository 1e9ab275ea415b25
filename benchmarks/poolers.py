"""Which pooler reads which encoder best, and where the encoder's attention goes.

    python benchmarks/poolers.py [--encoders mae ...] [--seeds 0 1 2] [--images 2000] [--steps 2000] [--minutes 50]
                                 [--out outputs/poolers]

The encoders are ViTs of one size, trained on the shipped images for the same number of steps of 64 images: those of
`benchmarks/methods.py`, which runs what is missing of them (MAE; features of the teacher lite0, token by token; and the
untrained encoder), and a classifier that reads the class token, trained with the labels of all training images. Each is
probed by `hf-mim probe` on the first `--images` training images (a tenth) and all test images, with the encoder's seed.
What is done is skipped, and after `--minutes` the script stops by itself: run it again to go on.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from measure import markdown_table, over_seeds, parser, write_json, write_section
from methods import main as run_methods
from methods import slug, train_supervised
from rich.console import Console

from hf_mim import MIMConfig, MIMModel
from hf_mim.analysis.attention_flow import row_statistics
from hf_mim.training import recipe as recipes
from hf_mim.training.commands.probe import encode, probe_poolers
from hf_mim.training.commands.probe_setup import set_up
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.pretraining import load_splits
from hf_mim.training.evaluation import frozen


ENCODERS = {
    "mae": "masked autoencoder",
    "token-wise": "distilled",
    "supervised": "supervised",
    "untrained": "untrained",
}
POOLERS = ("cls", "mean", "abmilp", "efficient")
SHOWN = 512  # test images whose attention is looked at
OURS, USUAL = "abmilp", "cls"


# ---- encoders ------------------------------------------------------------------------------------------------------
def make_encoder(name: str, seed: int, args) -> Path:
    """The folder of an encoder, trained unless it is there."""
    if name == "supervised":
        folder = args.out / f"{name}-seed{seed}-{args.steps}"
        if not (folder / "config.json").exists():
            config = MIMConfig(**{**recipes.resolve("mae_small")["model"], "num_labels": 10, "pooler": "cls"})
            train_supervised(config, folder, args.steps, seed)
        return folder
    folder = args.methods / "runs" / f"vit-{slug(name)}-{seed}-{args.steps}"
    if not (folder / "config.json").exists():
        words = ["--students", "vit", "--methods", name, "--seeds", str(seed), "--out", str(args.methods)]
        run_methods([*words, "--steps", str(args.steps)])
    return folder


@torch.inference_mode()
def attention_of_cls(model: MIMModel, pixels: torch.Tensor) -> dict[str, float]:
    """Of the last block, means over images and heads: the share of its attention that the class token keeps for itself,
    and the entropy of the rest over the patches, as a share of the largest possible."""
    weights = model(pixels, output_attentions=True).attentions[-1][:, :, :1].float()
    mass, entropy, patches = row_statistics(weights, model.encoder.num_prefix_tokens)
    return {"own": weights[..., 0].mean().item(), "entropy": (entropy.mean() / np.log(patches.shape[-1])).item()}


# ---- probing -------------------------------------------------------------------------------------------------------
def probe_encoder(name: str, seed: int, args) -> dict:
    """What `hf-mim probe` finds of the poolers; kept in a file."""
    tested = args.test_images or "all"
    file = args.out / f"{name}-seed{seed}-{args.images}-{args.steps}-{args.epochs}-{tested}.json"
    if file.exists():
        return json.loads(file.read_text())
    started, quiet = time.process_time(), Console(quiet=True)
    options = [f"probe.poolers=[{', '.join(POOLERS)}]", f"probe.seeds=[{seed}]", f"probe.epochs={args.epochs}"]
    options += [f"data.max_train_images={args.images}", f"probe.cache={args.out / 'tokens'}"]
    options += [f"data.max_eval_images={args.test_images}"] if args.test_images else []
    run = set_up(str(make_encoder(name, seed, args)), options, quiet)
    sides = encode(run, {"trained": run.model})["trained"]
    found = {"poolers": probe_poolers(run, "trained", run.model, sides)[0]}
    pixels = next(frozen.pixel_loader(load_splits(DataArguments(), run.model.config).test, run.model.config, SHOWN))
    found["attention"] = attention_of_cls(run.model, pixels)
    found["seconds"] = time.process_time() - started
    write_json(file, found)
    return found


# ---- report --------------------------------------------------------------------------------------------------------
def report(results: dict[str, dict[int, dict]], args) -> str:
    """Markdown: mean and standard deviation over the seeds that are there."""
    rows = []
    for name, title in ENCODERS.items():
        found = list(results.get(name, {}).values())
        if found:
            accuracies = [over_seeds([one["poolers"][pooler]["accuracy"] for one in found]) for pooler in POOLERS]
            gains = [over_seeds(gain_of(found, pooler)) for pooler in (OURS, "efficient")]
            looks = [over_seeds([one["attention"][key] for one in found], digits=2) for key in ("own", "entropy")]
            rows.append([title, *accuracies, *gains, *looks, len(found)])
    header = ["encoder", *POOLERS, "abmilp less cls", "efficient less cls"]
    header += ["attention of cls to itself", "entropy over patches", "seeds"]
    command = f"python benchmarks/poolers.py --seeds {' '.join(map(str, args.seeds))} --images {args.images}"
    command += f" --steps {args.steps} --epochs {args.epochs}"
    words = f"`{command}`\n\nAccuracy on the {args.test_images or 3000:,} test images, percent, of poolers trained on "
    words += f"{args.images:,} of the 20,000 training images, on encoders of {args.steps:,} steps of 64 images; mean "
    words += "and standard deviation over encoders and probes of different seeds. Attention is that of the last block, "
    words += f"means over heads and {SHOWN} test images; entropy as a share of the largest possible."
    return f"{words}\n\n{markdown_table(header, rows)}"


def gain_of(found: list[dict], pooler: str) -> list[float]:
    return [one["poolers"][pooler]["accuracy"] - one["poolers"][USUAL]["accuracy"] for one in found]


def arguments(argv: list[str] | None):
    numbers = {
        "images": (2000, "training images with a label"),
        "test_images": (None, "test on so many, always the same; by default all"),
        "steps": (2000, "of every encoder but the untrained one"),
        "epochs": (20, "of the poolers, at most"),
        "minutes": 50.0,
    }
    options = parser(__doc__, out=None, **numbers)
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    options.add_argument("--out", type=Path, default=Path("outputs/poolers"))
    options.add_argument(
        "--methods", type=Path, default=Path("outputs/methods"), help="where methods.py keeps its runs"
    )
    options.add_argument("--page", help="put the table into this Markdown page")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> str:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + 60 * args.minutes, {}
    for seed in args.seeds:  # a whole table of one seed first
        for name in args.encoders:
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
