"""T6 on normal data, whose every marginal is known, and a Langevin sampler for it."""

import numpy as np

from drl_jax import diffusion, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import langevin
from drl_jax.sampling.ladder import Conditionals, Sampler

MEAN, VARIANCE, K = 0.4, 0.25, 8  # of the data; chain steps
SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-3
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
DATA = mixtures.gaussian(np.array([MEAN]), np.array([[VARIANCE]]))
LANGEVIN = Sampler(langevin.init, langevin.kernel, {"step_size": S}, K)


def marginal(t):
    """Mean and variance of y_t for data N(MEAN, VARIANCE)."""
    exact = mixtures.energy_marginal(DATA, t, SCHEDULE)
    return exact.means[..., 0, 0], exact.variances[..., 0, 0]


def gaussian(y, t):
    """F of the true marginals, every dimension by itself."""
    F = mixtures.exact_F(DATA, SCHEDULE)
    return sum(F(y[:, i : i + 1], t) for i in range(y.shape[1]))


CONDITIONALS = Conditionals(gaussian, SCHEDULE, LANGEVIN)
