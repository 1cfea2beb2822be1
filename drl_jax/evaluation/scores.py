"""The inception score and the kernel distance, of what a classifier makes of images."""

import numpy as np
from jaxtyping import Float


def inception_score(
    logits: Float[np.ndarray, "n classes"], splits: int = 10
) -> tuple[float, float]:
    """Returns the mean and the standard deviation over splits of the inception score.

        exp E_x KL(p(class | x) || p(class))

    (Salimans et al. 2016.) The splits are of neighbours, in the order given; of fewer
    logits than splits, each is one.
    """
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), min(splits, len(logits))):
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # The least float stands in where no image has any of a class: p is 0 there, too.
        log_mean = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def kernel(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    """Returns (x·y / d + 1)³ for every pair."""
    k = x @ y.T / x.shape[1] + 1
    return k * k * k  # numpy's power takes ten times as long


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy.

        E k(x, x') + E k(y, y') - 2 E k(x, y),   x and x' two of the vectors, never one twice

    (Gretton et al. 2012, eq. 3.) About zero for equal distributions, also below it.
    """

    def mean_of_others(z: Float[np.ndarray, "n d"]) -> float:
        k = kernel(z, z)
        return (k.sum() - np.trace(k)) / (len(z) * (len(z) - 1))

    return float(mean_of_others(x) + mean_of_others(y) - 2 * kernel(x, y).mean())


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the mean and the standard deviation over subsets of `squared_mmd`.

    (Bińkowski et al. 2018.) Each subset is `size` vectors of either, or as many as the
    smaller has, drawn without replacement.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))

    def draw(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "size d"]:
        return np.asarray(x[rng.choice(len(x), size, replace=False)], np.float64)

    distances = [squared_mmd(draw(a), draw(b)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))
