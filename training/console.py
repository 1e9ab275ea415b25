"""How every command speaks: plain lines, warnings, tables and progress bars, on one console."""

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class RunConsole:
    """Prints for people. Messages are text, never markup: a path with brackets is printed as it is, on one line.

    Args:
        console: of rich; None is the terminal.
        quiet: print nothing, as every process but the first does.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.rich = Console(quiet=True) if quiet else console or Console()

    def log(self, message: str, style: str = "") -> None:
        self.rich.print(Text(message, style=style), soft_wrap=True)

    def warn(self, message: str) -> None:
        self.log(message, style="yellow")

    def show(self, renderable: RenderableType) -> None:
        """Prints a table or another thing that rich lays out."""
        self.rich.print(renderable, highlight=False)

    def progress(self, counted: str = "") -> Progress:
        """A bar that goes when it is done. `counted`: a format, such as `"{task.completed:,.0f} images"`."""
        texts = [TextColumn("{task.description}"), BarColumn(), *([TextColumn(counted)] if counted else [])]
        return Progress(*texts, TimeRemainingColumn(compact=True), console=self.rich, transient=True)
