"""Distances between samples and data that are vectors or signals, and a two-sample test.

The distances are those of standardised features: each value of an example is divided by its
standard deviation over the data, so that values in different units count alike.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

CHUNK = 2**22  # pairs whose distances are in memory at once
BLOCK = 512  # features whose correlations with all others are in memory at once
DIRECTIONS = 200  # of the sliced Wasserstein distance
FOLDS = 5  # of the cross-validation of the classifier


def compare(
    samples: Float[np.ndarray, "n *D"], data: Float[np.ndarray, "m *D"]
) -> dict[str, Any]:
    """Returns distances between samples and data, with values to compare them with.

    Args:
      samples: examples drawn from a model.
      data: examples of the data.

    Returns:
      JSON values. Those that need more examples or features than there are, are NaN.
        sliced_wasserstein: `sliced_wasserstein`.
        energy_distance: `energy_distance`.
        c2st_accuracy: `c2st_accuracy`.
        correlation_error, largest_correlation_error: root mean square and largest absolute
          value of the error of the correlations (`correlation_errors`).
        ..._of_data_halves: each of these between two random halves of the data. A perfect
          model has about this value if both sets have half as many examples as the data.
        error_of_mean: mean of the samples minus that of the data, per feature [standard
          deviations of the data].
        error_of_std: standard deviation of the samples divided by that of the data, minus 1,
          per feature.
    """
    mean, std = _moments(data)
    x, y = (((values - mean) / std).reshape(len(values), -1) for values in (samples, data))
    order = np.random.default_rng(0).permutation(len(y))
    halves = y[order[: len(y) // 2]], y[order[len(y) // 2 :]]
    of_halves = {f"{name}_of_data_halves": value for name, value in _distances(*halves).items()}
    return {
        **_distances(x, y),
        **of_halves,
        "error_of_mean": np.mean((samples - mean) / std, axis=0).tolist(),
        "error_of_std": (np.std((samples - mean) / std, axis=0) - 1).tolist(),
    }


def _distances(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> dict[str, float]:
    """Returns all distances between two sets of standardised vectors, by name."""
    rms, largest = correlation_errors(x, y)
    return {
        "sliced_wasserstein": sliced_wasserstein(x, y),
        "energy_distance": energy_distance(x, y),
        "c2st_accuracy": c2st_accuracy(x, y),
        "correlation_error": rms,
        "largest_correlation_error": largest,
    }


def _moments(
    x: Float[np.ndarray, "n *D"],
) -> tuple[Float[np.ndarray, "*D"], Float[np.ndarray, "*D"]]:
    """Returns the mean and the standard deviation of each feature; 1 if the latter is 0."""
    x = np.asarray(x, np.float64)
    std = x.std(axis=0)
    return x.mean(axis=0), np.where(std > 0, std, 1.0)


def sliced_wasserstein(
    x: Float[np.ndarray, "n D"],
    y: Float[np.ndarray, "m D"],
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> float:
    """Returns the sliced Wasserstein-1 distance between two sets of vectors.

    It is the mean over random unit vectors u of the Wasserstein-1 distance between the
    projections uᵀx and uᵀy (Bonneel et al. 2015): the area between their distribution
    functions.

    Args:
      x: vectors.
      y: vectors; their number may differ.
      directions: number of unit vectors.
      seed: random seed of the unit vectors.
    """
    from scipy.stats import wasserstein_distance  # slow to import

    u = np.random.default_rng(seed).normal(size=(directions, x.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return float(np.mean([wasserstein_distance(x @ v, y @ v) for v in u]))


def energy_distance(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    """Returns the unbiased estimate (a U-statistic) of the squared energy distance.

        2 E|x - y| - E|x - x'| - E|y - y'|

    (Székely and Rizzo 2013), where x' and y' are other vectors of the same set. It is zero only
    for equal distributions. The estimate has the mean 0 then, so it can be negative.

    Args:
      x: vectors.
      y: vectors.

    Returns:
      the estimate; NaN if a set has fewer than two vectors.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return float("nan")
    between = _sum_of_distances(x, y) / (n * m)
    within = [_sum_of_distances(z, z) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * between - sum(within)


def _sum_of_distances(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    """Returns the sum of |x_i - y_j| over all pairs."""
    return sum(float(np.sqrt(squares).sum()) for squares in squared_distances(x, y))


def squared_distances(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]
) -> Iterator[Float[np.ndarray, "B m"]]:
    """Yields |x_i - y_j|² for some rows i and all j, in order, in at most `CHUNK` values."""
    centre = np.mean(y, axis=0, dtype=np.float64)  # so that a large mean costs no precision
    x, y = np.asarray(x, np.float64) - centre, np.asarray(y, np.float64) - centre
    squares = np.sum(y**2, axis=1)
    step = max(1, CHUNK // len(y))
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        found = np.sum(rows**2, axis=1)[:, None] + squares - 2 * rows @ y.T
        yield np.maximum(found, 0)  # rounding errors can make it negative


def c2st_accuracy(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"], seed: int = 0
) -> float:
    """Returns the accuracy of a classifier that separates two sets (Lopez-Paz and Oquab 2017).

    The classifier two-sample test: a small network learns from 4/5 of the vectors which set a
    vector is from, and the other vectors are classified, in five-fold cross-validation. For
    equal distributions the accuracy is about 1/2.

    Args:
      x: standardised vectors.
      y: vectors, standardised likewise. Of the larger set a random part as large as the other
        is used.
      seed: random seed.

    Returns:
      share of the vectors that are assigned to their set; NaN if a set has fewer vectors than
      there are folds.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    n = min(len(x), len(y))
    if n < FOLDS:
        return float("nan")
    rng = np.random.default_rng(seed)
    both = np.concatenate([z[rng.permutation(len(z))[:n]] for z in (x, y)])
    classifier = MLPClassifier((64, 64), alpha=0.1, max_iter=50, random_state=seed)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = cross_val_score(classifier, both, np.repeat([0, 1], n), cv=folds)
    return float(np.mean(scores))


def correlation_errors(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]
) -> tuple[float, float]:
    """Returns the root mean square and largest absolute difference of correlations.

    They are those of all pairs of different features. Those of a constant feature are 0.

    Args:
      x: vectors.
      y: vectors.

    Returns:
      the two numbers; NaN if there is only one feature.
    """
    D = x.shape[1]
    if D < 2:
        return float("nan"), float("nan")
    x, y = ((z - mean) / std for z in (x, y) for mean, std in [_moments(z)])
    total, largest = 0.0, 0.0
    for start in range(0, D, BLOCK):
        block = slice(start, start + BLOCK)
        error = x[:, block].T @ x / len(x) - y[:, block].T @ y / len(y)
        error[np.arange(len(error)), start + np.arange(len(error))] = 0
        total += float(np.sum(error**2))
        largest = max(largest, float(np.abs(error).max()))
    return float(np.sqrt(total / (D * (D - 1)))), largest


def two_sample_test(
    rng: np.random.Generator,
    x: Float[np.ndarray, "n *D"],
    y: Float[np.ndarray, "n *D"],
    permutations: int = 999,
    bandwidths: Sequence[float] | None = None,
) -> float:
    """Returns the p-value of the hypothesis that x and y come from the same distribution.

    The statistic is the squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y)
    (Gretton et al. 2012), which is zero only for equal distributions. The kernel k is a sum of
    Gaussian kernels, sensitive both to the width of thin structures and to how the mass is
    distributed. The p-value is the relative rank of the statistic among those of random
    partitions of all examples into two sets of n. If the distributions are equal, it is at
    most α with probability at most α, for any n.

    Args:
      rng: random number generator of the partitions.
      x: n examples.
      y: as many examples.
      permutations: number of random partitions.
      bandwidths: of the Gaussian kernels; None: a quarter, a half and all of the median
        distance between two of all examples.
    """
    n = len(x)
    both = np.concatenate([x, y]).reshape(2 * n, -1)
    squares = np.concatenate(
        [rows.astype(np.float32) for rows in squared_distances(both, both)]
    )
    if bandwidths is None:
        median = float(np.sqrt(np.median(squares)))
        bandwidths = (median / 4, median / 2, median)
    kernel = sum(np.exp(squares / np.float32(-2 * h**2)) for h in bandwidths)
    signs = np.repeat(np.array([1, -1], np.float32), n)
    partitions = np.stack([signs, *(rng.permutation(signs) for _ in range(permutations))])
    statistics = np.sum(partitions @ kernel * partitions, axis=1, dtype=np.float64)
    observed, *others = np.asarray(statistics).tolist()
    # A partition with both sets exchanged has the same statistic up to rounding errors.
    at_least = sum(other >= observed - 1e-6 * abs(observed) for other in others)
    return (1 + at_least) / (1 + permutations)
