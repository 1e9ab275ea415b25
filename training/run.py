"""What every run that trains has in common: its folder, where it goes on, how it ends, what it says of itself."""

import os
import platform
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from rich.console import Console

from hf_mim.training import recipe as recipes
from hf_mim.training.data.urls import is_url
from hf_mim.training.trainer.processes import Lookout
from hf_mim.training.trainer.remote import RemoteRun
from hf_mim.training.trainer.saving import StopCallback, last_checkpoint


# Any of these in a folder says that it holds a run already.
TRACES = ("config.json", "model.safetensors", "recipe.yaml", "metrics.json", "checkpoint-*")


def find_checkpoint(console: Console, recipe: dict, folder: Path, remote: RemoteRun | None = None) -> Path | None:
    """Where to resume, and says so; None, to start from the beginning, where there is no complete checkpoint."""
    if remote is not None:
        remote.fetch_last()
    checkpoint = last_checkpoint(folder)
    words = f"resuming from {checkpoint}" if checkpoint else f"no complete checkpoint in {folder}: from the beginning"
    console.print(words, highlight=False, soft_wrap=True)
    if checkpoint is not None and (folder / "recipe.yaml").is_file():
        before, now = flat(recipes.read(str(folder))), flat(recipe)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            console.print(f"with other settings than before: {', '.join(changed)}", highlight=False, soft_wrap=True)
    return checkpoint


def flat(recipe: dict, start: str = "") -> dict:
    """{"model": {"masking_config": {"ratio": 0.6}}} -> {"model.masking_config.ratio": 0.6}."""
    found = {}
    for key, value in recipe.items():
        found |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {f"{start}{key}": value}
    return found


def remote_of(wanted: str | None, console: Console) -> RemoteRun | None:
    """What copies the run, where `training.output_dir` is a URL.

    Raises:
        ValueError: the URL cannot be used, or holds a secret.
    """
    if not is_url(wanted):
        return None
    return RemoteRun(wanted, lambda words: console.print(words, style="yellow", highlight=False, soft_wrap=True))


def choose_folder(wanted: str | None, stem: str, resume: bool = False, remote: RemoteRun | None = None) -> Path:
    """The output folder, the same in every process; not created yet. Of a run at a URL, where it works.

    Raises:
        ValueError: it holds another run that is not to be resumed, or is no folder.
        Unreachable: the URL cannot be read.
    """
    chosen = [wanted or f"outputs/{stem}-{time.strftime('%Y-%m-%d-%H%M%S')}"]
    if accelerate.PartialState().num_processes > 1:
        broadcast_object_list(chosen)  # of the main process: the others' clocks may be a second ahead
    folder = place = Path(chosen[0]).expanduser() if remote is None else remote.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output folder {folder} is a file")
    found = next((path.name for trace in TRACES for path in folder.glob(trace)), None)
    if found is None and remote is not None and not resume:
        found, place = remote.traces(TRACES), remote.url
    # Nobody may write before everybody has looked.
    accelerate.PartialState().wait_for_everyone()
    if found is not None and not resume:
        raise ValueError(
            f"{place} holds another run ({found}); choose another training.output_dir, or remove it, or go on with "
            "it by training.resume=true"
        )
    return folder


def place_of(run) -> str:
    """What a run is called by: its URL, or its folder."""
    return str(run.folder if run.remote is None else run.remote.url)


def copied(run) -> AbstractContextManager:
    """Around what writes into a run's folder: at its end the URL has all of it, where there is one."""
    return run.remote or nullcontext()


def save_recipe(run, command: str) -> None:
    """Writes recipe.yaml before the first step: a run that is killed can be resumed by its folder alone.

    Args:
        run: has `recipe`, `folder`, `remote` (or None) and `paper`, what its header says of it.
        command: that runs it again, up to the recipe.

    Raises:
        OSError: it cannot be written, here or at the URL.
    """
    command = f"{command} {shlex.quote(f'{place_of(run)}/recipe.yaml')}"
    comment = f"The resolved recipe of this run. To run it again:\n{command}"
    comment += f"\n\nPaper: {run.paper}" if run.paper else ""
    run.folder.mkdir(parents=True, exist_ok=True)
    recipes.save(run.recipe, run.folder / "recipe.yaml", comment)
    if run.remote is not None:
        run.remote.begin("recipe.yaml")


def train_and_save(run, trainer, save: Callable[[], None], command: str) -> None:
    """Trains; calls `save`, in every process, also when stopped by Ctrl-C or SIGTERM, which are then passed on.

    Args:
        run: has `folder`, `remote` and `checkpoint` (to resume from), or None, and `console`.
        command: `pretrain` or `finetune`, which goes on with what was stopped.

    Raises:
        SystemExit: with code 143 after SIGTERM, with 1 where another process is gone, which has been said.
    """
    stop = StopCallback(lambda: run.console.print("stopping after this step; saving", highlight=False))
    trainer.add_callback(stop)
    if run.remote is not None:
        trainer.add_callback(run.remote)
    try:
        with stop, lookout(run, command):
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step: the weights are all that can be saved
        save()
        say_stopped(run, trainer, command)
        raise
    with lookout(run, command):
        save()
    if stop.stopped is not None:
        say_stopped(run, trainer, command)
        raise KeyboardInterrupt if stop.stopped == signal.SIGINT else SystemExit(128 + stop.stopped)


def say_stopped(run, trainer, command: str) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    words = f"stopped at step {step} of {steps}; go on with: {again(run, command)}"
    run.console.print(words, highlight=False, soft_wrap=True)


def again(run, command: str) -> str:
    """What to type to go on with a run."""
    words, processes = f"{command} {shlex.quote(place_of(run))} training.resume=true", run.arguments.world_size
    launcher = f"accelerate launch --num_processes {processes} ... -m hf_mim" if processes > 1 else "hf-mim"
    return f"{launcher} {words}"


def lookout(run, command: str) -> Lookout:
    """A context in which the loss of another process ends the run with what is needed to go on."""

    def how_to_go_on() -> str:
        last = last_checkpoint(run.folder)
        kept = f"the last complete checkpoint is {last}" if last else f"there is no complete checkpoint in {run.folder}"
        return f"{kept}; go on with: {again(run, command)}"

    return Lookout(run.arguments.world_size, how_to_go_on)


def facts(run, trainer, seconds: float) -> dict:
    """What metrics.json says of any run: its length, speed, seed, machine and versions."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    speed = trainer.progress.images_per_second if trainer.progress is not None else 0.0
    return {
        "final_loss": losses[-1] if losses else None,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "images_per_second": round(speed, 1),
        "seed": run.arguments.seed,
        "device": run.arguments.device.type,
        "precision": "bf16" if run.arguments.bf16 else "float32",
        "processes": run.arguments.world_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    modules = (torch, transformers, datasets, accelerate)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
