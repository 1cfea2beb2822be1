"""Convergence diagnostics of Markov chains: R-hat, effective sample size, autocorrelation.

Split R-hat compares the variance between half-chains with the variance within them; it is close
to 1 when all chains have forgotten their starting points (Gelman et al. 2013, section 11.4).
The effective sample size is the number of independent draws that would determine the mean as
precisely (ibid., section 11.5). Both are computed by ArviZ (Vehtari et al. 2021). Its rank
normalisation is turned off, because the quantity of interest is the mean.
"""

from typing import NamedTuple

import numpy as np
from arviz_stats.base import array_stats
from jaxtyping import Float, Int

MIN_DRAWS = 4  # minimum number of draws per chain for which ArviZ gives a result
FORGOTTEN = 0.1  # autocorrelation below which a chain counts as independent of its start


class Convergence(NamedTuple):
    """Diagnostics of chains that sample several distributions.

    Every draw is recorded as several scalars. R-hat of a distribution is the largest, and its
    effective sample size the smallest, over these scalars.

    Attributes:
      r_hat: median of R-hat over the distributions.
      r_hat_worst: maximum of R-hat over the distributions.
      effective_sample_size: sum of the effective sample sizes of the distributions.
      draws: number of draws of all chains, which the effective sample size hardly exceeds.
    """

    r_hat: float
    r_hat_worst: float
    effective_sample_size: float
    draws: int


def convergence(
    draws: Float[np.ndarray, "B n S"], distribution: Int[np.ndarray, "B"]
) -> Convergence | None:
    """Returns the diagnostics, which compare chains that sample the same distribution.

    Args:
      draws: S scalars of B chains at n equally spaced steps, warm-up excluded.
      distribution: index of the distribution that each chain samples; at least two chains
        share each distribution.

    Returns:
      The diagnostics, or None if there are fewer than `MIN_DRAWS` draws per chain. If a scalar
      never changes in any chain of a distribution, its R-hat is infinite and its effective
      sample size is 0.
    """
    if draws.shape[1] < MIN_DRAWS:
        return None
    r_hats, sizes = [], []
    for index in np.unique(distribution):
        group = np.asarray(draws[distribution == index], np.float64)
        axes = {"chain_axis": 0, "draw_axis": 1}
        changes = np.ptp(group, axis=1).max(axis=0) > 0
        if not changes.all():
            r_hats.append(np.inf)
            sizes.append(0.0)
            continue
        r_hats.append(np.max(array_stats.rhat(group, method="split", **axes)))
        sizes.append(np.min(array_stats.ess(group, method="mean", **axes)))
    return Convergence(
        r_hat=float(np.median(r_hats)),
        r_hat_worst=float(np.max(r_hats)),
        effective_sample_size=float(np.sum(sizes)),
        draws=draws[..., 0].size,
    )


class Mixing(NamedTuple):
    """How well chains that sample several distributions mix between classes.

    Attributes:
      label_r_hat: median over the distributions of split R-hat of the class. Both variances are
        sums over the indicators of the classes, so that its square is close to the probability
        that two draws of any half-chains have different classes, divided by that for two draws
        of the same half-chain. It is infinite if no class changes within a half-chain and yet
        the classes differ, and 1 if all draws have the same class. Rank normalisation would not
        change an indicator, which has only two values.
      label_changes: mean number of changes of the class per chain.
    """

    label_r_hat: float
    label_changes: float


def mixing(
    labels: Float[np.ndarray, "B n"], distribution: Int[np.ndarray, "B"]
) -> Mixing | None:
    """Returns how well chains that sample the same distribution mix between classes.

    Args:
      labels: class of every draw, for B chains at n equally spaced steps, warm-up excluded.
      distribution: index of the distribution that each chain samples; at least two chains
        share each distribution.

    Returns:
      None if there are fewer than `MIN_DRAWS` draws per chain.
    """
    if labels.shape[1] < MIN_DRAWS:
        return None
    r_hats = [_label_r_hat(labels[distribution == i]) for i in np.unique(distribution)]
    return Mixing(
        label_r_hat=float(np.median(r_hats)),
        label_changes=float(np.mean(np.sum(labels[:, 1:] != labels[:, :-1], axis=1))),
    )


def _label_r_hat(labels: Float[np.ndarray, "B n"]) -> float:
    """Returns split R-hat of the class of chains on one distribution; see `Mixing`."""
    n = labels.shape[1] // 2  # draws per half-chain; an odd first draw is left out
    halves = labels[:, labels.shape[1] % 2 :].reshape(2 * len(labels), n)
    classes = np.unique(halves)
    if len(classes) == 1:
        return 1.0
    shares = np.stack([np.mean(halves == c, axis=1) for c in classes])
    within = np.sum(np.mean(shares * (1 - shares), axis=1)) * n / (n - 1)
    between = np.sum(np.var(shares, axis=1, ddof=1))
    with np.errstate(divide="ignore"):
        return float(np.sqrt((n - 1) / n + between / within))


def draws_to_forget(
    draws: Float[np.ndarray, "B n S"], distribution: Int[np.ndarray, "B"]
) -> int | None:
    """Returns the smallest lag at which the autocorrelation is below `FORGOTTEN`.

    The autocorrelation is that of all scalars together, each weighted by its variance. A scalar
    is measured from its mean over all chains that sample the same distribution: so chains that
    stay in different modes never forget where they started.

    Args:
      draws: S scalars of B chains at n equally spaced steps, warm-up excluded.
      distribution: index of the distribution that each chain samples.

    Returns:
      The lag [draws], or None if there is none among the first n / 2, beyond which there are
      too few pairs of draws, or there are fewer than `MIN_DRAWS` draws per chain.
    """
    if draws.shape[1] < MIN_DRAWS:
        return None
    x = np.array(draws, np.float64)
    for index in np.unique(distribution):
        x[distribution == index] -= np.mean(x[distribution == index], axis=(0, 1))
    n = x.shape[1]
    for lag in range(1, n // 2 + 1):
        covariance = np.mean(x[:, lag:] * x[:, :-lag])
        if covariance < FORGOTTEN * np.mean(np.square(x)):
            return lag
    return None
