"""Every picture that a run leaves."""
