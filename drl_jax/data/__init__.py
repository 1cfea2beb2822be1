"""Training data: sources of examples, their batches, and data whose density is known."""
