"""Weights that others saved, under our names: a file or a folder of theirs in, a config and a state dict out."""
