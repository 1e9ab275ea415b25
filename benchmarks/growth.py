"""How time and memory of a training step grow with images, tokens, model size and processes.

    python benchmarks/growth.py --out docs/benchmarks.md

A step is that of `pretraining_step.py`: forward, loss, backward and AdamW of a masked autoencoder, in bf16 where the
processor has it, on one thread. Around the recipe `mae_small` (28 px, patches of 4, 128 channels) one quantity grows at
a time. Counted is the processor's time, median over rounds in which the points take turns, and the MiB of tensors that
a step holds at most, as torch counts them. Processes are two at most, with gloo and DistributedDataParallel, equal
images each: their times and memory are added up. "Over linear" is the growth since the first point over that of the
quantity: below 1, twice as much costs less than twice.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from measure import alternate, machine, markdown_table, parser, quartiles, row, tensor_memory
from peers import Arm, make_batch, make_ours
from pretraining_step import make_step
from summary import publish

from hf_mim import MIMConfig, MIMForPreTraining
from hf_mim.training.common.device import has_bf16


matplotlib.use("Agg")
from matplotlib import pyplot


MEMORY_GOALS = {"tokens": 1.1}  # of the largest amount, over linear
QUANTITIES = {
    "images": "images in a batch",
    "tokens": "tokens of an image",
    "size": "parameters, thousands",
    "processes": "processes",
}
# What a point is made of: pixels a side, channels of the encoder, images in a batch, processes.
BASE = {"pixels": 28, "channels": 128, "images": 32, "processes": 1}
POINTS = {
    "images": [{"images": count} for count in (8, 16, 32, 64, 128)],
    "tokens": [{"pixels": side, "images": 8} for side in (28, 40, 56, 80, 112, 224)],
    "size": [{"channels": channels} for channels in (64, 96, 128, 192, 256)],
    "processes": [{"processes": count} for count in (1, 2)],
}
QUICK = {name: [{**point, "images": 2} for point in points[:2]] for name, points in POINTS.items()}
QUICK["images"] = [{"images": 2}, {"images": 4}]


def config_of(point: dict) -> MIMConfig:
    sizes = {"hidden_size": point["channels"], "num_hidden_layers": 4, "num_attention_heads": 4}
    return MIMConfig(
        image_size=point["pixels"],
        num_channels=1,
        encoder_config={**sizes, "patch_size": 4},
        masking_config={"ratio": 0.75},
        decoder_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        target_config={"normalize": False},
    )


def amount(quantity: str, point: dict) -> float:
    """How much of a quantity a point has."""
    if quantity == "tokens":
        return (point["pixels"] // 4) ** 2
    if quantity == "size":
        return MIMForPreTraining(config_of(point)).num_parameters() / 1000
    return point[quantity]


def step_of(point: dict, wrap=lambda model: model):
    """One training step of a point, as a function of nothing."""
    config = config_of(point)
    batch = make_batch(config, point["images"])
    model = wrap(make_ours(config, batch).model)
    arm = Arm(model, lambda: model(batch.pixel_values, bool_masked_pos=batch.mask).loss)
    return make_step(arm, "bf16" if has_bf16() else "float32")


# ---- several processes ---------------------------------------------------------------------------------------------
def work(rank: int, world: int, file: str, point: dict, rounds: int, answers) -> None:
    """One process of a point: puts its seconds a step and MiB into `answers`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    step = step_of(point, torch.nn.parallel.DistributedDataParallel)
    for _ in range(2):
        step()
    started = time.process_time()
    for _ in range(rounds):
        step()
    seconds = (time.process_time() - started) / rounds
    answers.put((seconds, tensor_memory(step)))
    torch.distributed.destroy_process_group()


