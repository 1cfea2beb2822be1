"""Chains on the conditionals that run for thousands of steps, and their traces.

The noise of a step depends only on the chain's key, its level and the number of the step, and
everything else that a step needs is part of `Chains`. So the result is the same, bit for bit,
however the steps are divided into calls.

Memory does not grow with the number of steps. A trace records a few scalars per chain at N
points or fewer, first at every step. Whenever the trace is full, every second point is dropped,
and the distance between points doubles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise, recovery
from drl_jax.errors import UserError
from drl_jax.sampling.ladder import Conditionals, denoised

POINTS = 1000  # maximum length of a trace; even
PROJECTIONS = 4  # random projections of the position in a trace, beside its log-density
SCALARS = 1 + PROJECTIONS  # per point of a trace without labels
MIN_SHARING = 4  # minimum number of chains that share a condition, so that R-hat compares them

# Images without noise -> the class of each.
LabelFn = Callable[[Float[Array, "B *D"]], Float[Array, "B"]]


class Chains(NamedTuple):
    """The state of long-run chains. The arrays may be numpy arrays.

    Attributes:
      step: number of steps made, the same for all chains.
      state: state of the sampler.
      accepted: sum of the acceptance probabilities of all steps since it was set to zero.
      trace: S scalars at N points: log p(y | x_tilde) up to a constant, the inner products of
        y with `PROJECTIONS` fixed random unit vectors and, if `advance` gets a function for it,
        the label. Point i belongs to step (i + 1) * `thinning`; points after the last step made
        are meaningless.
    """

    step: Int[Array, "B"]
    state: Any
    accepted: Float[Array, "B"]
    trace: Float[Array, "B N S"]


class Observation(NamedTuple):
    """The present positions of chains.

    Attributes:
      x: x_t = y / a_{t+1} for the position y.
      log_density: F(y, t), up to a constant [nats].
      displacement: |y - x_tilde|, the distance from the condition.
    """

    x: Float[Array, "B *D"]
    log_density: Float[Array, "B"]
    displacement: Float[Array, "B"]


def start(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    trace: Float[Array, "B N S"],
) -> Chains:
    """Starts chains on p(y | x_tilde) where the sampler starts them in generation.

    Args:
      keys: one key per chain, as for `advance`.
      conditionals: conditionals of all levels.
      x_tilde: conditions x_{t+1}.
      t: level of each chain.
      trace: array for the trace, with any content. With N = 0 there is no trace.
    """
    sampler = conditionals.sampler
    y = sampler.start(_level_keys(keys, t), conditionals, x_tilde, t)
    state = sampler.init(y, conditionals.log_density_fn(x_tilde, t))
    zeros = jnp.zeros_like(trace, shape=t.shape)
    return Chains(jnp.zeros_like(t), state, zeros, trace)


def advance(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    chains: Chains,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    first: Int[Array, ""],
    last: Int[Array, ""],
    label: LabelFn | None = None,
) -> tuple[Chains, Observation]:
    """Makes steps first + 1, ..., last in one compiled loop.

    The levels and the numbers of the steps are traced values, so other values need no new
    compilation.

    Args:
      keys: one key per chain, the same for all its steps and levels.
      conditionals: conditionals of all levels.
      chains: chains after `first` steps.
      x_tilde: conditions x_{t+1}.
      t: level of each chain.
      first: number of steps that the chains have made.
      last: number of steps that they will have made; if it is not above `first`, none are made.
      label: labels the positions without their noise (`ladder.denoised`), at the points of the
        trace, which then has S = `SCALARS` + 1 columns; None: S = `SCALARS`.
    """
    keys = _level_keys(keys, t)
    log_density_fn = conditionals.log_density_fn(x_tilde, t)
    kernel, tuning = conditionals.sampler.kernel, conditionals.sampler.tuning_at(t)
    y_scale, capacity = conditionals.schedule.y_scale(t), chains.trace.shape[1]

    def scalars(y):
        """Returns the columns of the trace for one point."""
        yield log_density_fn(y)
        yield from _projections(y)
        if label:
            x = y / noise.per_example(y_scale, y)
            yield label(denoised(conditionals, x, t=t))

    def record(trace, n, y):
        """Writes point n // thinning of the trace, if step n belongs to a point."""
        every = thinning(n, capacity)
        full = n == capacity * (every // 2) + 1  # the first step with this thinning
        trace = jax.lax.cond((every > 1) & full, _halve, lambda trace: trace, trace)

        def write(trace):
            return trace.at[:, n // every - 1].set(jnp.column_stack(list(scalars(y))))

        return jax.lax.cond(n % every == 0, write, lambda trace: trace, trace)

    def step(k, carry):
        state, accepted, trace = carry
        state, info = kernel(noise.fold(keys, k), state, log_density_fn, **tuning)
        if capacity:
            trace = record(trace, k + 1, state.position)
        return state, accepted + info.acceptance, trace

    state, accepted, trace = jax.lax.fori_loop(
        first, last, step, (chains.state, chains.accepted, chains.trace)
    )
    y = state.position
    observation = Observation(
        x=y / noise.per_example(y_scale, y),
        log_density=conditionals.F(y, t),
        displacement=recovery.displacement(y, x_tilde),
    )
    chains = Chains(jnp.full_like(chains.step, last), state, accepted, trace)
    return chains, observation


def thinning(n: Int[Array, ""] | int, capacity: int) -> Int[Array, ""]:
    """Returns the number of steps between two points of a trace after step n >= 1.

    This is the smallest power of two p for which n <= p * capacity.
    """
    return 1 << (32 - jax.lax.clz(jnp.asarray((n - 1) // capacity, jnp.int32)))


def draws_after_warm_up(chains: Chains) -> Float[np.ndarray, "B n S"]:
    """Returns the second half of the trace; the first half is warm-up."""
    n, capacity = int(chains.step[0]), chains.trace.shape[1]
    points = n // int(thinning(n, capacity)) if n else 0
    return np.asarray(chains.trace)[:, points // 2 : points]


def recorded_steps(num_steps: int) -> list[int]:
    """Returns the steps at which chains are recorded: 0, 1, 2, 5, 10, 20, ..., num_steps."""
    decades = range(len(str(num_steps)))
    steps = [m * 10**d for d in decades for m in (1, 2, 5) if m * 10**d < num_steps]
    return [0, *steps, num_steps]


def shared_conditions(num_chains: int) -> Int[np.ndarray, "num_chains"]:
    """Returns the index of each chain's condition.

    Every condition has at least `MIN_SHARING` chains (all chains, if there are fewer), which
    sample the same distribution, so that R-hat can compare them.

    Raises:
      UserError: if there are fewer than two chains.
    """
    if num_chains < 2:
        raise UserError(
            f"num_chains is {num_chains}, but R-hat compares chains: use 2 or more per level"
        )
    return np.arange(num_chains) % max(1, num_chains // MIN_SHARING)


def require_levels(levels: Int[np.ndarray, "L"], T: int) -> None:
    """Checks that all levels are in 0..T-1.

    Raises:
      UserError: naming the first level that is not.
    """
    for level in levels:
        if not 0 <= level < T:
            raise UserError(f"level {level} is out of range: the model has levels 0 to {T - 1}")


def _level_keys(keys: Key[Array, "B"], t: Int[Array, "B"]) -> Key[Array, "B"]:
    """Folds the level of each chain into its key, as `ladder.descend` does."""
    return jax.vmap(jax.random.fold_in)(keys, t)


def _projections(y: Float[Array, "B *D"]) -> Float[Array, "P B"]:
    """Returns the inner products of y with fixed random unit vectors."""
    key = jax.random.key(PROJECTIONS)
    directions = jax.random.normal(key, (PROJECTIONS, *y.shape[1:]), jnp.float32)
    each = list(range(1, y.ndim))
    length = jnp.sqrt(jnp.sum(jnp.square(directions), axis=each))
    return jnp.tensordot(directions, y, [each, each]) / length[:, None]


def _halve(trace: Float[Array, "B N S"]) -> Float[Array, "B N S"]:
    """Keeps every second point, and moves these to the first half of the trace."""
    half = trace.shape[1] // 2
    return trace.at[:, :half].set(trace[:, 1::2])
