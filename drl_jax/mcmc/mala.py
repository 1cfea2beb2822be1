"""The Metropolis-adjusted Langevin algorithm (MALA).

Proposes a Langevin step y' and accepts it with probability

    min(1, p(y') q(y | y') / (p(y) q(y' | y))),   q(y' | y) = N(y + s²/2 grad log p(y), s² I)

Leaves p exactly invariant. It is implemented as Hamiltonian Monte Carlo with one leapfrog step
of size s, which is the same algorithm (Neal 2011, section 5.2).
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
    """Proposes one Langevin step per chain, and accepts or rejects it.

    Args:
      keys: one key per chain, different at every step.
      state: the chains.
      log_density_fn: log p up to a constant.
      step_size: s, one number per chain.
    """
    one = jnp.ones(step_size.shape, jnp.int32)
    return hmc.kernel(keys, state, log_density_fn, step_size, leapfrog=one)
