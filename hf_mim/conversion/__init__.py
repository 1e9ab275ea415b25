"""Checkpoints of other projects in, models of other libraries out."""

from .convert import convert
from .export import export


__all__ = ["convert", "export"]
