"""Statistical assertions with a stated false-alarm rate.

A test of correct code fails with probability RATE at most, whatever it compares: the rate is
split evenly over its assertions (`of`: how many there are) and over the numbers each compares
(Bonferroni), and the limit is the two-sided quantile of what is left. Seeds are fixed, so a
test that passes once passes always.

To tell a standard deviation 2% too large, a variance 4% too large, from noise takes some
100,000 samples: it then lies nine standard errors off, the limit five or six.
"""

import numpy as np
from scipy import stats

RATE = 1e-6


def limit(comparisons):
    """Standard errors that the worst of so many comparisons may be off."""
    return stats.norm.isf(RATE / (2 * comparisons))


def assert_mean(samples, mean, variance, of=1):
    """Column means of samples [n, ...] agree with `mean`, given each one's variance."""
    n = len(samples)
    z = (np.mean(np.float64(samples), axis=0) - mean) / np.sqrt(variance / n)
    _assert_small("mean", z, of)


def assert_variance(samples, mean, variance, of=1):
    """Column variances of normal samples [n, ...] about a known mean agree with `variance`.

    n times the ratio of the two is chi-square, exactly.
    """
    n = len(samples)
    squares = (np.asarray(samples, np.float64) - mean) ** 2
    ratio = np.mean(squares, axis=0) / variance
    tail = RATE / (2 * of * np.size(ratio))
    low, high = stats.chi2.ppf(tail, n) / n, stats.chi2.isf(tail, n) / n
    assert np.all((low < ratio) & (ratio < high)), (
        f"variance {np.min(ratio):.4f} to {np.max(ratio):.4f} times what it should be, "
        f"not {low:.4f} to {high:.4f}"
    )


def assert_covariance(a, b, covariance, variance_a, variance_b, of=1):
    """Covariances of centred normal samples a, b [n, ...] agree with `covariance`."""
    n = len(a)
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    spread = np.sqrt((variance_a * variance_b + covariance**2) / n)
    _assert_small("covariance", (np.mean(product, axis=0) - covariance) / spread, of)


def assert_counts(counts, probabilities, of=1):
    """Counts of n samples in the cells [C] of a partition agree with its probabilities.

    Pearson's chi-square; cells where fewer than 20 are expected are counted as one.
    """
    n = np.sum(counts)
    few = n * probabilities < 20
    counts, expected = (
        np.append(v[~few], np.sum(v[few])) for v in (np.float64(counts), n * probabilities)
    )
    if expected[-1] < 20:  # still too few for a chi-square: into the largest
        largest = np.argmax(expected)
        counts[largest] += counts[-1]
        expected[largest] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    found = np.sum((counts - expected) ** 2 / expected)
    allowed = stats.chi2.isf(RATE / of, len(counts) - 1)
    assert found < allowed, f"chi-square {found:.1f} in {len(counts)} cells, not {allowed:.1f}"


def _assert_small(what, z, of):
    allowed, worst = limit(of * np.size(z)), np.max(np.abs(z))
    assert worst < allowed, f"{what} off by {worst:.1f} standard errors, not {allowed:.1f}"
