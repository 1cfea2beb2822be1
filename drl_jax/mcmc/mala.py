"""The Metropolis-adjusted Langevin algorithm.

Proposes a Langevin step and accepts it with probability

    min(1, p(y') q(y | y') / (p(y) q(y' | y))),   q(y' | y) = N(y + s²/2 grad log p(y), s² I)

which leaves p invariant exactly. The same as Hamiltonian Monte Carlo with one leapfrog step
of length s (Neal 2011, section 5.2), and written so.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from drl_jax.mcmc import hmc
from drl_jax.mcmc.hmc import Info, State, init
from drl_jax.mcmc.log_density import LogDensityFn

__all__ = ["Info", "State", "init", "kernel"]


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: LogDensityFn,
    step_size: Float[Array, "B"],
) -> tuple[State, Info]:
    """Proposes one Langevin step for every chain, and accepts or refuses it.

    Args:
      keys: one key a chain, new at every step.
      state: the chains.
      log_density_fn: log p up to a constant, each chain's from its own example alone.
      step_size: s, a number a chain.
    """
    one = jnp.ones(step_size.shape, jnp.int32)
    return hmc.kernel(keys, state, log_density_fn, step_size, one)
