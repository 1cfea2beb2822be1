"""Exact draws from the normal approximation of a conditional, with the interface of a kernel.

    y ~ N( x + s² grad log p(x), s² I )

At y = x_tilde, the gradient of the conditional's quadratic term is zero. One step from x_tilde
with s = sigma_{t+1} therefore draws y ~ N( x_tilde + sigma² grad F(x_tilde), sigma² I ), which
is the conditional up to an error that vanishes with sigma (Gao et al. 2021, section 3.3). It is
meant for many levels (T1k), where sigma is small. This is one draw and not a Markov chain: a
second step would not sample the conditional.

It is implemented as a Langevin step of size sqrt(2) s whose noise is divided by sqrt(2), which
is the same.
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
    """Draws from the normal approximation at every chain's position.

    Args:
      keys: one key per chain.
      state: the chains, at x_tilde.
      log_density_fn: log p up to a constant.
      step_size: s = sigma_{t+1}, one number per chain.
      noise_scale: factor on the standard deviation of the draw.
    """
    root = math.sqrt(2)
    return langevin.kernel(keys, state, log_density_fn, root * step_size, noise_scale / root)
