"""Compiles the programs of a job for accelerators that this machine does not have."""
