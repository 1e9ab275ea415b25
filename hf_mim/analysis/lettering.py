"""How wide text is in a figure, and text in lines that fit: names of runs have any length, and none is cut."""

import re
from functools import cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath


SIZE = 12  # of letters, in points
LINE = 15.0  # from one line to the next
PIECE = re.compile(r"[^\s\-_/,]*[\s\-_/,]|[^\s\-_/,]+")  # after which a line may end


@cache
def width_of(text: str, weight: str = "normal") -> float:
    """In points."""
    return TextToPath().get_text_width_height_descent(text, FontProperties(size=SIZE, weight=weight), False)[0]


def fold(text: str, width: float, weight: str = "normal") -> list[str]:
    """Lines of at most `width` points; a piece that is wider by itself is broken where the line is full."""
    lines = [""]
    for piece in PIECE.findall(text):
        if lines[-1] and width_of((lines[-1] + piece).rstrip(), weight) > width:
            lines.append("")
        lines[-1] += piece
        while width_of(lines[-1].rstrip(), weight) > width and len(lines[-1]) > 1:
            count = next(n for n in range(len(lines[-1]), 0, -1) if n == 1 or width_of(lines[-1][:n], weight) <= width)
            lines[-1:] = [lines[-1][:count], lines[-1][count:]]
    return [line.rstrip() for line in lines]
