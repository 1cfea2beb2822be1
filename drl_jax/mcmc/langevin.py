"""Unadjusted Langevin dynamics.

    y <- y + s²/2 grad log p(y) + s z,   z ~ N(0, I)

The stationary distribution is p up to a bias that vanishes with the step size s (Gao et al.
2021, eq. 12; Neal 2011, section 5.2).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from drl_jax import noise
from drl_jax.mcmc.log_density import LogDensityFn, value_and_gradient


class State(NamedTuple):
    """State of the chains.

    Attributes:
      position: y, one example per chain.
    """

    position: Float[Array, "B *D"]


class Info(NamedTuple):
    """Information about a step.

    Attributes:
      log_density: log p(y) before the step, up to a constant.
      gradient: grad log p(y) before the step.
      acceptance: 1, since every step is accepted.
    """

    log_density: Float[Array, "B"]
    gradient: Float[Array, "B *D"]
    acceptance: Float[Array, "B"]


def init(position: Float[Array, "B *D"], log_density_fn: LogDensityFn) -> State:
    """Starts one chain at each position; the log-density is not evaluated."""
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
      keys: one key per chain, different at every step.
      state: the chains.
      log_density_fn: log p up to a constant.
      step_size: s, one number per chain.
      noise_scale: factor of z. Below 1, the chain samples a sharper density than p; with 0, it
        is gradient ascent.
    """
    y = state.position
    log_p, gradient = value_and_gradient(log_density_fn, y)
    s = noise.per_example(step_size, y)
    z = noise.normal(keys, y.shape[1:])
    y = y + s**2 / 2 * gradient + noise.per_example(step_size * noise_scale, y) * z
    return State(y), Info(log_p, gradient, jnp.ones_like(log_p))
