"""Files that outlive a run: writing whole, journal, checkpoints, adapters, the model zoo."""