def together(point: dict, rounds: int) -> tuple[float, float]:
    """-> seconds of the processor and MiB of a step, all processes together. They are forks of this process, which must
    have computed nothing."""
    forks, world = multiprocessing.get_context("fork"), point["processes"]
    answers = forks.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        inputs = (world, f"{folder}/store", point, rounds, answers)
        processes = [forks.Process(target=work, args=(rank, *inputs)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"processes ended with exit codes {[process.exitcode for process in processes]}")
    found = [answers.get() for _ in processes]
    return tuple(map(sum, zip(*found)))


# ---- measuring -----------------------------------------------------------------------------------------------------
def measure(points: dict[str, list[dict]], rounds: int) -> dict[str, list[dict]]:
    """{quantity: [{"amount", "seconds", "memory", "time_over_linear", "memory_over_linear"}]}"""
    points = {name: [{**BASE, **point} for point in several] for name, several in points.items()}
    found = {name: [] for name in points}
    found["processes"] = [together(point, rounds) for point in points["processes"]]
    for name in ("images", "tokens", "size"):
        steps = {i: step_of(point) for i, point in enumerate(points[name])}
        times = alternate(steps, rounds)
        found[name] = [(quartiles(times[i])[1], tensor_memory(step)) for i, step in steps.items()]
    return {name: compared([amount(name, point) for point in points[name]], found[name]) for name in QUANTITIES}


def compared(amounts: list[float], found: list[tuple[float, float]]) -> list[dict]:
    entries = []
    for some, (seconds, memory) in zip(amounts, found):
        linear = some / amounts[0]
        entries.append(
            {
                "amount": some,
                "seconds": seconds,
                "memory": memory,
                "time_over_linear": seconds / found[0][0] / linear,
                "memory_over_linear": memory / found[0][1] / linear,
            }
        )
    return entries


# ---- report --------------------------------------------------------------------------------------------------------
def draw(results: dict[str, list[dict]], file: Path) -> None:
    figure, grid = pyplot.subplots(2, len(results), figsize=(11, 5), layout="constrained", sharex="col")
    for column, (name, entries) in zip(grid.T, results.items()):
        amounts = [entry["amount"] for entry in entries]
        for axes, kind, scale in zip(column, ("seconds", "memory"), (1000, 1)):
            values = [scale * entry[kind] for entry in entries]
            linear = [values[0] * some / amounts[0] for some in amounts]
            axes.plot(amounts, linear, "--", color="0.6", label="linear from the first point")
            axes.plot(amounts, values, "o-", color="tab:blue", label="measured")
            axes.set(xscale="log", yscale="log", xticks=amounts, xticklabels=[f"{some:,.0f}" for some in amounts])
            axes.minorticks_off()
            labelled = sorted({values[0], values[len(values) // 2], values[-1]})
            axes.set_yticks(labelled, [f"{value:,.0f}" for value in labelled])
        column[1].set_xlabel(QUANTITIES[name])
    grid[0, 0].set_ylabel("ms a step")
    grid[1, 0].set_ylabel("MiB of tensors")
    grid[0, 0].legend(frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def report(results: dict[str, list[dict]], rounds: int) -> str:
    lines = [
        [
            QUANTITIES[name] if i == 0 else "",
            f"{entry['amount']:,.0f}",
            f"{1000 * entry['seconds']:.1f}",
            f"{entry['memory']:.1f}",
            f"{entry['time_over_linear']:.2f}",
            f"{entry['memory_over_linear']:.2f}",
        ]
        for name, entries in results.items()
        for i, entry in enumerate(entries)
    ]
    header = ["", "", "ms a step", "MiB of tensors", "time over linear", "memory over linear"]
    return f"{machine()} {rounds} rounds.\n\n{markdown_table(header, lines)}"


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    rows = []
    for name, entries in results.items():
        first, last = entries[0]["amount"], entries[-1]["amount"]
        what = f"growth, {QUANTITIES[name]} {first:,.0f} to {last:,.0f}"
        rows.append(
            row(
                f"{what}: time over linear",
                1000 * entries[-1]["seconds"],
                None,
                entries[-1]["time_over_linear"],
                unit="ms",
            )
        )
        rows.append(
            row(
                f"{what}: memory over linear",
                entries[-1]["memory"],
                None,
                entries[-1]["memory_over_linear"],
                goal=MEMORY_GOALS.get(name),
                more=False,
                unit="MiB",
            )
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    options = parser(__doc__, out="put the table into this Markdown page, and the picture beside it", rounds=15)
    options.add_argument("--quick", action="store_true", help="two points each and few rounds, to see that it runs")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    rounds = 1 if args.quick else args.rounds
    results = measure(QUICK if args.quick else POINTS, rounds)
    text = report(results, rounds)
    if args.out:
        draw(results, Path(args.out).parent / "growth.png")
        text += "\n\n![time and memory of a step as one quantity grows](growth.png)"
    publish(args.out, "growth", text, rows_of(results))
    return results


if __name__ == "__main__":
    main()
