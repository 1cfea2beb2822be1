"""Training examples: where they are stored, how they are batched, and closed-form mixtures."""
