"""Sampling from the levels' conditionals: generation, long chains, annealing, image editing."""
