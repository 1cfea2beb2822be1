"""What a chain runs on: a log-density of many positions, and its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# log p, up to a constant, of every chain's position [B, ...], each from its own alone.
LogDensityFn = Callable[[Float[Array, "B *D"]], Float[Array, "B"]]


def value_and_gradient(
    log_density_fn: LogDensityFn, position: Float[Array, "B *D"]
) -> tuple[Float[Array, "B"], Float[Array, "B *D"]]:
    """Returns log p [B] and each one's gradient with respect to its own position."""
    log_p, vjp = jax.vjp(log_density_fn, position)
    return log_p, vjp(jnp.ones_like(log_p))[0]
