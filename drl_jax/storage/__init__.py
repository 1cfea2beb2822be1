"""Reads and writes files: checkpoints, trained models, unfinished work."""
