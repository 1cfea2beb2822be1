"""Sampling from the conditionals, one level or the whole ladder.

Generation (Gao et al. 2021, algorithm 2) starts from white noise x_T and, level by level,
runs the chain for p(y | x_{t+1}) and sets x_t = y / a_{t+1}.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc import langevin
from drl_jax.recovery import LevelFn


def sample_conditional(
    keys: Key[Array, "B"],
    f: LevelFn,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    s: Float[Array, "T"],
    K: int,
    noise_scale: float = 1.0,
) -> Float[Array, "B *D"]:
    """Runs K Langevin steps on p(y | x_tilde) from y = x_tilde and returns the last y."""

    def log_density_fn(y):
        return recovery.conditional_log_density(f, y, x_tilde, t, schedule, s)

    def step(state, k):
        state, _ = langevin.kernel(
            noise.fold(keys, k), state, log_density_fn, s[t], noise_scale
        )
        return state, None

    state, _ = jax.lax.scan(step, langevin.init(x_tilde), jnp.arange(K))
    return state.position


def generate(
    keys: Key[Array, "B"],
    f: LevelFn,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    s: Float[Array, "T"],
    K: int,
    noise_scale: float = 1.0,
) -> tuple[Float[Array, "B *D"], Float[Array, "T B *D"]]:
    """Draws one sample of data a key, in one compiled scan over the levels.

    Args:
      keys: one key a sample; a sample depends on its own key alone.
      f: the network with its parameters bound.
      shape: of one example.
      schedule: the noise levels.
      s: the Langevin step of every level (`recovery.step_sizes`).
      K: chain steps a level.
      noise_scale: of the Langevin noise; the paper's CIFAR-10 figure uses 0.99.

    Returns:
      x_0 and all levels, the t-th of them x_t. Level 0 is data with noise sigma_0 in it.
    """
    B = keys.shape[0]
    T = schedule.T
    x_T = noise.normal(noise.fold(keys, T), shape)

    def recover(x_tilde, level):
        t = jnp.full((B,), level)
        y = sample_conditional(
            noise.fold(keys, level), f, x_tilde, t, schedule, s, K, noise_scale
        )
        x = y / noise.per_example(schedule.a_y(t), y)
        return x, x

    return jax.lax.scan(recover, x_T, jnp.arange(T), reverse=True)
