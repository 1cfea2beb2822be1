"""Have chains converged, and how many independent draws are theirs worth?

Split R-hat compares the variance between half chains with that within them: near 1 when all
have forgotten where they began (Gelman et al. 2013, section 11.4). The effective sample size
is that of independent draws whose mean would be known as well (ibid., section 11.5). Both as
in ArviZ (Vehtari et al. 2021), without its ranks: a mean is what they are about.
"""

from typing import NamedTuple

import numpy as np
from arviz_stats.base import array_stats
from jaxtyping import Float, Int

FEWEST = 4  # draws a chain for which ArviZ gives numbers


class Convergence(NamedTuple):
    """Of chains on several distributions, each traced in several scalars.

    The worst scalar speaks for a distribution.

    Attributes:
      r_hat: median over the distributions.
      r_hat_worst: the greatest.
      effective_sample_size: of all chains together.
      draws: of all chains together, which it cannot exceed by much.
    """

    r_hat: float
    r_hat_worst: float
    effective_sample_size: float
    draws: int


def convergence(
    draws: Float[np.ndarray, "B n S"], distribution: Int[np.ndarray, "B"]
) -> Convergence | None:
    """Compares the chains of each distribution with each other.

    Args:
      draws: S scalars of B chains at n equidistant steps, warm-up left out.
      distribution: number of the distribution that each chain samples; two or more share it.

    Returns:
      the diagnostics, infinite R-hats and no draws for chains that never move, or None
      while there are too few draws.
    """
    if draws.shape[1] < FEWEST:
        return None
    r_hats, sizes = [], []
    for number in np.unique(distribution):
        group = np.asarray(draws[distribution == number], np.float64)
        axes = {"chain_axis": 0, "draw_axis": 1}
        moves = np.ptp(group, axis=1).max(axis=0) > 0
        if not moves.all():
            r_hats.append(np.inf)
            sizes.append(0.0)
            continue
        r_hats.append(np.max(array_stats.rhat(group, method="split", **axes)))
        sizes.append(np.min(array_stats.ess(group, method="mean", **axes)))
    return Convergence(
        float(np.median(r_hats)),
        float(np.max(r_hats)),
        float(np.sum(sizes)),
        draws[..., 0].size,
    )
