"""Processes of benchmarks/gpu.py, one for an arm or a part: what fails there leaves the others as they are."""

import contextlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


PATIENCE = 300  # seconds in which an arm takes its first steps, and in which it answers


def serve(pipe, make: Callable, name: str, arm: str, args) -> None:
    """What `make` gives, at the other end of a pipe: answers the names of its methods."""
    try:
        runner = make(name, arm, args)
        pipe.send(None)
        while (asked := pipe.recv()) is not None:
            pipe.send(getattr(runner, asked)())
    except Exception:
        pipe.send(RuntimeError(f"{name}, {arm}: {traceback.format_exc()}"))


class Failed(RuntimeError):
    """An arm failed in its process."""


class Served:
    """A `gpu_steps.Runner` in a process of its own, which takes its first steps."""

    def __init__(self, make: Callable, name: str, arm: str, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.title, self.started = f"{name}, {arm}", time.monotonic()
        self.process = context.Process(target=serve, args=(other, make, name, arm, args), daemon=True)
        self.process.start()
        other.close()

    def ready(self) -> None:
        """Once the first steps are taken."""
        self.answer(self.started + PATIENCE - time.monotonic())

    def answer(self, patience: float = PATIENCE) -> Any:
        """
        Raises:
            Failed: what went wrong there, or that there was no answer in so many seconds.
        """
        try:
            if not self.pipe.poll(max(0.0, patience)):
                raise Failed(f"{self.title}: no answer in {PATIENCE} s")
            found = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(10)
            raise Failed(f"{self.title}: its process ended with code {self.process.exitcode}") from error
        if isinstance(found, RuntimeError):
            raise Failed(str(found))
        return found

    def ask(self, what: str) -> Any:
        with contextlib.suppress(ConnectionError):  # `answer` says how the process ended
            self.pipe.send(what)
        return self.answer()

    def seconds(self) -> float:
        return self.ask("seconds")

    def morphing_seconds(self) -> float:
        return self.ask("morphing_seconds")

    def facts(self) -> dict[str, Any]:
        return self.ask("facts")

    def end(self) -> None:
        self.process.kill()


def answers(asked: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each gives, in this order, without those whose process fails, which is told."""
    found = {}
    for arm, ask in asked.items():
        try:
            found[arm] = ask()
        except Failed as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
    return found


def in_own_process(part: Callable, args) -> dict:
    """What it returns or raises: an error on a GPU spoils all that the process does afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, args).result()
