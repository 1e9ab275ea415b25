"""Every comparison with a peer, one script after the other, onto one page.

    make bench                            # or: python benchmarks/run_all.py [--out docs/benchmarks.md] [--again]

Says first how long it will take, from what each script took when it last ran. What is done is kept in
`outputs/bench-done.txt`: stopped, it goes on with the next script; once all are done, or with `--again`, it starts from
the beginning. A script that fails is named at the end, with exit code 1, and runs again the next time.

Not among them, because they compare with no peer or take hours: adapting.py, crops.py, long_run.py, methods.py,
model_sizes.py, own_images.py, poolers.py, stream_reading.py, teacher_cost.py, teachers.py, training_cost.py.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from measure import parser
from summary import PAGE, file_of


HERE = Path(__file__).parent
# section of the page -> the script and its options
SCRIPTS = {
    "start_up": "start_up.py",
    "pretraining_run": "pretraining_run.py",
    "pretraining_step quick": "pretraining_step.py --size quick",
    "pretraining_step tiny": "pretraining_step.py --size tiny",
    "input_pipeline": "input_pipeline.py",
    "token_morphing": "token_morphing.py --step",
    "probing": "probing.py",
    "analysis": "analysis.py",
    "growth": "growth.py",
    "gpu": "gpu.py",
}
NEEDS_GPU = ("gpu",)


def recorded(page: str | Path, name: str) -> float | None:
    """Minutes that a section took when it was last run; None where that is not known."""
    file = file_of(page, name)
    seconds = json.loads(file.read_text())["seconds"] if file.exists() else None
    return None if seconds is None else seconds / 60


def announce(page: str | Path, names: list[str]) -> str:
    minutes = {name: recorded(page, name) for name in names}
    unknown = [name for name, value in minutes.items() if value is None]
    total = sum(value for value in minutes.values() if value is not None)
    times = [f"about {total:.0f} minutes, as recorded"] if len(unknown) < len(names) else []
    times += [f"not recorded yet: {', '.join(unknown)}"] if unknown else []
    return f"{len(names)} of {len(SCRIPTS)} comparisons to go; {'; '.join(times)}"


def run(name: str, page: str | Path) -> bool:
    """Runs one script on a page. -> whether it succeeded"""
    script, *options = shlex.split(SCRIPTS[name])
    return subprocess.run([sys.executable, str(HERE / script), *options, "--out", str(page)]).returncode == 0


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__, out="the page, by default docs/benchmarks.md")
    options.add_argument("--again", action="store_true", help="from the beginning, whatever is done")
    options.add_argument("--state", type=Path, default=Path("outputs/bench-done.txt"), help="what is done")
    args = options.parse_args(argv)
    page, failed = args.out or PAGE, []
    if args.again:
        args.state.unlink(missing_ok=True)
    done = args.state.read_text().splitlines() if args.state.exists() else []
    names = [name for name in SCRIPTS if torch.cuda.is_available() or name not in NEEDS_GPU]
    names = [name for name in names if name not in done]
    print(announce(page, names), flush=True)
    for name in names:
        print(f"== {name}", flush=True)
        if not run(name, page):
            failed.append(name)
            continue
        done.append(name)
        args.state.parent.mkdir(parents=True, exist_ok=True)
        args.state.write_text("\n".join(done) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    else:
        args.state.unlink(missing_ok=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
