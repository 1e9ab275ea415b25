"""What things are called in lines and tables."""

from pathlib import Path

from hf_mim.modeling.options import Size, pair


def name_of(source: str) -> str:
    """What to call a checkpoint: the last part of its path or id."""
    name = Path(source).name
    return Path(source).resolve().name if name in ("", "..") else name


def size_title(size: Size) -> str:
    """Such as 224x224, height first."""
    height, width = pair(size)
    return f"{height}x{width}"
