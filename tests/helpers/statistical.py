"""Statistical assertions with a known false-alarm rate.

A test of correct code fails with probability RATE at most. The rate is split evenly over the
test's assertions, whose number is the argument `of`, and over the numbers that each assertion
compares (Bonferroni). Each limit is the two-sided quantile at the resulting rate. Seeds are
fixed, so that a test that has passed once always passes.

A standard deviation that is 2% too large (a variance 4% too large) is detected with about
100,000 samples: it is then nine standard errors off, and the limit is five or six.
"""

import numpy as np
from scipy import stats

RATE = 1e-6  # probability of a false alarm per test


def limit(comparisons):
    """Returns the largest deviation allowed among this many comparisons [standard errors]."""
    return stats.norm.isf(RATE / (2 * comparisons))


def assert_mean(samples, mean, variance, of=1):
    """Asserts that the means of samples [n, ...] over n equal `mean`, given the variances."""
    n = len(samples)
    z = (np.mean(np.float64(samples), axis=0) - mean) / np.sqrt(variance / n)
    _assert_small("mean", z, of)


def assert_variance(samples, mean, variance, of=1):
    """Asserts that the variances of normal samples [n, ...] about a known mean are `variance`.

    n times the ratio of the sample variance to the true one has a chi-square distribution.
    """
    n = len(samples)
    squares = (np.asarray(samples, np.float64) - mean) ** 2
    ratio = np.mean(squares, axis=0) / variance
    tail = RATE / (2 * of * np.size(ratio))
    low, high = stats.chi2.ppf(tail, n) / n, stats.chi2.isf(tail, n) / n
    assert np.all((low < ratio) & (ratio < high)), (
        f"variance is {np.min(ratio):.4f} to {np.max(ratio):.4f} times the expected one; "
        f"{low:.4f} to {high:.4f} is allowed"
    )


def assert_covariance(a, b, covariance, variance_a, variance_b, of=1):
    """Asserts that the covariances of centred normal samples a, b [n, ...] are `covariance`."""
    n = len(a)
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    spread = np.sqrt((variance_a * variance_b + covariance**2) / n)
    _assert_small("covariance", (np.mean(product, axis=0) - covariance) / spread, of)


def assert_counts(counts, probabilities, of=1):
    """Asserts that counts in the cells [C] of a partition follow the probabilities.

    Pearson's chi-square test; cells with fewer than 20 expected samples are merged.
    """
    n = np.sum(counts)
    small = n * probabilities < 20
    counts, expected = (
        np.append(v[~small], np.sum(v[small])) for v in (np.float64(counts), n * probabilities)
    )
    if expected[-1] < 20:  # the merged cell is still too small: merge it into the largest
        largest = np.argmax(expected)
        counts[largest] += counts[-1]
        expected[largest] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    statistic = np.sum((counts - expected) ** 2 / expected)
    allowed = stats.chi2.isf(RATE / of, len(counts) - 1)
    assert statistic < allowed, (
        f"chi-square is {statistic:.1f} for {len(counts)} cells; {allowed:.1f} is allowed"
    )


def _assert_small(name, z, of):
    allowed, worst = limit(of * np.size(z)), np.max(np.abs(z))
    assert worst < allowed, (
        f"{name} is off by {worst:.1f} standard errors; {allowed:.1f} is allowed"
    )
