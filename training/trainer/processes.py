"""Several processes: when one of them was killed, one of the others prints it, and all end."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_mim.training.common.errors import UserError
from hf_mim.training.common.foreign_errors import is_lost_peer


LOOK_EVERY = 1.0  # seconds between two looks at the other processes
PATIENCE = 5.0  # seconds in which a process may find out itself: its own error is better, and GPUs only wait
SETTLE = 2.0  # seconds between a broken connection and the end of who broke it
CLAIM = "hf_mim/lost"
ResultT = TypeVar("ResultT")


class PeerWatchdog:
    """A context around what several processes do together. Where one of them is killed, the others would wait for it:
    until the connection breaks with gloo, for `training.ddp_timeout` on GPUs. They end with exit code 1 instead, and
    the first to notice prints what is known. An error that all of them meet is left to one of them, too.

    A process on the same machine is seen to end. That one on another machine did is known when those beside it end.

    Args:
        processes: how many there are; with one, nothing is done.
        how_to_resume: gives the rest of the message.

    Raises:
        SystemExit: with code 1, at the end of the context, in place of the error that a lost process causes.
    """

    def __init__(self, processes: int, how_to_resume: Callable[[], str]):
        self.processes, self.how_to_resume, self.finished = processes, how_to_resume, threading.Event()
        self.siblings: dict[int, psutil.Process] = {}

    def __enter__(self):
        if self.processes > 1:
            self.rank = dist.get_rank()
            everyone = gather_object([(pid_namespace(), os.getpid())])
            here = [rank for rank, (where, _) in enumerate(everyone) if where == pid_namespace() and rank != self.rank]
            self.siblings = {rank: psutil.Process(everyone[rank][1]) for rank in here}
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        self.finished.set()
        if self.processes == 1 or not isinstance(error, Exception):
            return
        if not self._claim():
            raise SystemExit(1) from None
        if is_lost(error):
            self._report(self._wait_for_gone(), str(error))
            raise SystemExit(1) from None

    def gone(self) -> list[int]:
        """The processes on this machine that have ended."""
        return [rank for rank, process in self.siblings.items() if not is_alive(process)]

    def _watch(self) -> None:
        while not self.finished.wait(LOOK_EVERY):
            gone = self.gone()
            if not gone and not self._claimed():
                continue
            if not self.finished.wait(PATIENCE):
                if self._claim():
                    self._report(gone, "")
                # The main thread cannot be reached: it waits, in C, for what will not come.
                os._exit(1)
            return

    def _wait_for_gone(self) -> list[int]:
        until = time.monotonic() + SETTLE
        while not self.gone() and time.monotonic() < until:
            time.sleep(0.02)
        return self.gone()

    def _report(self, gone: list[int], reason: str) -> None:
        processes = [f"process {rank} of {self.processes} (pid {self.siblings[rank].pid})" for rank in gone]
        message = f"{', '.join(processes)} was killed (out of memory?)"
        if not gone:
            message = f"one of {self.processes} processes, perhaps on another machine, was killed or does not answer"
            message += f" ({reason.splitlines()[0]})" if reason else ""
        print(f"error: {message}; {self.how_to_resume()}", file=sys.stderr, flush=True)

    def _claim(self) -> bool:
        """Whether this process is the first to have met an error."""
        try:
            return store().add(CLAIM, 1) == 1
        except RuntimeError:  # it was with the process that is gone
            return min({self.rank, *self.siblings} - set(self.gone())) == self.rank

    def _claimed(self) -> bool:
        try:
            return store().check([CLAIM])
        except RuntimeError:
            return False


def store():
    """What the launcher keeps for all processes, over all machines."""
    return dist.distributed_c10d._get_default_store()


def pid_namespace() -> tuple[str, str]:
    """Where process ids mean the same: a machine, and on Linux a container."""
    namespace = Path("/proc/self/ns/pid")
    return socket.gethostname(), os.readlink(namespace) if namespace.is_symlink() else ""


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_lost(error: BaseException) -> bool:
    """Whether it comes from an operation of all processes that one of them did not take part in."""
    return isinstance(error, dist.DistError) or is_lost_peer(error)


def on_main_process(action: Callable[[], ResultT]) -> ResultT:
    """What `action` gives, or the `UserError` that it raises, in every process; only the main one runs it."""
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, error]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
