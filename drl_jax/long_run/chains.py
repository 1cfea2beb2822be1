"""Conditionals' chains that go on for thousands of steps, and what is kept of them.

A chain's noise is folded from its key, its level and the number of the step, and all that a
step needs is carried: however the steps are cut into calls, the chain is the same to the bit.

What is kept does not grow with the steps. Of each chain a few scalars are traced at N points
or fewer: at every step while there is room, and whenever there is none every second point is
dropped and the distance between points doubled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise, recovery, sampling
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError
from drl_jax.mcmc import normal_approximation
from drl_jax.mcmc.log_density import LogDensityFn
from drl_jax.recovery import LevelFn
from drl_jax.sampling import Sampler

POINTS = 1000  # of a trace, at most; even
PROJECTIONS = 4  # of a position, traced beside its log-density
SHARING = 4  # chains, at least, of one distribution: what R-hat compares


class Chains(NamedTuple):
    """Chains on their way. Arrays may be of numpy.

    Attributes:
      step: steps made so far, the same for all.
      state: of the sampler.
      accepted: sum of the acceptance probabilities since it was last set to zero.
      trace: of S = 1 + `PROJECTIONS` scalars, at N points: log p(y | x_tilde) up to a
        constant, and the products of y with fixed random unit vectors. Point i is of step
        (i + 1) `thinning`; what lies beyond the step made last is meaningless.
    """

    step: Int[Array, "B"]
    state: Any
    accepted: Float[Array, "B"]
    trace: Float[Array, "B N S"]


class Seen(NamedTuple):
    """Where chains are, as seen from outside.

    Attributes:
      x: x_t = y / a_{t+1}, the image of the position y.
      log_density: F(y, t), up to a constant [nats].
      displacement: |y - x_tilde|, the distance from the start.
    """

    x: Float[Array, "B *D"]
    log_density: Float[Array, "B"]
    displacement: Float[Array, "B"]


def start(
    F: LevelFn,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    sampler: Sampler,
    trace: Float[Array, "B N S"],
) -> Chains:
    """Starts chains on p(y | x_tilde) from x_tilde, with a trace to be written on.

    A trace of no points (N = 0) is no trace, and costs nothing.
    """
    state = sampler.init(x_tilde, _conditional(F, x_tilde, t, schedule))
    zeros = jnp.zeros_like(trace, shape=t.shape)
    return Chains(jnp.zeros_like(t), state, zeros, trace)


def advance(
    keys: Key[Array, "B"],
    F: LevelFn,
    chains: Chains,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    first: Int[Array, ""],
    last: Int[Array, ""],
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> tuple[Chains, Seen]:
    """Makes the steps first + 1 .. last. Levels and steps are data of one compiled loop.

    Args:
      keys: one key a chain, the same for all its steps and levels.
      F: the log-density of the levels.
      chains: after `first` steps.
      x_tilde: the conditions.
      t: levels of the chains.
      first: steps made.
      last: steps to be made in all.
      schedule: the noise levels.
      sampler: of the conditionals.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, t)  # as `sampling.descend` does
    log_density_fn = _conditional(F, x_tilde, t, schedule)
    step = sampling.chain_step(keys, sampler, log_density_fn, t)
    capacity = chains.trace.shape[1]

    def traced(trace, n, y):
        """The trace with point n // thinning on it, where step n is such a point."""
        every = thinning(n, capacity)
        full = n == capacity * (every // 2) + 1  # the first step with this thinning
        trace = jax.lax.cond((every > 1) & full, _halve, lambda trace: trace, trace)

        def write(trace):
            point = jnp.column_stack([log_density_fn(y), *_projections(y)])
            return trace.at[:, n // every - 1].set(point)

        return jax.lax.cond(n % every == 0, write, lambda trace: trace, trace)

    def body(k, carry):
        state, accepted, trace = carry
        state, info = step(state, k)
        if capacity:
            trace = traced(trace, k + 1, state.position)
        return state, accepted + info.acceptance, trace

    state, accepted, trace = jax.lax.fori_loop(
        first, last, body, (chains.state, chains.accepted, chains.trace)
    )
    y = state.position
    seen = Seen(
        y / noise.per_example(schedule.a_y(t), y),
        F(y, t),
        recovery.displacement(y, x_tilde),
    )
    return Chains(jnp.full_like(chains.step, last), state, accepted, trace), seen


def thinning(n: Int[Array, ""] | int, capacity: int) -> Int[Array, ""]:
    """Returns how many steps lie between a trace's points after step n >= 1.

    The smallest power of two with which the points have room: the function of n alone that
    doubling a full trace comes to.
    """
    return 1 << (32 - jax.lax.clz(jnp.asarray((n - 1) // capacity, jnp.int32)))


def kept_draws(chains: Chains) -> Float[np.ndarray, "B n S"]:
    """Returns the trace's points without the first half of them, which is warm-up."""
    n, capacity = int(chains.step[0]), chains.trace.shape[1]
    points = n // int(thinning(n, capacity)) if n else 0
    return np.asarray(chains.trace)[:, points // 2 : points]


def recorded_steps(num_steps: int) -> list[int]:
    """Returns the steps at which pictures are taken: 0, 1, 2, 5, 10, 20, ... num_steps."""
    decades = range(len(str(num_steps)))
    ladder = [m * 10**d for d in decades for m in (1, 2, 5) if m * 10**d < num_steps]
    return [0, *ladder, num_steps]


def shared_conditions(num_chains: int) -> Int[np.ndarray, "num_chains"]:
    """Returns the number of each chain's condition: chains with equal ones are comparable.

    `SHARING` chains or more have a condition in common, all of them where they are fewer.

    Raises:
      UserError: if there are fewer than two chains, which R-hat cannot compare.
    """
    if num_chains < 2:
        raise UserError(
            f"{num_chains} chains a level: R-hat compares chains, ask for 2 or more"
        )
    return np.arange(num_chains) % max(1, num_chains // SHARING)


def require_levels(levels: Int[np.ndarray, "L"], T: int) -> None:
    """Refuses levels that there are not.

    Raises:
      UserError: naming the first.
    """
    for level in levels:
        if not 0 <= level < T:
            raise UserError(f"level {level} is out of range: the model has levels 0 to {T - 1}")


def require_chain(sampler: Sampler) -> None:
    """Refuses a sampler that draws once, and has no stationary distribution.

    Raises:
      UserError: naming samplers that have one.
    """
    if sampler.kernel is normal_approximation.kernel:
        raise UserError(
            "the normal approximation is one draw, no chain that could go on: pass "
            "--config.mcmc.sampler=langevin or hmc"
        )


def _conditional(
    F: LevelFn, x_tilde: Float[Array, "B *D"], t: Int[Array, "B"], schedule: NoiseSchedule
) -> LogDensityFn:
    return lambda y: recovery.conditional_log_density(F, y, x_tilde, t, schedule)


def _projections(y: Float[Array, "B *D"]) -> Float[Array, "P B"]:
    """Returns the products of y with fixed random unit vectors."""
    key = jax.random.key(PROJECTIONS)
    directions = jax.random.normal(key, (PROJECTIONS, *y.shape[1:]), jnp.float32)
    each = list(range(1, y.ndim))
    length = jnp.sqrt(jnp.sum(jnp.square(directions), axis=each))
    return jnp.tensordot(directions, y, [each, each]) / length[:, None]


def _halve(trace: Float[Array, "B N S"]) -> Float[Array, "B N S"]:
    """Moves every second point to the front; the back half is to be written again."""
    half = trace.shape[1] // 2
    return trace.at[:, :half].set(trace[:, 1::2])
