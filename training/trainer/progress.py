"""How far a run is: a bar, or a line now and then."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hf_mim.training.common.console import RunConsole


NOTABLE_WAIT = 0.1  # share of the time waiting for data from which the progress says so
LINES = 20  # how many progress lines a run prints where there is no terminal


class TrainingProgress(TrainerCallback):
    """A bar with step, loss, images per second and the time left; a line now and then where there is no terminal.

    Attributes:
        images_per_second: mean over the run so far, first step (which compiles and warms up) excluded.
    """

    COLUMNS = ("{task.description}", "{task.completed:.0f}/{task.total:.0f}", "loss {task.fields[loss]}")

    def __init__(self, console: RunConsole):
        self.console, self.bar, self.loss, self.images_per_second = console, None, None, 0.0
        self.wait = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.started, self.printed = state.global_step, time.perf_counter(), 0
        if not self.console.is_terminal:
            return
        texts = [TextColumn(text) for text in (*self.COLUMNS, "{task.fields[speed]}")]
        left = (TimeRemainingColumn(compact=True), TextColumn("left"))
        self.bar = Progress(texts[0], BarColumn(), *texts[1:], *left, console=self.console.rich, refresh_per_second=4)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=self.first, loss="-", speed="-")
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss, self.wait = (logs or {}).get("loss", self.loss), (logs or {}).get("data_wait", self.wait)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if state.global_step == self.first + 1:
            self.started = now
            return
        steps, seconds = state.global_step - self.first - 1, now - self.started
        self.images_per_second = steps * args.total_batch_size / max(seconds, 1e-9)
        if self.bar is not None:
            loss = "-" if self.loss is None else f"{self.loss:.4f}"
            self.bar.update(self.task, completed=state.global_step, loss=loss, speed=self._speed())
        elif state.global_step * LINES // state.max_steps > self.printed:
            self.printed = state.global_step * LINES // state.max_steps
            self._print(state, (state.max_steps - state.global_step) * seconds / steps)

    def _print(self, state, left: float):
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        self.console.log(f"{step}{loss}  {self._speed()}  {left // 60:.0f}:{left % 60:02.0f} left")
        sys.stdout.flush()

    def _speed(self) -> str:
        waits = f", {self.wait:.0%} of the time waiting for data" if self.wait > NOTABLE_WAIT else ""
        return f"{self.images_per_second:,.0f} images/s{waits}"

    def close(self):
        """Gives the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
