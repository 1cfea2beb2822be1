"""Unadjusted Langevin dynamics.

    y <- y + s²/2 grad log p(y) + s z,   z ~ N(0, I)

Leaves p invariant up to a bias that vanishes with the step size s (Gao et al. 2021,
eq. 12; Neal 2011, section 5.2).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from drl_jax import noise
from drl_jax.mcmc.log_density import LogDensityFn, value_and_gradient


class State(NamedTuple):
    """Where the chains are.

    Attributes:
      position: y, one example a chain.
    """

    position: Float[Array, "B *D"]


class Info(NamedTuple):
    """What a step met on its way.

    Attributes:
      log_density: log p(y) before the step, up to a constant.
      gradient: its gradient there.
      acceptance: 1, since no step is refused.
    """

    log_density: Float[Array, "B"]
    gradient: Float[Array, "B *D"]
    acceptance: Float[Array, "B"]


def init(position: Float[Array, "B *D"], log_density_fn: LogDensityFn) -> State:
    """Starts one chain at each example; the log-density is not needed for that."""
    del log_density_fn
    return State(position)


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: LogDensityFn,
    step_size: Float[Array, "B"],
    noise_scale: float | Float[Array, "B"] = 1.0,
) -> tuple[State, Info]:
    """Makes one Langevin step of every chain.

    Args:
      keys: one key a chain, new at every step.
      state: the chains.
      log_density_fn: log p up to a constant, each chain's from its own example alone.
      step_size: s, a number a chain.
      noise_scale: multiplies z; below 1 samples a sharper density, 0 climbs the gradient.
    """
    y = state.position
    log_p, gradient = value_and_gradient(log_density_fn, y)
    s = noise.per_example(step_size, y)
    z = noise.normal(keys, y.shape[1:])
    y = y + s**2 / 2 * gradient + noise.per_example(step_size * noise_scale, y) * z
    return State(y), Info(log_p, gradient, jnp.ones_like(log_p))
