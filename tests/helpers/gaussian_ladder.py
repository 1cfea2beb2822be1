"""The six levels of T6 for normal data, with the exact F, and a Langevin sampler for them."""

import numpy as np

from drl_jax import diffusion, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import langevin
from drl_jax.sampling.ladder import Conditionals, Sampler

MEAN, VARIANCE = 0.4, 0.25  # of the data
K = 8  # Langevin steps per level
SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-3
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
DATA = mixtures.gaussian(np.array([MEAN]), np.array([[VARIANCE]]))
LANGEVIN = Sampler(langevin.init, langevin.kernel, {"step_size": S}, K)


def marginal_moments(t):
    """Returns the mean and variance of y_t."""
    exact = mixtures.energy_marginal(DATA, t, SCHEDULE)
    return exact.means[..., 0, 0], exact.variances[..., 0, 0]


def exact_F(y, t):
    """Returns the log-density of y [B, D], whose coordinates are independent copies of y_t."""
    F = mixtures.exact_F(DATA, SCHEDULE)
    return sum(F(y[:, i : i + 1], t) for i in range(y.shape[1]))


CONDITIONALS = Conditionals(exact_F, SCHEDULE, LANGEVIN)
