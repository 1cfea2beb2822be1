"""Models whose energy is the exact log-density of a mixture of Gaussians."""

import jax.numpy as jnp

from drl_jax import diffusion, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler


def model(data, T, log_Z=0.0, mesh=None, shape=None):
    """Returns the model whose log-density at every level is the exact one plus a constant.

    Args:
      data: mixture, the distribution of the data.
      T: number of levels.
      log_Z: the constant, which is then log Z of every level [nats].
      mesh: devices; by default all.
      shape: shape of one example; by default that of a point of the mixture.
    """
    schedule = diffusion.schedule(T)
    F = mixtures.exact_F(data, schedule)
    energy = Energy(
        init=lambda key: ({}, {}),
        normalise=lambda params, vectors: (params, vectors),
        f=lambda params, x, t: F(x.reshape(len(x), -1), t) + log_Z,
        shape=shape or data.means.shape[-1:],
    )
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": jnp.ones(T)}, 1)
    parameterisation = Parameterisation(jnp.ones(T), recovery.no_reference)
    method = Method(energy, schedule, parameterisation, sampler)
    return Model.create(method, {}, mesh or sharding.make_mesh())
