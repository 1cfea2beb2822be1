"""Sampling from the conditionals, one level or the whole ladder.

Generation (Gao et al. 2021, algorithm 2) starts from white noise x_T and, level by level,
runs the chain for p(y | x_{t+1}) and sets x_t = y / a_{t+1}.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from drl_jax import noise, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.log_density import LogDensityFn
from drl_jax.recovery import LevelFn


class Sampler(NamedTuple):
    """How a conditional is sampled: a module of `mcmc`, and its settings at every level.

    Attributes:
      init: (position, log_density_fn) -> State.
      kernel: (keys, state, log_density_fn, **tuning of the chains' levels) -> (State, Info).
      tuning: what the kernel takes besides, by name, each a number a level: `step_size`, and
        `noise_scale` or `leapfrog` where the kernel has it.
      K: steps a level.
    """

    init: Callable[[Float[Array, "B *D"], LogDensityFn], Any]
    kernel: Callable[..., tuple[Any, Any]]
    tuning: dict[str, Shaped[Array, "T"]]
    K: int


def run_chain(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: LogDensityFn,
    position: Float[Array, "B *D"],
    t: Int[Array, "B"],
    steps: Int[Array, "K"],
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Makes steps of a chain and returns its last position and its mean acceptance.

    `steps` are the steps' numbers, folded into the keys: a chain that stops after step k
    goes on with k + 1 as if it had not stopped.
    """
    step = chain_step(keys, sampler, log_density_fn, t)

    def body(carry, k):
        state, accepted = carry
        state, info = step(state, k)
        return (state, accepted + info.acceptance), None

    start = sampler.init(position, log_density_fn), jnp.zeros_like(position, shape=t.shape)
    (state, accepted), _ = jax.lax.scan(body, start, steps)
    return state.position, accepted / len(steps)


def chain_step(
    keys: Key[Array, "B"], sampler: Sampler, log_density_fn: LogDensityFn, t: Int[Array, "B"]
) -> Callable[[Any, Int[Array, ""]], tuple[Any, Any]]:
    """Returns (state, k) -> (state, info), step k of chains with the tuning of their levels."""
    tuning = {name: values[t] for name, values in sampler.tuning.items()}
    return lambda state, k: sampler.kernel(noise.fold(keys, k), state, log_density_fn, **tuning)


def adapt_step_size(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: LogDensityFn,
    position: Float[Array, "B *D"],
    t: Int[Array, ""],
    step_size: Float[Array, ""],
    num_steps: int,
    target: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B *D"]]:
    """Finds the step size of level t at which the chains' mean acceptance is the target.

    From the one given it follows log s <- log s + (acceptance - target) / k^0.6 (Robbins and
    Monro 1951) for step k = 1..num_steps, and takes the mean log s of the second half. A chain
    whose step changes has no stationary distribution, so these are thrown away; none that is
    measured adapts.

    Returns:
      the step size, the mean acceptance of the second half, and the last positions.
    """
    tuning = {name: jnp.broadcast_to(v[t], keys.shape) for name, v in sampler.tuning.items()}
    half = num_steps // 2

    def step(carry, k):
        state, log_s, sums = carry
        tuning["step_size"] = jnp.broadcast_to(jnp.exp(log_s), keys.shape)
        state, info = sampler.kernel(noise.fold(keys, k), state, log_density_fn, **tuning)
        acceptance = jnp.mean(info.acceptance)
        sums += jnp.where(k >= half, jnp.stack([log_s, acceptance]), 0.0)
        return (state, log_s + (acceptance - target) / (k + 1) ** 0.6, sums), None

    start = sampler.init(position, log_density_fn), jnp.log(step_size), jnp.zeros(2)
    (state, _, sums), _ = jax.lax.scan(step, start, jnp.arange(num_steps))
    log_s, acceptance = sums / (num_steps - half)
    return jnp.exp(log_s), acceptance, state.position


def warm_up(
    keys: Key[Array, "B"],
    F: LevelFn,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: Sampler,
    num_steps: int,
    target: float,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Adapts every level's step size on B ladders that are thrown away.

    A level starts from the sampler's step, lengthened as the level above asked for.

    Returns:
      step size and acceptance of every level, as `adapt_step_size` has them.
    """

    def recover(carry, level):
        x_tilde, factor = carry
        t = jnp.full(keys.shape, level)
        first = sampler.tuning["step_size"][level]

        def log_density_fn(y):
            return recovery.conditional_log_density(F, y, x_tilde, t, schedule)

        step_size, acceptance, y = adapt_step_size(
            *(noise.fold(keys, level), sampler, log_density_fn, x_tilde, level),
            *(first * factor, num_steps, target),
        )
        x = y / noise.per_example(schedule.a_y(t), y)
        return (x, step_size / first), (step_size, acceptance)

    start = white_noise(keys, shape, schedule), 1.0
    _, adapted = jax.lax.scan(recover, start, jnp.arange(schedule.T), reverse=True)
    return adapted


def sample_conditional(
    keys: Key[Array, "B"],
    F: LevelFn,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Runs K steps on p(y | x_tilde) from x_tilde; returns the last y and the acceptance."""

    def log_density_fn(y):
        return recovery.conditional_log_density(F, y, x_tilde, t, schedule)

    return run_chain(keys, sampler, log_density_fn, x_tilde, t, jnp.arange(sampler.K))


def recover(
    keys: Key[Array, "B"],
    F: LevelFn,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> Float[Array, "B *D"]:
    """Draws x_t from x_tilde = x_{t+1}: the end of the conditional's chain, without a_{t+1}."""
    y, _ = sample_conditional(keys, F, x_tilde, t, schedule, sampler)
    return y / noise.per_example(schedule.a_y(t), y)


def white_noise(keys: Key[Array, "B"], shape: tuple[int, ...], schedule: NoiseSchedule):
    """Draws the x_T [B, *shape] from which `generate` starts, in the schedule's precision."""
    return noise.normal(noise.fold(keys, schedule.T), shape).astype(schedule.a.dtype)


def descend(
    keys: Key[Array, "B"],
    F: LevelFn,
    x: Float[Array, "B *D"],
    top: int | Int[Array, ""],
    bottom: int | Int[Array, ""],
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> Float[Array, "B *D"]:
    """Draws x_bottom from x = x_top, one level at a time.

    A level's noise depends on the example's key and on the level alone, so that two
    descents, T to t and t to 0, are one from T to 0.

    Args:
      keys: one key a sample; a sample depends on its own key and start alone.
      F: the log-density of the levels.
      x: x_top.
      top: level to start from, at most T.
      bottom: level to end at, at least 0 and at most top.
      schedule: the noise levels.
      sampler: of the conditionals.
    """
    return down(
        lambda keys, x_tilde, t: recover(keys, F, x_tilde, t, schedule, sampler),
        *(keys, x, top, bottom),
    )


def down(
    recover: Callable[
        [Key[Array, "B"], Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B *D"]
    ],
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    top: int | Int[Array, ""],
    bottom: int | Int[Array, ""],
) -> Float[Array, "B *D"]:
    """Takes x = x_top down to x_bottom by x_t = recover(keys of level t, x_{t+1}, t).

    One compiled loop. The levels are data: whatever they are, it is the same program.
    """

    def step(i, x_tilde):
        level = top - 1 - i
        return recover(noise.fold(keys, level), x_tilde, jnp.full(keys.shape, level))

    return jax.lax.fori_loop(0, top - bottom, step, x)


def generate(
    keys: Key[Array, "B"],
    F: LevelFn,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> Float[Array, "B *D"]:
    """Draws one x_0 of this shape a key: data, with noise sigma_0 in it."""
    x_T = white_noise(keys, shape, schedule)
    return descend(keys, F, x_T, schedule.T, 0, schedule, sampler)
