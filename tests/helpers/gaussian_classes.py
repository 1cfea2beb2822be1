"""A model with labels in closed form: the energy of each label is a Gaussian."""

import jax.numpy as jnp
import numpy as np

from drl_jax import diffusion, recovery
from drl_jax.mcmc import hmc
from drl_jax.method import Method
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler

MEANS = np.array([0.0, -1.0, 0.5, 2.0])  # of y at every level, by label
VARIANCES = np.array([4.0, 0.5, 1.0, 0.25])
LOG_Z = np.array([0.0, 3.0, -40.0, 1.0])  # by label
SCHEDULE = diffusion.schedule(6)
DIMENSION = 2


def f(params, x, t, keys=None, label=None):
    """Returns the log-density of N(mean, variance) of the label, plus its log Z."""
    label = jnp.zeros_like(t) if label is None else label
    mean, variance = jnp.asarray(MEANS)[label], jnp.asarray(VARIANCES)[label]
    quadratic = jnp.sum(jnp.square(x - mean[:, None]), axis=1) / (2 * variance)
    normaliser = DIMENSION * jnp.log(2 * jnp.pi * variance) / 2
    return jnp.asarray(LOG_Z)[label] - quadratic - normaliser


def model(leapfrog=3):
    """Returns a model whose energy of each label is a Gaussian, the same at all levels."""
    energy = Energy(
        init=lambda key: ({}, {}),
        normalise=lambda params, vectors: (params, vectors),
        f=f,
        shape=(DIMENSION,),
        classes=3,
    )
    tuning = {"step_size": jnp.full(6, 0.3), "leapfrog": jnp.full(6, leapfrog)}
    sampler = Sampler(hmc.init, hmc.kernel, tuning, 20)
    parameterisation = Parameterisation(jnp.ones(6), recovery.no_reference)
    method = Method(energy, SCHEDULE, parameterisation, sampler)
    return Model.create(method, {}, sharding.make_mesh(), batch_size=8192)
