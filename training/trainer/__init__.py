"""`MIMTrainer` and everything that belongs to a run that trains."""
