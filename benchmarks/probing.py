"""Probing on features that are kept, against running the encoder again in every epoch.

    python benchmarks/probing.py --out docs/benchmarks.md

The peer is the way of the release of Beyond [cls]: one pooler a run, and the frozen encoder in every epoch. Ours
encodes every image once a view and then trains all poolers together on what is on disk. Both train the same heads with
the same code, one learning rate each; where the processor has bfloat16, the encoder runs in it, and the pooler with
self-attention is trained in it. Pixels are ready in memory for both, so that decoding, which the peer repeats in every
epoch, is not counted. One thread, the processor's time.

In every round the arms take turns: the encoder and one pooler's step on 64 images for each pooler (the peer), the
encoder and the writing of 64 images' features, and one epoch of all poolers on the features of all images on disk. The
figures of whole runs are extrapolated from the medians, and say so.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import alternate, machine, markdown_table, parser, quartiles, row, spread, verdicts
from summary import publish

from hf_mim import MIMConfig, MIMModel
from hf_mim.training.common.device import has_bf16
from hf_mim.training.evaluation.feature_store import FeatureStore
from hf_mim.training.evaluation.features import CachedSource, Features, PoolerChoice
from hf_mim.training.evaluation.heads import Group, Schedule, make_optimizer, predict, train_heads, train_step


EPOCHS = 90
CHUNK = 64  # images of the parts that are extrapolated
CLASSES = 10
SELF_ATTENTION = {"pooler": "abmilp", "depth": 2, "self_attention": "both", "content": "all"}
# What is trained: the poolers that `hf-mim probe` tries by default, and with the release's own default, the AbMILP with
# self-attention over all tokens, which costs most, in the place of the class token.
SETS = {
    "cls, mean, abmilp, efficient": {"cls": {}, "mean": {}, "abmilp": {}, "efficient": {}},
    "mean, abmilp, efficient, abmilp with self-attention": {
        "mean": {},
        "abmilp": {},
        "efficient": {},
        "self_attention": SELF_ATTENTION,
    },
}
WANTED = {1: 30, 10: 15}  # views: how many times faster
PAPER_IMAGES = 1_000_000


def test_config() -> MIMConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    return MIMConfig(image_size=32, encoder_config=sizes)


# name: what it is, its config, images, rounds, the config that is planned for on paper
SIZES = {
    "tiny": ("ViT-Ti/16 at 224 px", lambda: MIMConfig(encoder_config={"size": "tiny"}), 2000, 5),
    "test": ("32 px, patch 8, 32x2: for the tests", test_config, 96, 2),
}


def frozen(config: MIMConfig) -> MIMModel:
    torch.manual_seed(0)
    return MIMModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def choices_of(poolers: dict[str, dict]) -> list[PoolerChoice]:
    found = []
    for name, options in poolers.items():
        options = dict(options)
        found.append(PoolerChoice(name, options.pop("pooler", name), options))
    return found


# ---- arms ----------------------------------------------------------------------------------------------------------
class Fresh:
    """A source that runs the encoder on the same pixels whenever it is asked, as the peer does."""

    def __init__(self, features: Features, pixels: torch.Tensor):
        self.features, self.pixels = features, pixels

    def fetch(self, view: int, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.features(self.pixels[: len(positions)])


def peer_arm(group: Group, features: Features, pixels: torch.Tensor):
    """One pooler's share of an epoch: the encoder on all of `pixels`, training on nine tenths of them."""
    schedule = Schedule(EPOCHS, EPOCHS, len(pixels), "adamw", 0.0)
    heads = {group: [group.make(CLASSES, 1e-3, seed=0)]}
    optimizer = make_optimizer(heads[group], schedule, len(pixels))
    source, labels = Fresh(features, pixels), torch.arange(len(pixels)) % CLASSES
    held = torch.arange(max(1, len(pixels) // 10))

    def share_of_epoch() -> None:
        train = torch.arange(len(held), len(pixels))
        train_step(source.fetch(0, train), labels[train], heads, optimizer)
        list(predict(source, held, heads, len(held)))

    return share_of_epoch


def encoding_arm(features: Features, pixels: torch.Tensor, folder: Path):
    """The encoder on `pixels`, and its tokens written to disk."""

    def encode() -> None:
        (tokens,) = features(pixels).values()
        file = FeatureStore(
            folder, "written", {"at": time.time_ns()}, len(tokens), tuple(tokens.shape[1:]), torch.bfloat16
        )
        file.append(tokens)
        file.commit()
        file.close()
        file.path.unlink()
        file.record.unlink()

    return encode


def training_arm(groups: list[Group], source: CachedSource):
    """One epoch of all poolers on features on disk, another view every time."""
    labels, at = torch.arange(len(source)) % CLASSES, [0]

    class Turned:
        def fetch(self, view: int, positions: torch.Tensor):
            return source.fetch(at[0], positions)

    def epoch() -> None:
        schedule = Schedule(1, 1, 256, "adamw", 0.0)
        train_heads(Turned(), labels, CLASSES, dict.fromkeys(groups, [1e-3]), schedule, 0.1, seed=0)
        at[0] += 1

    return epoch


def fake_cache(features: Features, pixels: torch.Tensor, count: int, views: int, folder: Path) -> CachedSource:
    """Files as of `count` images in so many views, for reading: the tokens of a few images, again and again."""
    ((name, tokens),) = features(pixels).items()
    shape, files = tuple(tokens.shape[1:]), []
    for view in range(views):
        file = FeatureStore(folder, f"view{view}", {"view": view}, count, shape, torch.bfloat16)
        while not file.complete:
            file.append(tokens[: count - file.done])
        file.commit()
        file.close()
        files.append({name: file})
    return CachedSource(files, "cpu")


# ---- measuring -----------------------------------------------------------------------------------------------------
def measure(size: str, rounds: int | None = None) -> dict:
    """{set of poolers: {"encode", "peer" (seconds an image), "epoch" (seconds, per number of views), "ratios"}}."""
    _, make_config, count, default_rounds = SIZES[size]
    rounds, model, found = rounds or default_rounds, frozen(make_config()), {}
    height = width = model.config.image_size
    chunk = min(CHUNK, count)
    pixels = torch.randn(chunk, model.config.num_channels, height, width)
    last = len(model.encoder.stage_names) - 1
    features = Features(model, [last], bf16=has_bf16())
    for words, poolers in SETS.items():
        groups = [Group(choice, last, model, False, bf16=has_bf16()) for choice in choices_of(poolers)]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            arms = {f"peer {group.choice.name}": peer_arm(group, features, pixels) for group in groups}
            arms["encode"] = encoding_arm(features, pixels, folder)
            for views in WANTED:
                source = fake_cache(features, pixels[:8], count, views, folder / str(views))
                arms[f"epoch {views}"] = training_arm(groups, source)
            times = alternate(arms, rounds, warmup=1)
        found[words] = summary(times, chunk, count, rounds)
    return found


def summary(times: dict[str, list[float]], chunk: int, count: int, rounds: int) -> dict:
    """Seconds of whole runs, round by round, and their quartiles."""
    runs = [np.array(seconds) for name, seconds in times.items() if name.startswith("peer ")]
    peer = EPOCHS * count / chunk * sum(runs)
    encode = count / chunk * np.array(times["encode"])
    found = {"rounds": rounds, "peer": quartiles(peer), "encode": quartiles(encode), "views": {}}
    for views in WANTED:
        train = EPOCHS * np.array(times[f"epoch {views}"])
        ours = views * encode + train
        found["views"][views] = {
            "train": quartiles(train),
            "ours": quartiles(ours),
            "ratio": quartiles(peer / ours),
        }
    return found


# ---- on paper ------------------------------------------------------------------------------------------------------
def paper(config: MIMConfig, images: int = PAPER_IMAGES) -> dict:
    """Space and time of a cache of so many images; the time from a few images here."""
    model = frozen(config)
    features = Features(model, [len(model.encoder.stage_names) - 1], bf16=has_bf16())
    pixels = torch.randn(4, config.num_channels, config.image_size, config.image_size)
    ((_, tokens),) = features(pixels).items()
    started = time.process_time()
    features(pixels)
    seconds = (time.process_time() - started) / len(pixels)
    return {
        "images": images,
        "tokens": images * tokens[0].numel() * 2,
        "vectors": images * model.encoder.hidden_size * 4,
        "hours": images * seconds / 3600,
        "row": tokens[0].numel() * 2,
    }


def paper_words(found: dict) -> str:
    tokens, vectors = found["tokens"] / 1e9, found["vectors"] / 1e9
    return (
        f"On paper, {found['images']:,} images of a ViT-B/16 at 224 px: {found['row'] / 1e3:.0f} kB of tokens an "
        f"image, {tokens:,.0f} GB a view, and {vectors:.1f} GB of vectors for each pooler without parameters. Encoding "
        f"takes one thread of this processor {found['hours']:,.0f} hours; a GPU that encodes 2,000 images a second "
        f"{found['images'] / 2000 / 60:.0f} minutes a view. An epoch reads all of it: {tokens / 2:,.0f} s from a disk "
        "of 2 GB a second. If the disk has less than that free, `hf-mim probe` says how much is needed, and keeps and "
        "probes the pooled vectors of `cls` and `mean` alone; where learned poolers were asked for by name, it stops "
        "before it starts."
    )


# ---- report --------------------------------------------------------------------------------------------------------
def report(size: str, results: dict, on_paper: dict) -> str:
    what, _, count, _ = SIZES[size]
    parts = []
    for words, found in results.items():
        rows = [["encoder in every epoch, one pooler a run", spread(found["peer"], 0), ""]]
        for views, one in found["views"].items():
            plural = "view" if views == 1 else "views"
            rows.append([f"hf_mim, {views} {plural} kept", spread(one["ours"], 0), spread(one["ratio"], 1)])
        parts += [
            f"### {what}, {count:,} images, {EPOCHS} epochs; {words}: {found['rounds']} rounds\n",
            markdown_table(["", "seconds, extrapolated", "times faster"], rows),
            f"\nOf ours, encoding one view takes {spread(found['encode'], 0)} s and {EPOCHS} epochs on one "
            f"{spread(found['views'][1]['train'], 0)} s.\n",
        ]
    return "\n".join([*parts, verdicts(rows_of(results)), "", paper_words(on_paper)])


def rows_of(results: dict) -> list[dict]:
    return [
        row(
            f"probing, {words}, {views} view{'s' * (views > 1)}: time of one pooler a run over ours",
            one["ours"][1],
            found["peer"][1],
            one["ratio"],
            WANTED[views],
            unit="s",
        )
        for words, found in results.items()
        for views, one in found["views"].items()
    ]


def arguments(argv: list[str] | None):
    options = parser(__doc__, json=True, rounds=None)
    options.add_argument("--reduced", action="store_true", help="a small size and few rounds, to see that it runs")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    torch.set_num_threads(1)
    size = "test" if args.reduced else "tiny"
    results = measure(size, args.rounds)
    on_paper = paper(test_config() if args.reduced else MIMConfig(encoder_config={"size": "base"}))
    publish(args.out, "probing", f"{machine()}\n\n{report(size, results, on_paper)}", rows_of(results))
    if args.json:
        Path(args.json).write_text(json.dumps({"sizes": results, "paper": on_paper}, indent=1))
    return results


if __name__ == "__main__":
    main()
