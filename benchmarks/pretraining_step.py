"""One training step of a masked autoencoder: ours against transformers' `ViTMAEForPreTraining` and lightly's MAE.

    python benchmarks/pretraining_step.py --out docs/benchmarks.md

A step is forward, loss, backward and optimizer (AdamW, fused). All arms have the same architecture, weights, images
and masks, and must give the same loss before anything is timed. They take turns in one process on one thread; what is
compared are the ratios of the times within a round. bf16 is autocast, as the Trainer does it.

Memory is measured in a fresh process for each arm (a fork that has imported everything and computed nothing), in two
ways. "step" is what a step holds in tensors at most, activations and gradients, beyond weights and optimizer state:
torch counts it, it is the same in every run, and on a GPU it is what decides which batch fits. "resident" is the
highest resident memory of the process over three steps, less that with model and optimizer built: it includes the
optimizer's state, which is the same for all, and what the C library's heap loses to holes, two percent more or less
from run to run.
"""

import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys

import torch
import yaml
from measure import (
    alternate,
    machine,
    markdown_table,
    paired_ratios,
    parser,
    quartiles,
    row,
    spread,
    tensor_memory,
    verdicts,
)
from peers import ARMS, Arm, equal_weights, make_batch
from summary import publish

from hf_mim import MIMConfig
from hf_mim.training.recipe import RECIPES


DTYPES = ("float32", "bf16")
# Largest relative difference of two losses that are the same but for rounding.
TOLERANCE = {"float32": 1e-5, "bf16": 1e-2}
PEER, OURS, CROSS = "transformers", "hf_mim", "hf_mim, cross_attention"


def quick_config() -> MIMConfig:
    return MIMConfig(**yaml.safe_load((RECIPES / "mae_small.yaml").read_text())["model"])


