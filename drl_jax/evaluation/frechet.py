"""The Fréchet distance between normal distributions fitted to vectors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from drl_jax.errors import UserError

# A covariance that was computed in float64 has, for rounding alone, eigenvalues down to
# about -1e-13 of the greatest. Anything below this much of it is no rounding.
TOLERANCE = 1e-10


class Normal(NamedTuple):
    """A normal distribution.

    Attributes:
      mean: of the vectors.
      root: an R with RᵀR the covariance.
    """

    mean: Float[np.ndarray, "d"]
    root: Float[np.ndarray, "r d"]


class Moments(NamedTuple):
    """The moments of vectors that may have come a batch at a time, in float64.

    Attributes:
      n: number of vectors.
      mean: of them.
      scatter: sum of (x - mean)(x - mean)ᵀ.
    """

    n: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]


def frechet_distance(a: Normal, b: Normal) -> float:
    """Returns the squared Fréchet distance of two normal distributions.

        |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

    (Heusel et al. 2017, eq. 6.) With S = RᵀR, the trace of the root is the sum of the
    singular values of R_a R_bᵀ: no root of a product, which is not symmetric.
    """
    cross = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    variances = np.sum(a.root**2) + np.sum(b.root**2)
    return float(np.sum((a.mean - b.mean) ** 2) + variances - 2 * cross)


def fit(x: Float[np.ndarray, "n d"]) -> Normal:
    """Returns the normal distribution of vectors at hand, its covariance unbiased.

    By QR in float64: no d x d matrix where there are fewer vectors than dimensions.
    """
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    root = np.asarray(np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r"))
    return Normal(mean, root)


def split_half_distance(x: Float[np.ndarray, "n d"], seed: int = 0) -> float:
    """Returns the Fréchet distance of two random halves: what equal distributions give."""
    order = np.random.default_rng(seed).permutation(len(x))
    half = len(x) // 2
    return frechet_distance(fit(x[order[:half]]), fit(x[order[half:]]))


def no_moments(d: int) -> Moments:
    """Returns the moments of no vectors of d dimensions, to merge others into."""
    return Moments(0, np.zeros(d), np.zeros((d, d)))


def moments(x: Float[np.ndarray, "n d"]) -> Moments:
    """Returns the moments of one batch of vectors."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the vectors of both (Chan et al. 1979).

    Nothing large is subtracted from anything large, so the order of merging shows in the
    last digits alone.
    """
    n = a.n + b.n
    apart = b.mean - a.mean
    scatter = a.scatter + b.scatter + a.n * b.n / n * np.outer(apart, apart)
    return Moments(n, a.mean + b.n / n * apart, scatter)


def covariance(of: Moments) -> Float[np.ndarray, "d d"]:
    """Returns the unbiased covariance."""
    return of.scatter / (of.n - 1)


def normal(of: Moments) -> Normal:
    """Returns the normal distribution with these moments, its root by eigenvalues.

    With S = V diag(w) Vᵀ the root is diag(w)^{1/2} Vᵀ. An eigenvalue between -`TOLERANCE`
    times the greatest and zero is taken for a zero that was rounded.

    Raises:
      UserError: of fewer than two vectors, which have no covariance.
      ValueError: if an eigenvalue is less than that: the matrix is no covariance.
    """
    if of.n < 2:
        raise UserError(f"a Fréchet distance needs two images or more, not {of.n}")
    w, v = np.linalg.eigh(covariance(of))
    if w[0] < -TOLERANCE * w[-1]:
        raise ValueError(f"a covariance with eigenvalues from {w[0]:.3g} to {w[-1]:.3g}")
    return Normal(of.mean, np.sqrt(np.maximum(w, 0))[:, None] * v.T)
