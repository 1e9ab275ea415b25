"""What the comparisons share: fair timing, quartiles, the machine in words, and the page that results go to."""

import argparse
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers
from torch.profiler import ProfilerActivity, profile

from hf_mim.training.common.device import has_bf16


def parser(description: str, out: str | None = "put the tables into this Markdown page", json: bool = False, **numbers):
    """The options that comparisons share.

    Args:
        description: the script's docstring.
        out: help of `--out`; None is a script that writes no page, or not by this option.
        json: whether there is `--json`.
        numbers: name=default or name=(default, help); whole numbers, unless the default is a float.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, entry in numbers.items():
        default, words = entry if isinstance(entry, tuple) else (entry, None)
        kind = float if isinstance(default, float) else int
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=words)
    if json:
        made.add_argument("--json", help="write the numbers to this file")
    if out is not None:
        made.add_argument("--out", help=out)
    return made


def add_cell_options(options: argparse.ArgumentParser, out: str, page: str) -> None:
    """What comparisons share whose cells, one for each row and seed, are kept in files."""
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--out", type=Path, default=Path(out), help="where finished cells are kept")
    options.add_argument("--table", action="store_true", help="run nothing, write the page")
    options.add_argument("--page", type=Path, default=Path(page))


def over_seeds(values: Sequence[float], digits: int = 1, sign: bool = False) -> str:
    """Mean and standard deviation, "1.2 ± 0.3"; of one value itself, of none "".

    Args:
        sign: whether "+" stands before what is not negative.
    """
    if len(values) == 0:
        return ""
    mean = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def write_json(file: Path, content: dict) -> None:
    """So that a file that is there is whole."""
    write_whole(file, json.dumps(content, indent=2) + "\n")


def alternate(
    arms: dict[str, Callable], rounds: int, warmup: int = 2, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each arm. The arms take turns, so that whatever else the machine does
    falls on all of them, and each round begins with another one. Counted is, by default, the processor's time, which on
    one thread is that of the clock on a machine that does nothing else."""
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    seconds = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            arms[name]()
            seconds[name].append(clock() - start)
    return seconds


def tensor_memory(step: Callable) -> float:
    """MiB of tensors that a function holds at most beyond those it found, on the CPU, as torch counts them: the same in
    every run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


def quartiles(values) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    return tuple(float(value) for value in np.percentile(values, [25, 50, 75]))


def paired_ratios(times: dict[str, list[float]], peer: str, ours: str) -> tuple[float, float, float]:
    """Quartiles of the peer's time over ours, taken round by round: above 1, ours is faster."""
    return quartiles(np.divide(times[peer], times[ours]))


def spread(values: tuple[float, float, float], digits: int = 2) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def machine() -> str:
    """CPU, its bfloat16 instructions, threads and versions."""
    info = Path("/proc/cpuinfo")
    threads = torch.get_num_threads()
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return (
        f"CPU: {names[0] if names else platform.processor() or platform.machine()}, "
        f"{'with' if has_bf16() else 'without'} bfloat16 instructions; {threads} thread{'s' * (threads > 1)}; "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}."
    )


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def row(what: str, ours, peer, ratio, goal: float | None = None, more: bool = True, unit: str = "") -> dict:
    """One comparison.

    Args:
        what: is compared, and which way the ratio goes.
        ours, peer: medians; None where there is none.
        ratio: first quartile, median and third quartile; one number, where there are no quartiles; or None.
        goal: of the ratio, or of `ours` where there is none: at least (`more`) or at most.
        unit: of `ours` and `peer`.
    """
    return {"what": what, "ours": ours, "peer": peer, "ratio": ratio, "goal": goal, "more": more, "unit": unit}


def judge(entry: dict) -> tuple[float, str, str]:
    """A row -> what was measured, what was wanted in words, and whether it was reached; empty words without a goal."""
    ratio, goal, more = entry["ratio"], entry["goal"], entry["more"]
    measured = entry["ours"] if ratio is None else ratio[1] if isinstance(ratio, list | tuple) else ratio
    if goal is None:
        return measured, "", ""
    reached = measured >= goal if more else measured <= goal
    return measured, f"at {'least' if more else 'most'} {goal:g}", "reached" if reached else "**not reached**"


def verdicts(rows: list[dict]) -> str:
    """A table that says of every row with a goal whether it was reached."""
    judged = [(entry["what"], judge(entry)) for entry in rows if entry["goal"] is not None]
    lines = [[what, wanted, f"{measured:.2f}", verdict] for what, (measured, wanted, verdict) in judged]
    return markdown_table(["goal", "wanted", "measured (median)", ""], lines)


def write_section(path: str | Path, name: str, text: str) -> None:
    """Puts `text` between the markers `<!-- name -->` and `<!-- end of name -->` of a page, which are added at its
    end where they are missing; the rest of the page stays as it is."""
    path, begin, end = Path(path), f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text() if path.exists() else ""
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = page.split(begin, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole whenever it is read."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
