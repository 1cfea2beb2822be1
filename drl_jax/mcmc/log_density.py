"""The log-density that a chain samples, and its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Maps the positions of B chains to log p, up to a constant; each depends only on its own chain.
LogDensityFn = Callable[[Float[Array, "B *D"]], Float[Array, "B"]]


def value_and_gradient(
    log_density_fn: LogDensityFn, position: Float[Array, "B *D"]
) -> tuple[Float[Array, "B"], Float[Array, "B *D"]]:
    """Returns log p of every chain, and its gradient with respect to the chain's position."""
    log_p, vjp = jax.vjp(log_density_fn, position)
    return log_p, vjp(jnp.ones_like(log_p))[0]
