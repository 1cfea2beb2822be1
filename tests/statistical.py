"""Statistical assertions with a stated false-alarm rate.

A sample moment of correct code misses by more than Z standard errors with probability
4e-8 (two-sided normal tail); seeds are fixed, so a test that passes once passes always.
"""

import numpy as np

Z = 5.5


def assert_mean(samples, mean, variance):
    """Column means of samples [n, ...] agree with `mean`, given each one's variance."""
    n = len(samples)
    z = (np.mean(np.float64(samples), axis=0) - mean) / np.sqrt(variance / n)
    assert np.max(np.abs(z)) < Z, f"mean off by {np.max(np.abs(z)):.1f} standard errors"


def assert_variance(samples, mean, variance):
    """Column variances of normal samples [n, ...] about a known mean agree with `variance`."""
    n = len(samples)
    squares = (np.asarray(samples, np.float64) - mean) ** 2
    z = (np.mean(squares, axis=0) / variance - 1) / np.sqrt(2 / n)
    assert np.max(np.abs(z)) < Z, f"variance off by {np.max(np.abs(z)):.1f} standard errors"


def assert_covariance(a, b, covariance, variance_a, variance_b):
    """Covariances of centred normal samples a, b [n, ...] agree with `covariance`."""
    n = len(a)
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    spread = np.sqrt((variance_a * variance_b + covariance**2) / n)
    z = (np.mean(product, axis=0) - covariance) / spread
    assert np.max(np.abs(z)) < Z, f"covariance off by {np.max(np.abs(z)):.1f} standard errors"
