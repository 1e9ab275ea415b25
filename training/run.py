"""What the commands have in common: a run's folder, console and device, how it starts, resumes, ends and describes
itself."""

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import accelerate
import torch
from torch import nn
from transformers import set_seed

from hf_mim.modeling.configuration_mim import MIMConfig
from hf_mim.modeling.options import pair
from hf_mim.training import recipe as recipes
from hf_mim.training.common.console import RunConsole
from hf_mim.training.common.errors import EvaluationError, RecipeError
from hf_mim.training.common.output_folder import OutputFolder, choose_folder, holds_run
from hf_mim.training.common.resources import ResourceError, explain_shortage
from hf_mim.training.data.arguments import DataArguments
from hf_mim.training.data.sample import PixelSample
from hf_mim.training.data.urls import is_url
from hf_mim.training.own_data import check_outside
from hf_mim.training.trainer.advice import (
    SHORT,
    Length,
    describe_duration,
    failed_evaluation,
    length_of,
    warning_of_length,
)
from hf_mim.training.trainer.arguments import MIMTrainingArguments
from hf_mim.training.trainer.manifest import differences, last_whole_checkpoint, read_manifest, versions
from hf_mim.training.trainer.processes import PeerWatchdog, on_main_process
from hf_mim.training.trainer.remote import RemoteRun, checkpoint_step
from hf_mim.training.trainer.saving import last_checkpoint
from hf_mim.training.trainer.stopping import FolderCheck, StopCallback
from hf_mim.training.trainer.trainer import MIMTrainer


# Any of these in a folder says that it holds a run already.
TRACES = ("config.json", "model.safetensors", "recipe.yaml", "metrics.json", "checkpoint-*")
REMEDY = "choose another training.output_dir, remove that folder, or resume the run with training.resume=true"
TrainerT = TypeVar("TrainerT", bound=MIMTrainer)


@dataclass(kw_only=True)
class Run:
    """A command that is set up and has written nothing yet.

    Args:
        recipe: {section: {key: value}}, checked.
        arguments: the section of the command itself.
        data: the section `data`.
        output: the folder that the command writes into; `owning_folder` makes it.
    """

    recipe: dict
    arguments: Any
    data: DataArguments
    output: OutputFolder
    console: RunConsole

    def __post_init__(self):
        """Raises:
        FolderError: the output folder lies in that of the data.
        """
        if not getattr(self.arguments, "resume", False):  # of a run that lies there, the folder is left out of the data
            check_outside(self.location, self.data.dataset)

    @property
    def folder(self) -> Path:
        return self.output.path

    @property
    def location(self) -> str:
        """Where people find the run: its folder, or its URL."""
        return str(self.folder)

    @contextmanager
    def owning_folder(self) -> Iterator[None]:
        """A context in which nobody else writes into the folder, which is made and printed at its beginning.

        Raises:
            FolderError: it cannot be made, somebody else is writing into it, or it holds another run by now.
        """
        self.open_folder()
        try:
            self.console.log(f"output folder: {self.location}")
            if self.output.lock is not None and not self.output.lock.guards:
                self.console.warn(f"there are no file locks in {self.folder}: start no second run in it")
            yield
        finally:
            self.output.close()

    def open_folder(self) -> None:
        self.output.open()

    def describe(self, report: Sequence[str] = (), **lines: str) -> None:
        """Prints what will run, a line for each keyword: `data="..."`; and what is used of the data, `report`."""
        described = [f"{name.replace('_', '-')}: {line}" for name, line in lines.items()]
        self.console.log("\n".join([*described, *report]))

    def log_sample(self, sample: PixelSample) -> None:
        """Prints what the images hold, and a warning where little of it is left."""
        if sample.count:
            self.console.log(sample.line)
        if sample.warning:
            self.console.warn(sample.warning)

    def log_next_steps(self, *lines: str) -> None:
        """Prints what to look at and what to do next, and where everything is."""
        for line in (*lines, f"output folder: {shlex.quote(self.location)}"):
            self.console.log(line)

    def write_json(self, name: str, results: dict | list, **options) -> None:
        """Writes a file of results, with options of `json.dumps`. An older one stays until the new one is complete."""
        self.output.check()
        unfinished = self.folder / f"{name}.unfinished"
        unfinished.write_text(json.dumps(results, **{"indent": 2, **options}) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / name)


