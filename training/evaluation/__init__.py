"""Frozen features, and what is read from them: heads, scores, protocols."""
