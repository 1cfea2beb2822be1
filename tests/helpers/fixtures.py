"""Paths of the numbers computed by other programs, and how to compare with them."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "fixtures"
ORIGINAL = FOLDER / "original_t6_32px"  # by the authors' TensorFlow program
CDRL = FOLDER / "cdrl_unconditional"  # by the authors' PyTorch program
CDRL_LABELS = FOLDER / "cdrl_conditional"  # likewise, for images of 4 classes
INCEPTION = FOLDER / "inception_random"  # by torch-fidelity


def assert_close(ours, theirs, rtol):
    """Asserts that the largest difference is small relative to the largest value."""
    assert ours.shape == theirs.shape
    error = np.max(np.abs(np.float64(ours) - theirs)) / np.max(np.abs(theirs))
    assert error < rtol, f"relative error {error:.1e}"
