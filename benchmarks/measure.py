"""What the comparisons share: fair timing, quartiles, the machine in words, and the page that results go to."""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
import transformers

from hf_mim.training.trainer import has_bf16


def alternate(arms: dict[str, Callable], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each arm. The arms take turns, so that whatever else the machine does
    falls on all of them, and each round begins with another one. Counted is the processor's time, which on one thread
    is that of the clock on a machine that does nothing else."""
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    seconds = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


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
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return (
        f"CPU: {names[0] if names else platform.processor() or platform.machine()}, "
        f"{'with' if has_bf16() else 'without'} bfloat16 instructions; {torch.get_num_threads()} thread; "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}."
    )


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def verdicts(goals: list[tuple[str, float, float, bool]]) -> str:
    """Goals as (what, measured, wanted, more is better) -> a table that says which were reached."""
    rows = []
    for what, measured, wanted, more in goals:
        reached = measured >= wanted if more else measured <= wanted
        limit = f"{'at least' if more else 'at most'} {wanted:g}"
        rows.append([what, limit, f"{measured:.2f}", "reached" if reached else "**not reached**"])
    return markdown_table(["goal", "wanted", "measured (median)", ""], rows)


def write_section(path: str | Path, name: str, text: str) -> None:
    """Puts `text` between the markers `<!-- name -->` and `<!-- end of name -->` of a page, which are added at its
    end where they are missing; the rest of the page stays as it is."""
    path, begin, end = Path(path), f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text() if path.exists() else ""
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = page.split(begin, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
