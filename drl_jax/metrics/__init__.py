"""Metrics of trained models; README.md describes each one."""
