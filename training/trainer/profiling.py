"""Where the time of a training step goes: `training.profile=true`."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import cast

from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from hf_mim.modeling.modeling_mim import MIMForPreTraining
from hf_mim.training.trainer.trainer import MIMTrainer


WARM_UP, STEPS, OPERATIONS = 5, 5, 15
PARTS = ("encoder", "decoder", "target", "loss", "backward", "optimizer")


class ProfileCallback(TrainerCallback):
    """Records some steps after the first ones and writes `profile/trace.json.gz`, for chrome://tracing or Perfetto,
    and `profile/summary.md`: the share of each part of the step, and the operations that take longest.

    Args:
        trainer: whose model is a `MIMForPreTraining`.
        folder: of the run.
        log: prints where the files are.
    """

    def __init__(self, trainer: MIMTrainer, folder: Path, log: Callable[[str], None] = print):
        self.trainer, self.folder, self.log = trainer, folder / "profile", log
        self.first = -1  # the step after which it records; -1 before training
        self.profiler: profile | None = None
        self.parts = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step + WARM_UP

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self._name_parts()
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if args.device.type == "cuda" else []
            self.profiler = profile(activities=activities)
            self.trainer.throughput.read(state.global_step)
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler is not None and state.global_step == self.first + STEPS:
            self._write(self.profiler, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self._write(self.profiler, state.global_step)

    def _name_parts(self):
        """Puts a name on the parts of the step, for as long as they are recorded."""
        model = cast(MIMForPreTraining, self.trainer.bare_model)
        for owner, method, part in (
            (model.mim.encoder, "forward", "encoder"),
            (model.decoder, "forward", "decoder"),
            (model.target, "targets", "target"),
            (model.target, "loss", "loss"),
            (self.trainer.accelerator, "backward", "backward"),
            (self.trainer.optimizer, "step", "optimizer"),
        ):
            # An instance's attribute hides the method of its class, or what stood there before.
            self.parts.callback(partial(self._restore, owner, method, owner.__dict__.get(method)))
            setattr(owner, method, named(getattr(owner, method), part))

    @staticmethod
    def _restore(owner, method: str, before):
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)

    def _write(self, profiler: profile, step: int) -> None:
        profiler.stop()
        self.profiler = None
        self.parts.close()
        speed = self.trainer.throughput.read(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = summary(profiler.key_averages(), max(1, step - self.first), speed)
        (self.folder / "summary.md").write_text(text, encoding="utf-8")
        self.log(f"profile of {max(1, step - self.first)} steps: {self.folder / 'summary.md'}")


def named(function: Callable, part: str) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(part):
            return function(*args, **kwargs)

    return call


def summary(events, steps: int, speed: dict[str, float]) -> str:
    """One page of Markdown."""
    on_gpu = any(event.device_time_total for event in events)
    kind = "device_time_total" if on_gpu else "cpu_time_total"
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = {event.key: getattr(event, kind) / 1000 / steps for event in events}
    lines = [f"# Where the time of a step goes: {steps} steps on the {'GPU' if on_gpu else 'processor'}\n"]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in speed.items()]
    lines += ["", "| part | ms a step |", "|---|---|"]
    lines += [f"| {part} | {total[part]:.2f} |" for part in PARTS if part in total]
    lines += ["", "| operation | own ms a step | calls a step |", "|---|---|---|"]
    operations = [event for event in events if event.key not in PARTS and getattr(event, own) > 0]
    for event in sorted(operations, key=lambda event: -getattr(event, own))[:OPERATIONS]:
        lines.append(f"| `{event.key}` | {getattr(event, own) / 1000 / steps:.2f} | {event.count / steps:.0f} |")
    return "\n".join([*lines, "", "The whole course of the steps: trace.json.gz, for https://ui.perfetto.dev", ""])