def tiny_config() -> MIMConfig:
    return MIMConfig(
        image_size=224,
        encoder_config={"size": "tiny"},
        masking_config={"ratio": 0.75},
        decoder_config={"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16},
        target_config={"normalize": True},
    )


def test_config() -> MIMConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MIMConfig(
        image_size=32,
        encoder_config={**sizes, "patch_size": 8},
        masking_config={"ratio": 0.75},
        decoder_config=sizes,
        target_config={"normalize": True},
    )


# name: what it is, how its config is made, images in a batch, rounds
SIZES = {
    "quick": ("recipe mae_small's (28 px, patch 4, 128x4, decoder 64x1)", quick_config, 64, 40),
    "tiny": ("ViT-Ti/16 at 224 px, decoder 512x8", tiny_config, 4, 9),
    "test": ("32 px, patch 8, 32x2: for the tests", test_config, 2, 2),
}


# ---- one step ------------------------------------------------------------------------------------------------------
def make_step(arm: Arm, dtype: str):
    """A function of nothing that does one training step and returns its loss (a float)."""
    trained = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = arm.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def arm_names() -> list[str]:
    """The arms that can be measured here."""
    if importlib.util.find_spec("lightly") is None:
        print('lightly is not installed and left out: pip install -e ".[bench]" adds it.', file=sys.stderr)
        return [name for name in ARMS if name != "lightly"]
    return list(ARMS)


def first_losses(arms: dict[str, Arm], dtype: str) -> dict[str, float]:
    """The loss of every arm before training.

    Raises:
        RuntimeError: the arms of equal architecture disagree, so that there is nothing to compare.
    """
    losses = {}
    for name, arm in arms.items():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            losses[name] = arm.loss().item()
    for name in set(losses) - {CROSS}:
        if abs(losses[name] - losses[PEER]) > TOLERANCE[dtype] * losses[PEER]:
            raise RuntimeError(f"{name} has another loss than {PEER} for the same weights: {losses}")
    return losses


def measure_time(size: str, dtype: str, names: list[str], rounds: int | None = None) -> dict:
    """-> first losses, seconds of each arm, and the peers' times over ours, as quartiles."""
    _, make_config, count, default_rounds = SIZES[size]
    torch.manual_seed(0)
    config = make_config()
    batch = make_batch(config, count)
    arms = {name: ARMS[name](config, batch) for name in names}
    equal_weights(arms)
    losses = first_losses(arms, dtype)
    times = alternate({name: make_step(arm, dtype) for name, arm in arms.items()}, rounds or default_rounds)
    pairs = [(peer, ours) for peer in names if peer not in (OURS, CROSS) for ours in (OURS, CROSS)]
    return {
        "rounds": rounds or default_rounds,
        "losses": losses,
        "seconds": {name: quartiles(seconds) for name, seconds in times.items()},
        "ratios": {f"{peer} / {ours}": paired_ratios(times, peer, ours) for peer, ours in pairs},
    }


# ---- memory --------------------------------------------------------------------------------------------------------
def resident() -> float:
    """MiB of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def step_memory(size: str, dtype: str, name: str) -> tuple[float, float]:
    """-> MiB of tensors that a step holds at most, and resident MiB of three steps. For a fresh process."""
    _, make_config, count, _ = SIZES[size]
    config = make_config()
    step = make_step(ARMS[name](config, make_batch(config, count)), dtype)
    built = resident()
    for _ in range(3):
        step()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - built
    return tensor_memory(step), highest


def measure_memory(size: str, dtype: str, names: list[str], repeats: int = 3) -> dict[str, tuple[float, float]]:
    """`step_memory` of each arm, medians over fresh processes. They are forks, which have imported everything but
    computed nothing as long as this process has not: to be called before `measure_time`."""
    memory = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                memory[name].append(pool.apply(step_memory, (size, dtype, name)))
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in memory.items()}


# ---- report --------------------------------------------------------------------------------------------------------
def report(results: dict) -> str:
    """Markdown of what was measured; `results` is {(size, dtype): {"losses", "seconds", "ratios", "memory"}}."""
    parts = []
    for (size, dtype), result in results.items():
        what, _, count, _ = SIZES[size]
        rows = []
        for name, seconds in result["seconds"].items():
            ratios = [result["ratios"].get(f"{peer} / {name}") for peer in (PEER, "lightly")]
            rows.append(
                [
                    name,
                    spread([1000 * value for value in seconds], 1),
                    *(spread(ratio) if ratio else "" for ratio in ratios),
                    *(
                        f"{ours:.0f} ({ours / peer:.2f})"
                        for ours, peer in zip(*(result["memory"][n] for n in (name, PEER)))
                    ),
                ]
            )
        header = ["", "ms a step", "transformers' time over it", "lightly's time over it"]
        header += ["step, MiB (over transformers')", "resident, MiB (over transformers')"]
        parts.append(f"### {what}, batch {count}, {dtype}: {result['rounds']} rounds\n")
        parts.append(markdown_table(header, rows) + "\n")
    return "\n".join([*parts, verdicts(rows_of(results))])


def rows_of(results: dict) -> list[dict]:
    """What was compared, with the goals of issue 3."""
    wanted = {("quick", "float32"): 1.05, ("tiny", "float32"): 1.05, ("quick", "bf16"): 1.5, ("tiny", "bf16"): 1.2}
    rows = []
    for (size, dtype), result in results.items():
        label, middle = f"training step, {size}, {dtype}", {name: s[1] for name, s in result["seconds"].items()}
        for ours in (OURS, CROSS):
            goal = wanted.get((size, dtype)) if ours == OURS else 1.5 if size == "tiny" else None
            for peer in (name for name in (PEER, "lightly") if name in middle):
                what = f"{label}: time of {peer} over ours{ours.removeprefix(OURS)}"
                milliseconds = (1000 * middle[name] for name in (ours, peer))
                ratio = result["ratios"][f"{peer} / {ours}"]
                rows.append(row(what, *milliseconds, ratio, goal if peer == PEER else None, unit="ms"))
        for i, kind in enumerate(("memory of a step", "resident memory")):
            ours, peer = (result["memory"][name][i] for name in (OURS, PEER))
            rows.append(row(f"{label}: our {kind} over {PEER}'", ours, peer, ours / peer, 0.95, more=False, unit="MiB"))
    return rows


def arguments(argv: list[str] | None):
    options = parser(__doc__, json=True, rounds=None)
    options.add_argument("--quick", action="store_true", help="a small size and few rounds, to see that it runs")
    options.add_argument("--size", choices=list(SIZES), help="only this one; else quick and tiny")
    options.add_argument("--dtype", choices=list(DTYPES), help="only this one")
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    torch.set_num_threads(1)
    sizes = [args.size] if args.size else ["test"] if args.quick else ["quick", "tiny"]
    dtypes, names, results = [args.dtype] if args.dtype else DTYPES, arm_names(), {}
    memory = {(s, d): measure_memory(s, d, names, 1 if args.quick else 2) for s in sizes for d in dtypes}
    for size in sizes:  # each is on paper before the next begins
        cases = [(size, dtype) for dtype in dtypes]
        found = {case: {**measure_time(*case, names, args.rounds), "memory": memory[case]} for case in cases}
        publish(args.out, f"pretraining_step {size}", f"{machine()}\n\n{report(found)}", rows_of(found))
        results |= found
    if args.json:
        with open(args.json, "w") as file:
            json.dump({" ".join(key): result for key, result in results.items()}, file, indent=1)
    return results


if __name__ == "__main__":
    main()
