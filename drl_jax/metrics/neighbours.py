"""Distances to nearest neighbours: precision, recall, and closeness to the training data."""

import numpy as np
from jaxtyping import Bool, Float

ROWS = 1000  # rows per block of a matrix of distances, to limit memory


def precision_and_recall(
    samples: Float[np.ndarray, "n d"], data: Float[np.ndarray, "m d"], k: int = 3
) -> tuple[float, float]:
    """Returns precision and recall of samples (Kynkäänniemi et al. 2019, eqs. 1 and 2).

    The support of a set is the union of the balls around its vectors, each of which reaches to
    the k-th nearest other vector of the set. Precision is the share of samples in the support
    of the data; recall is the share of the data in the support of the samples.

    Args:
      samples: vectors of the samples, more than k.
      data: vectors of the data, more than k.
      k: number of neighbours in each ball.
    """
    return float(_covered(samples, data, k).mean()), float(_covered(data, samples, k).mean())


def nearest(
    x: Float[np.ndarray, "n d"], data: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n"]:
    """Returns the Euclidean distance of each x to the nearest vector of the data."""
    x, data = np.asarray(x, np.float64), np.asarray(data, np.float64)
    indices = [_squared_distances(block, data).argmin(axis=1) for block in _blocks(x)]
    # Subtracted directly, so that the distance of equal vectors is exactly zero.
    return np.linalg.norm(x - data[np.concatenate(indices)], axis=1)


def _covered(
    x: Float[np.ndarray, "n d"], data: Float[np.ndarray, "m d"], k: int
) -> Bool[np.ndarray, "n"]:
    """Returns whether each x is in the support of the data."""
    x, data = np.asarray(x, np.float64), np.asarray(data, np.float64)
    # The nearest vector of the set itself, at distance zero, does not count.
    radii = [
        np.partition(_squared_distances(block, data), k, axis=1)[:, k]
        for block in _blocks(data)
    ]
    limits = np.concatenate(radii)
    return np.concatenate(
        [np.any(_squared_distances(block, data) <= limits, axis=1) for block in _blocks(x)]
    )


def _squared_distances(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """Returns |x - y|² for every pair."""
    return np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * x @ y.T


def _blocks(x: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "_ d"]]:
    """Returns consecutive blocks of at most `ROWS` rows."""
    return [x[start : start + ROWS] for start in range(0, len(x), ROWS)]
