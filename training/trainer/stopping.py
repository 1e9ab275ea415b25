"""Runs that end before their time: by a signal, with a checkpoint, or because a worker of the loader was killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from hf_mim.training.common.output_folder import OutputFolder
from hf_mim.training.trainer.saving import CheckpointingTrainer, last_checkpoint


SIGHUP = getattr(signal, "SIGHUP", None)  # absent on Windows, as is the next
SIGPIPE = getattr(signal, "SIGPIPE", None)  # Python ignores it, and raises an error in its place
GRACE = 30  # seconds that a loader's worker goes on after SIGTERM


def set_child_handler(handler):
    """Chooses what happens when a child process ends, and returns what happened before. torch's handler would raise the
    error of a killed worker again for each of the others that ends, whatever is being done then."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def lost_worker(trainer: CheckpointingTrainer, reason: str) -> ChildProcessError:
    """The error that ends a run whose loader has lost a worker, with what is needed to go on."""
    folder, last = trainer.folder, last_checkpoint(trainer.folder)
    resume = f"resume from {last} with training.resume=true" if last else f"there is no checkpoint in {folder}"
    return ChildProcessError(
        f"a data loader worker was killed after step {trainer.state.global_step} ({reason.rstrip('. ')}); {resume}. "
        "If memory ran out, lower training.dataloader_num_workers or data.shuffle_buffer"
    )


def defer_sigterm(first: Callable[[int], None] | None, number: int) -> None:
    """For a loader's worker, after its own `worker_init_fn`. Schedulers send SIGTERM to every process of a job: without
    workers the step that is running could not be ended. They still end by it, half a minute later."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    if SIGHUP is not None:
        signal.signal(SIGHUP, signal.SIG_IGN)  # it ends when its parent does
    if first is not None:
        first(number)


def end_workers(loader: Any) -> None:
    """Ends the workers that a loader, or accelerate's wrapper of one, keeps for its next epoch. At exit Python sends
    them SIGTERM, which they defer, and waits."""
    inner = getattr(loader, "base_dataloader", loader)
    if (iterator := getattr(inner, "_iterator", None)) is not None:  # torch has no public way
        iterator._shutdown_workers()
        inner._iterator = None


def is_distributed() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


class StopCallback(TrainerCallback):
    """Ends training after the step that is running, with a checkpoint, on Ctrl-C, on SIGTERM, and when its terminal
    (SIGHUP, unless it is ignored, as under nohup) or the reader of its output (SIGPIPE) is gone; a context.

    Ctrl-C a second time interrupts at once.

    Attributes:
        stopped: the signal that ended training; None if none did.
    """

    SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP, SIGPIPE) if number is not None)
    SECONDS = 1.0  # a launcher may pass on a signal that the terminal has already sent

    def __init__(self, on_signal: Callable[[], None] = lambda: None):
        self.on_signal, self.received_at = on_signal, 0.0
        self.received: int | None = None
        self.stopped: signal.Signals | None = None
        self.previous: dict[int, Any] = {}  # handlers

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            ignored = [number for number in self.SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
            handled = [number for number in self.SIGNALS if number not in ignored or number == SIGPIPE]
            self.previous = {number: signal.signal(number, self._receive) for number in handled}
            self.owner = os.getpid()
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self.owner:  # a loader's worker: it must serve the step that is running
            return
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            if not is_distributed():  # a launcher sends SIGTERM, too, where one of them is gone: there will be no step
                self.on_signal()
        elif number == signal.SIGINT and time.monotonic() > self.received_at + self.SECONDS:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        number = self._agreed(args, state)
        if number:
            self.stopped = signal.Signals(number)
            if is_distributed():
                self.on_signal()
            control.should_save = control.should_training_stop = True

    def _agreed(self, args, state) -> int:
        """The signal that any process has received. They must all stop at the same step; a GPU is only waited for
        where the loss is logged, which waits for it anyway."""
        if args.world_size == 1:
            return self.received or 0
        if args.device.type != "cpu" and state.global_step % max(1, state.logging_steps):
            return 0
        number = torch.tensor(self.received or 0, device=args.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)


class FolderCheck(TrainerCallback):
    """Ends a run whose folder was removed: the Trainer would make another one, with the last checkpoint alone."""

    def __init__(self, output: OutputFolder):
        self.output = output

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.output.check()

    on_epoch_end = on_step_end
