"""Training: batches, the run and its optimizer, ranks, sharding, the memory estimate."""
