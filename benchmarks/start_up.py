"""How long it takes until something can be done: imports, and the answers of the command line.

    python benchmarks/start_up.py --out docs/benchmarks.md

Every call is a process of its own, with warm file caches; they take turns. Counted is the processor's time of the
process and of those that it starts, an interpreter that imports nothing subtracted: it is the same for all, and on a
busy machine the clock says little. `import transformers` alone is lazy and imports no torch, and neither does `import
hf_mim`: both load what they need with the first name that needs it. What users wait for is the third comparison, until
there is a class of a model; the second is the step between, the Auto classes, which load torch but no model.
"""

import os
import resource
import subprocess
import sys

import numpy as np
from measure import machine, markdown_table, paired_ratios, parser, quartiles, row, spread, verdicts
from summary import publish


IMPORT, PEER_IMPORT = "import hf_mim", "import transformers"
AUTO, PEER_AUTO = (
    "import hf_mim; from transformers import AutoModel",
    "import torch; from transformers import AutoModel",
)
MODEL, PEER_MODEL = "from hf_mim import MIMModel", "from transformers import ViTModel"
PAIRS = ((IMPORT, PEER_IMPORT), (AUTO, PEER_AUTO), (MODEL, PEER_MODEL))
GOAL = 1.1
COMMANDS = {"hf-mim --help": ["--help"], "hf-mim pretrain maee": ["pretrain", "maee"]}
NOTHING = "pass"


def processor_seconds(words: list[str]) -> float:
    """User and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment() -> dict[str, str]:
    """As a user's: without the settings that the command makes itself."""
    names = ("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    return {name: value for name, value in os.environ.items() if name not in names}


def measure(rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call beyond those of an empty interpreter, round by round."""
    arms = {NOTHING: ["-c", NOTHING], **{code: ["-c", code] for pair in PAIRS for code in pair}}
    arms |= {name: ["-m", "hf_mim", *words] for name, words in COMMANDS.items()}
    seconds, names = {name: [] for name in arms}, list(arms)
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(processor_seconds(arms[name]))
    empty = np.median(seconds.pop(NOTHING)[warmup:])
    return {name: [max(value - empty, 1e-3) for value in values[warmup:]] for name, values in seconds.items()}


def rows_of(seconds: dict[str, list[float]]) -> list[dict]:
    middle = {name: quartiles(values)[1] for name, values in seconds.items()}
    return [
        row(
            f"start-up: `{ours}` over `{peer}`",
            middle[ours],
            middle[peer],
            paired_ratios(seconds, ours, peer),
            GOAL,
            more=False,
            unit="s",
        )
        for ours, peer in PAIRS
    ]


def report(seconds: dict[str, list[float]], rows: list[dict]) -> str:
    lines = [[f"`{name}`", spread(quartiles(values))] for name, values in seconds.items()]
    count = len(next(iter(seconds.values())))
    return "\n".join(
        [
            f"{count} rounds.\n",
            markdown_table(["", "seconds of the processor"], lines) + "\n",
            verdicts(rows),
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    args = parser(__doc__, rounds=7).parse_args(argv)
    seconds = measure(args.rounds)
    rows = rows_of(seconds)
    publish(args.out, "start_up", f"{machine()}\n\n{report(seconds, rows)}", rows)
    return seconds


if __name__ == "__main__":
    main()
