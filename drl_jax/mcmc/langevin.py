"""Unadjusted Langevin dynamics.

    y <- y + s²/2 grad log p(y) + s z,   z ~ N(0, I)

Leaves p invariant up to a bias that vanishes with the step size s (Gao et al. 2021,
eq. 12; Neal 2011, section 5.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from drl_jax import noise


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
    """

    log_density: Float[Array, "B"]
    gradient: Float[Array, "B *D"]


def init(position: Float[Array, "B *D"]) -> State:
    """Starts one chain at each example."""
    return State(position)


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: Callable[[Float[Array, "B *D"]], Float[Array, "B"]],
    step_size: Float[Array, "B"],
    noise_scale: float | Float[Array, ""] = 1.0,
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
    log_p, vjp = jax.vjp(log_density_fn, y)
    (gradient,) = vjp(jnp.ones_like(log_p))
    s = noise.per_example(step_size, y)
    y = y + s**2 / 2 * gradient + s * noise_scale * noise.normal(keys, y.shape[1:])
    return State(y), Info(log_p, gradient)