@dataclass(kw_only=True)
class TrainingRun(Run, Generic[TrainerT]):
    """A run that trains a model.

    Args:
        command: that resumes it: `pretrain` or `finetune`.
        paper: what the recipe's header says of it.
        remote: copies the run to a URL.
        checkpoint: to resume from.
        data_digest: of the data's files; a run that resumes compares it.
        model: set when the data says what its head is.
    """

    arguments: MIMTrainingArguments
    command: str
    paper: str = ""
    remote: RemoteRun | None = None
    checkpoint: Path | None = None
    data_digest: str = ""
    model: nn.Module = field(init=False, repr=False)
    length: Length = field(init=False, repr=False)

    # ---- before ----------------------------------------------------------------------------------------------------
    @classmethod
    def start(
        cls, recipe: dict, arguments: MIMTrainingArguments, output_dir: str | None, stem: str, console, **fields
    ) -> Self:
        """Chooses the output folder, and seeds.

        Args:
            output_dir: what the user said; None makes a folder of `stem` and the date.

        Raises:
            FolderError: it holds another run that is not to be resumed, is in use, or is no folder.
            Unreachable: the URL cannot be read.
        """
        for key in ("output_dir", "resume"):  # another run of the saved recipe must not write here
            recipe["training"].pop(key, None)
        console = RunConsole(console, quiet=arguments.process_index > 0)
        for message in recipes.without_effect(recipe):
            console.warn(message)
        remote = RemoteRun(output_dir, console.warn) if output_dir and is_url(output_dir) else None
        place = output_dir if remote is None else str(remote.folder)
        if remote is not None:
            arguments.output_dir = place  # a Trainer makes that folder, which of a URL would be one named `s3:`
        output = on_main_process(lambda: choose_folder(place, stem, () if arguments.resume else TRACES, REMEDY))
        if remote is not None and not arguments.resume and (trace := remote.traces(TRACES)) is not None:
            raise holds_run(remote.url, trace, REMEDY)
        accelerate.PartialState().wait_for_everyone()  # nobody may write before everybody has looked
        set_seed(arguments.seed)
        return cls(recipe=recipe, arguments=arguments, output=output, console=console, remote=remote, **fields)

    def open_folder(self) -> None:
        """Opened by the main process, for all of them. It may have another name now: somebody was quicker."""

        def open_it() -> Path:
            self.output.open()
            return self.folder

        self.output.path = on_main_process(open_it)
        self.arguments.output_dir = str(self.folder)

    def find_checkpoint(self) -> None:
        """Chooses where to resume, and says so: from the beginning, where there is no complete checkpoint."""
        if not self.arguments.resume:
            return
        below, damaged = None, False
        while True:
            fetched = 0 if self.remote is None else self.remote.fetch_last(below)
            self.checkpoint, messages = on_main_process(lambda: last_whole_checkpoint(self.folder))
            for message in messages:
                self.console.warn(message)
            damaged |= bool(messages)
            if fetched <= (checkpoint_step(self.checkpoint.name) or 0 if self.checkpoint else 0):
                break
            below = fetched  # that one is damaged; the one before may lie at the URL
        if self.checkpoint is None:
            self.console.log(f"no complete checkpoint in {self.folder}: starting from the beginning")
            if damaged:
                self.console.warn("training.save_total_limit=2 or more would keep an older one to fall back on")
        else:
            self.console.log(f"resuming from {self.checkpoint}")

    def log_differences(self, trainer: TrainerT) -> None:
        """Prints in what the run differs from the one that wrote the checkpoint, and what that means."""
        if self.checkpoint is None:
            return
        before, now = read_manifest(self.checkpoint), trainer.run_record()
        for message in differences(before, json.loads(json.dumps(now))):
            self.console.warn(message)

    def describe(self, report: Sequence[str] = (), digest: str = "", **lines: str) -> None:
        """As of `Run`.

        Args:
            digest: of the names and sizes of the data's files, for the manifests of the checkpoints.
        """
        super().describe(report, **lines)
        self.data_digest = digest

    def describe_length(self, dataset, least: int = SHORT, drop_last: bool | None = None) -> None:
        """Prints how long the run is, with a warning where it is shorter than `least` steps."""
        self.length = length_of(dataset, self.arguments, drop_last)
        self.arguments.logging_steps = min(self.arguments.logging_steps, max(1, self.length.steps))  # log once at least
        super().describe(length=str(self.length))
        if (warning := warning_of_length(self.length, least)) is not None:
            self.console.warn(warning)

    def describe_training(self) -> str:
        """Batch, learning rate and machine, on one line."""
        arguments, device = self.arguments, self.arguments.device.type
        line = f"total batch {arguments.total_batch_size}, learning rate {arguments.learning_rate:.3g}, on {device}"
        line += f", {arguments.precision}" + (f", {count} processes" if (count := arguments.world_size) > 1 else "")
        line += f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        return f"{line}, {arguments.workers}" if arguments.workers else line

    def keep_pixels(self, config: MIMConfig, data: DataArguments) -> None:
        """Writes into config and recipe how pixels are made of files, so that evaluation and serving do the same.

        Args:
            config: that the checkpoint will have.
            data: with the numbers that `value_range=auto` stands for.
        """
        self.data = data
        for name in ("value_range", "nodata", "eval_crop", "display_bands"):
            if (value := getattr(data, name)) is not None:
                setattr(config, name, value)
                self.recipe["data"][name] = value

    # ---- while it trains -------------------------------------------------------------------------------------------
    def execute(self, train: Callable[[], TrainerT], finish: Callable[[TrainerT, float], None]) -> Path:
        """Trains, then calls `finish(trainer, seconds of training)` in every process. Returns the folder."""
        started = time.perf_counter()
        with self.owning_folder(), self.copying(), self.shortages():
            trainer = train()
            seconds = time.perf_counter() - started
            with self.watchdog():
                finish(trainer, seconds)
                trainer.accelerator.wait_for_everyone()
        return self.folder

    def train(self, trainer: TrainerT, save: Callable[[], None]) -> None:
        """Trains; calls `save`, in every process, also when stopped by Ctrl-C or SIGTERM, which are then passed on.

        Raises:
            SystemExit: with code 143 after SIGTERM, with 1 where another process is gone, which has been said.
        """
        trainer.recipe, trainer.data_digest = self.recipe, self.data_digest
        self.log_differences(trainer)
        stop = StopCallback(lambda: self.console.log("stopping after this step; saving"))
        trainer.add_callback(stop)
        trainer.add_callback(FolderCheck(self.output))
        if self.remote is not None:
            trainer.add_callback(self.remote)
        if self.checkpoint is None:
            size = pair(self.recipe["model"].get("image_size") or trainer.bare_model.config.image_size)
            if (duration := describe_duration(trainer, self.length, size)) is not None:
                super().describe(time=duration)
        try:
            with stop, self.watchdog():
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step: the weights are all that can be saved
            save()
            self._log_stopped(trainer)
            raise
        with self.watchdog():
            save()
        if stop.stopped is not None:
            self._log_stopped(trainer)
            raise KeyboardInterrupt if stop.stopped == signal.SIGINT else SystemExit(128 + stop.stopped)

    def try_evaluation(self, evaluate: Callable[[], dict]) -> tuple[dict, EvaluationError | None]:
        """What an evaluation gives, and None; where it fails, what `failed_evaluation` says."""
        try:
            return evaluate(), None
        except Exception as error:
            again = f"hf-mim probe {shlex.quote(self.location)}"
            if last_checkpoint(self.folder) is not None:
                again = self.resume_command
            return failed_evaluation(error, self.folder, self.location, again)

    def copying(self) -> AbstractContextManager:
        """Around what writes into the folder: at its end the URL has all of it, where there is one."""
        return self.remote or nullcontext()

    def watchdog(self) -> PeerWatchdog:
        """A context in which the loss of another process ends the run with what is needed to resume."""
        return PeerWatchdog(self.arguments.world_size, self.how_to_resume)

    def how_to_resume(self) -> str:
        last = last_checkpoint(self.folder)
        state = f"the last complete checkpoint is {last}" if last else f"no complete checkpoint in {self.folder}"
        return f"{state}; resume with: {self.resume_command}"

    @contextmanager
    def shortages(self) -> Iterator[None]:
        """A context in which a full disk or a lack of memory, in whatever library, ends the run with what is needed to
        resume.

        Raises:
            ResourceError: in place of what the library raises.
        """
        try:
            yield
        except Exception as error:
            if (message := explain_shortage(error, [self.folder])) is None:
                raise
            raise ResourceError(f"{message}; {self.how_to_resume()}") from error

    def _log_stopped(self, trainer: TrainerT) -> None:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        self.console.log(f"stopped at step {step} of {steps}; resume with: {self.resume_command}")

    # ---- what it writes --------------------------------------------------------------------------------------------
    @property
    def location(self) -> str:
        return str(self.folder if self.remote is None else self.remote.url)

    @property
    def resume_command(self) -> str:
        command = f"{self.command} {shlex.quote(self.location)} training.resume=true"
        processes = self.arguments.world_size
        launcher = f"accelerate launch --num_processes {processes} ... -m hf_mim" if processes > 1 else "hf-mim"
        return f"{launcher} {command}"

    def save_recipe(self, command: str) -> None:
        """Writes recipe.yaml before the first step: a run that is killed can be resumed by its folder alone.

        Args:
            command: that runs it again, up to the recipe.

        Raises:
            OSError: it cannot be written, here or at the URL.
        """
        comment = "The resolved recipe of this run. To run it again:\n"
        comment += f"{command} {shlex.quote(f'{self.location}/recipe.yaml')}"
        comment += f"\n\nPaper: {self.paper}" if self.paper else ""
        recipes.save(self.recipe, self.folder / "recipe.yaml", comment)
        if self.remote is not None:
            self.remote.begin("recipe.yaml")

    def save_model(self, trainer: TrainerT) -> None:
        """Writes weights, config and processor. To be called in every process: sharded weights are gathered."""
        self.output.check()
        trainer.save_model(str(self.folder))
        if trainer.is_world_process_zero():
            # A pickle; recipe.yaml says the same to people.
            (self.folder / "training_args.bin").unlink(missing_ok=True)

    def metadata(self, trainer: TrainerT, seconds: float) -> dict:
        """What metrics.json says of any run: its length, speed, seed, machine and versions."""
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        speed = trainer.progress.images_per_second if trainer.progress is not None else 0.0
        return {
            "final_loss": losses[-1] if losses else None,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "images_per_second": round(speed, 1),
            "seed": self.arguments.seed,
            "device": self.arguments.device.type,
            "precision": self.arguments.precision,
            "processes": self.arguments.world_size,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "versions": versions(),
        }


def which_run(command: str) -> RecipeError:
    """The error for `training.resume=true` without a run."""
    return RecipeError(f"which run to resume? hf-mim {command} FOLDER training.resume=true", "training.resume")
