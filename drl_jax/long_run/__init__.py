"""Chains that go on for thousands of steps.

`chains` is the pure part: how they advance, and what is kept of them. `diagnostics` says
whether they have converged, `watch` takes them from their start to their end through every
interruption, and `report` writes what was seen.
"""
