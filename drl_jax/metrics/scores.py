"""Inception score and kernel inception distance (KID), from features of images."""

import numpy as np
from jaxtyping import Float


def inception_score(
    logits: Float[np.ndarray, "n classes"], splits: int = 10
) -> tuple[float, float]:
    """Returns the mean and standard deviation of the inception score over splits.

        exp E_x KL(p(class | x) || p(class))

    (Salimans et al. 2016). The logits are split into consecutive blocks; if there are fewer
    logits than splits, each logit is its own block. Each block estimates p(class) from its own
    logits, so the mean over several blocks is lower than the score with one split.
    """
    scores = []
    for block in np.array_split(np.asarray(logits, np.float64), min(splits, len(logits))):
        block = block - block.max(axis=1, keepdims=True)
        log_p = block - np.log(np.exp(block).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # Avoids log 0 for a class that has probability 0 in every image; p is 0 there too.
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def polynomial_kernel(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """Returns (x·y / d + 1)³ for every pair."""
    k = x @ y.T / x.shape[1] + 1
    return k * k * k  # ten times as fast as k**3 in NumPy


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy.

        E k(x, x') + E k(y, y') - 2 E k(x, y),   over pairs of different vectors

    (Gretton et al. 2012, eq. 3). For equal distributions its expected value is zero, so it can
    be negative.
    """

    def mean_of_pairs(z: Float[np.ndarray, "n d"]) -> float:
        k = polynomial_kernel(z, z)
        return (k.sum() - np.trace(k)) / (len(z) * (len(z) - 1))

    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * polynomial_kernel(x, y).mean())


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the mean and standard deviation of `squared_mmd` over random subsets.

    With Inception features this is KID (Bińkowski et al. 2018).

    Args:
      a: vectors of the first set.
      b: vectors of the second set.
      subsets: number of subsets.
      size: vectors per subset of each set, drawn without replacement; limited by the size of
        the smaller set.
      seed: random seed of the subsets.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))

    def draw(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "size d"]:
        return np.asarray(x[rng.choice(len(x), size, replace=False)], np.float64)

    distances = [squared_mmd(draw(a), draw(b)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))
