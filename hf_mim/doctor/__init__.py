"""Known faults of a checkpoint. Import from the file: `checks.doctor`, `checks.examine`."""
