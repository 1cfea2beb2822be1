"""Processes, devices, shardings, batches, signals and progress of a run."""
