"""Known faults of a checkpoint."""
