"""One draw of the conditional's normal approximation, in the shape of a chain's step.

    y ~ N( x + s² grad log p(x), s² I )

At y = x_tilde the recovery likelihood's quadratic term has no gradient, so that with
s = sigma_{t+1} one step from x_tilde draws N(x_tilde + sigma² grad F(x_tilde), sigma² I): the
conditional itself up to an error that vanishes with sigma (Gao et al. 2021, section 3.3). Made
for many levels (T1k). No Markov chain: a second step would draw from something else.

The same as a Langevin step of length sqrt(2) s with its noise divided by sqrt(2), and written
so.
"""

import math

from jaxtyping import Array, Float, Key

from drl_jax.mcmc import langevin
from drl_jax.mcmc.langevin import Info, State, init
from drl_jax.mcmc.log_density import LogDensityFn

__all__ = ["Info", "State", "init", "kernel"]


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: LogDensityFn,
    step_size: Float[Array, "B"],
    noise_scale: float | Float[Array, "B"] = 1.0,
) -> tuple[State, Info]:
    """Draws from every chain's normal approximation.

    Args:
      keys: one key a chain.
      state: the starts, x_tilde.
      log_density_fn: log p up to a constant, each chain's from its own example alone.
      step_size: sigma, a number a chain.
      noise_scale: multiplies the standard deviation of the draw.
    """
    root = math.sqrt(2)
    return langevin.kernel(keys, state, log_density_fn, root * step_size, noise_scale / root)
