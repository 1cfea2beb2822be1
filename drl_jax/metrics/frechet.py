"""Fréchet distance between normal distributions fitted to two sets of vectors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from drl_jax.errors import UserError

# Rounding errors of float64 can make eigenvalues of a covariance negative, by about 1e-13 times
# the largest eigenvalue. One below -TOLERANCE times the largest has another cause.
TOLERANCE = 1e-10


class Normal(NamedTuple):
    """A normal distribution, with its covariance as a matrix root.

    Attributes:
      mean: mean vector.
      root: matrix R such that RᵀR is the covariance.
    """

    mean: Float[np.ndarray, "d"]
    root: Float[np.ndarray, "r d"]


class Moments(NamedTuple):
    """Moments of a set of vectors in float64, which `merge` accumulates batch by batch.

    Attributes:
      n: number of vectors.
      mean: their mean.
      scatter: sum of (x - mean)(x - mean)ᵀ over the vectors.
    """

    n: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]


def frechet_distance(a: Normal, b: Normal) -> float:
    """Returns the squared Fréchet distance between two normal distributions.

        |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

    (Heusel et al. 2017, eq. 6). With S = RᵀR, the trace of the square root is the sum of the
    singular values of R_a R_bᵀ, which avoids the square root of a matrix that is not symmetric.
    """
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    variances = np.sum(a.root**2) + np.sum(b.root**2)
    return float(np.sum((a.mean - b.mean) ** 2) + variances - 2 * cross)


def fit(x: Float[np.ndarray, "n d"]) -> Normal:
    """Returns the normal distribution with the mean and unbiased covariance of n vectors.

    Uses a QR decomposition in float64, so no d x d matrix is formed if n < d.
    """
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    root = np.asarray(np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r"))
    return Normal(mean, root)


def split_half_distance(x: Float[np.ndarray, "n d"], seed: int = 0) -> float:
    """Returns the Fréchet distance between two random halves of x.

    This is what samples of equal distributions give, since it is not zero for finite samples.
    """
    order = np.random.default_rng(seed).permutation(len(x))
    half = len(x) // 2
    return frechet_distance(fit(x[order[:half]]), fit(x[order[half:]]))


def zero_moments(d: int) -> Moments:
    """Returns the moments of an empty set of vectors with d dimensions."""
    return Moments(0, np.zeros(d), np.zeros((d, d)))


def batch_moments(x: Float[np.ndarray, "n d"]) -> Moments:
    """Returns the moments of one batch of vectors."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets (Chan et al. 1979).

    No large numbers are subtracted from each other, so the order in which batches are merged
    changes only the last digits.
    """
    n = a.n + b.n
    difference = b.mean - a.mean
    scatter = a.scatter + b.scatter + a.n * b.n / n * np.outer(difference, difference)
    return Moments(n, a.mean + b.n / n * difference, scatter)


def covariance(moments: Moments) -> Float[np.ndarray, "d d"]:
    """Returns the unbiased covariance of at least two vectors."""
    return moments.scatter / (moments.n - 1)


def to_normal(moments: Moments) -> Normal:
    """Returns the normal distribution with these moments.

    The root of the covariance S = V diag(w) Vᵀ is diag(w)^{1/2} Vᵀ. Eigenvalues between
    -`TOLERANCE` times the largest and zero are rounding errors and are set to zero.

    Raises:
      UserError: if there are fewer than two vectors, for which no covariance exists.
      ValueError: if an eigenvalue is below the tolerance, so the matrix is not a covariance.
    """
    if moments.n < 2:
        raise UserError(
            f"the number of images is {moments.n}: a Fréchet distance needs at least 2"
        )
    w, v = np.linalg.eigh(covariance(moments))
    if w[0] < -TOLERANCE * w[-1]:
        raise ValueError(
            f"not a covariance matrix: its eigenvalues lie between {w[0]:.3g} and {w[-1]:.3g}"
        )
    return Normal(moments.mean, np.sqrt(np.maximum(w, 0))[:, None] * v.T)
