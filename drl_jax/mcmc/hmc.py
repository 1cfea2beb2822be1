"""Hamiltonian Monte Carlo: a leapfrog trajectory, accepted or refused as a whole.

With momentum p ~ N(0, I), step e and L leapfrog steps

    p <- p + e/2 grad log p(y),   y <- y + e p,   p <- p + e/2 grad log p(y)

the end (y', p') is accepted with probability min(1, exp(H - H')), H = |p|²/2 - log p(y).
Leaves p invariant exactly (Neal 2011, section 5.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from drl_jax import noise
from drl_jax.mcmc.log_density import LogDensityFn, value_and_gradient


class State(NamedTuple):
    """Where the chains are, and what was computed there.

    Attributes:
      position: y, one example a chain.
      log_density: log p(y) up to a constant.
      gradient: of the log-density.
    """

    position: Float[Array, "B *D"]
    log_density: Float[Array, "B"]
    gradient: Float[Array, "B *D"]


class Info(NamedTuple):
    """What became of a proposal.

    Attributes:
      acceptance: its probability to be accepted, in [0, 1].
      accepted: whether it was.
    """

    acceptance: Float[Array, "B"]
    accepted: Bool[Array, "B"]


def init(position: Float[Array, "B *D"], log_density_fn: LogDensityFn) -> State:
    """Starts one chain at each example."""
    return State(position, *value_and_gradient(log_density_fn, position))


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: LogDensityFn,
    step_size: Float[Array, "B"],
    leapfrog: Int[Array, "B"],
) -> tuple[State, Info]:
    """Proposes the end of a trajectory for every chain, and accepts or refuses it.

    A proposal whose energy is not finite is refused.

    Args:
      keys: one key a chain, new at every step.
      state: the chains.
      log_density_fn: log p up to a constant, each chain's from its own example alone.
      step_size: e, a number a chain.
      leapfrog: L, a number a chain; the longest trajectory sets the cost.
    """
    y = state.position
    momentum = noise.normal(noise.fold(keys, 0), y.shape[1:]).astype(y.dtype)
    e = noise.per_example(step_size, momentum)

    def leap(i, carry):
        state, momentum = carry
        p = momentum + e / 2 * state.gradient
        y = state.position + e * p
        end = State(y, *value_and_gradient(log_density_fn, y))
        ended = end, p + e / 2 * end.gradient
        return _where(i < leapfrog, ended, carry)

    start = state, momentum
    proposal, end_momentum = jax.lax.fori_loop(0, jnp.max(leapfrog), leap, start)
    # A sum of products: the difference of two sums of squares has few digits in float32.
    lost = (momentum - end_momentum) * (momentum + end_momentum) / 2
    gain = proposal.log_density - state.log_density + jnp.sum(lost, axis=range(1, lost.ndim))
    acceptance = jnp.where(jnp.isfinite(gain), jnp.exp(jnp.minimum(gain, 0.0)), 0.0)
    accepted = noise.uniform(noise.fold(keys, 1)) < acceptance
    return _where(accepted, proposal, state), Info(acceptance, accepted)


def _where(choose: Bool[Array, "B"], a, b):
    """Takes each chain's leaves from a where chosen, else from b."""
    return jax.tree.map(lambda a, b: jnp.where(noise.per_example(choose, a), a, b), a, b)
