"""How every command speaks: plain lines, warnings, tables and progress bars, on one console."""

import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import IO, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text


IMAGES_DONE = "{task.completed:,.0f}/{task.total:,.0f} images"  # for `RunConsole.progress`


class StandardOutput(io.TextIOBase):
    """Standard output that takes any text, and may end before the run does: its reader (`| head`) or its terminal is
    gone. A training then ends with a checkpoint, as it does by SIGPIPE's cousins; other commands end at once."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding or "utf-8"

    def isatty(self) -> bool:
        return sys.stdout.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    def write(self, text: str) -> int:
        try:
            # Names of files may hold bytes that are no text, and terminals may lack letters.
            return sys.stdout.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except OSError:
            end_of_output()
            return 0

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except OSError:
            end_of_output()


def end_of_output() -> None:
    """Sends what comes next nowhere, and tells the run.

    Raises:
        SystemExit: with the code of a process that SIGPIPE ended, where no training waits for that signal.
    """
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, it stays open
    number = getattr(signal, "SIGPIPE", None)
    if number is None or not callable(signal.getsignal(number)):
        raise SystemExit(141)
    signal.raise_signal(number)


class RunConsole:
    """Prints for people. Messages are text, never markup: a path with brackets is printed as it is, on one line.

    Args:
        console: of rich, or another `RunConsole`; None is the terminal.
        quiet: print nothing, as every process but the first does.
    """

    def __init__(self, console: "Console | RunConsole | None" = None, quiet: bool = False):
        if quiet:
            self.rich = Console(quiet=True)
        elif isinstance(console, RunConsole):
            self.rich = console.rich
        else:
            self.rich = console or Console(file=cast(IO[str], StandardOutput()))

    @property
    def is_terminal(self) -> bool:
        return self.rich.is_terminal

    def log(self, message: str, style: str = "") -> None:
        self.rich.print(Text(message, style=style), soft_wrap=True)

    def warn(self, message: str) -> None:
        self.log(message, style="yellow")

    def show(self, renderable: RenderableType) -> None:
        """Prints a table or another thing that rich lays out."""
        self.rich.print(renderable, highlight=False)

    def status(self, message: str) -> Status:
        """A spinner beside a message, while the context lasts."""
        return self.rich.status(message)

    def progress(self, counted: str = "") -> Progress:
        """A bar that goes when it is done; nothing where there is no terminal.

        Args:
            counted: a format, such as `"{task.completed:,.0f} images"`.
        """
        texts = [TextColumn("{task.description}"), BarColumn(), *([TextColumn(counted)] if counted else [])]
        left = TimeRemainingColumn(compact=True)
        return Progress(*texts, left, console=self.rich, transient=True, disable=not self.is_terminal)


def make_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, caption: str | None = None
) -> Table:
    """A table whose first column is text and whose other columns are numbers. Cells are text, never markup."""
    table = Table(title=title and Text(title), caption=caption and Text(caption))
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
