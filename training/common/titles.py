"""What things are called in lines and tables."""

from pathlib import Path


def name_of(source: str) -> str:
    """What to call a checkpoint: the last part of its path or id."""
    name = Path(source).name
    return Path(source).resolve().name if name in ("", "..") else name
