"""Hamiltonian Monte Carlo.

Draws a momentum p ~ N(0, I) and makes L leapfrog steps of size ε,

    p <- p + ε/2 grad log p(y),   y <- y + ε p,   p <- p + ε/2 grad log p(y)

The end of the trajectory (y', p') is accepted with probability min(1, exp(H - H')), where
H = |p|²/2 - log p(y). Leaves the density exactly invariant (Neal 2011, section 5.3).

In a direction in which p is Gaussian with standard deviation s, a trajectory rotates (y, p) by
an angle of L ε / s. After a whole turn, y is back where it was. So trajectories of two or more
steps have random lengths: each has its own ε, the given step size times u ~ U(0.5, 1.5). As u
does not depend on y, and each ε leaves p invariant, so does the mixture (ibid., section 5.4).
Around a quarter turn, the correlation of y' and y is E cos(pi u / 2) = 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from drl_jax import noise
from drl_jax.mcmc.log_density import LogDensityFn, value_and_gradient


class State(NamedTuple):
    """State of the chains.

    Attributes:
      position: y, one example per chain.
      log_density: log p(y), up to a constant.
      gradient: grad log p(y).
    """

    position: Float[Array, "B *D"]
    log_density: Float[Array, "B"]
    gradient: Float[Array, "B *D"]


class Info(NamedTuple):
    """Information about a step.

    Attributes:
      acceptance: probability in [0, 1] that the proposal is accepted.
      accepted: whether it was accepted.
    """

    acceptance: Float[Array, "B"]
    accepted: Bool[Array, "B"]


def init(position: Float[Array, "B *D"], log_density_fn: LogDensityFn) -> State:
    """Starts one chain at each position."""
    log_p, gradient = value_and_gradient(log_density_fn, position)
    return State(position, log_p, gradient)


def kernel(
    keys: Key[Array, "B"],
    state: State,
    log_density_fn: LogDensityFn,
    step_size: Float[Array, "B"],
    leapfrog: Int[Array, "B"],
) -> tuple[State, Info]:
    """Proposes the end of one trajectory per chain, and accepts or rejects it.

    Rejects proposals whose energy H' is not finite. If H is not finite, because the chain
    starts where the density is zero (log p = -inf), it rejects all of its proposals.

    Args:
      keys: one key per chain, different at every step.
      state: the chains.
      log_density_fn: log p up to a constant.
      step_size: mean of ε, one number per chain. With one leapfrog step, ε itself.
      leapfrog: L, the number of leapfrog steps of each chain. Every chain costs as much as the
        one with the most.
    """
    y = state.position
    momentum = noise.normal(noise.fold(keys, 0), y.shape[1:]).astype(y.dtype)
    # With one step, HMC is MALA, which makes no turns.
    u = jnp.where(leapfrog > 1, 0.5 + noise.uniform(noise.fold(keys, 2)), 1.0)
    epsilon = noise.per_example(u * step_size, momentum)

    def leapfrog_step(i, carry):
        state, momentum = carry
        p = momentum + epsilon / 2 * state.gradient
        moved = init(state.position + epsilon * p, log_density_fn)
        end = moved, p + epsilon / 2 * moved.gradient
        return _select(i < leapfrog, end, carry)

    proposal, end_momentum = jax.lax.fori_loop(
        0, jnp.max(leapfrog), leapfrog_step, (state, momentum)
    )
    # (|p|² - |p'|²) / 2 as a sum of products. The difference of two sums of squares would have
    # large rounding errors in float32.
    kinetic = (momentum - end_momentum) * (momentum + end_momentum) / 2
    log_ratio = (
        proposal.log_density - state.log_density + jnp.sum(kinetic, axis=range(1, kinetic.ndim))
    )
    acceptance = jnp.where(jnp.isfinite(log_ratio), jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    accepted = noise.uniform(noise.fold(keys, 1)) < acceptance
    return _select(accepted, proposal, state), Info(acceptance, accepted)


def _select(condition: Bool[Array, "B"], a, b):
    """Returns a pytree with the values of a for the chains where true, and of b elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(noise.per_example(condition, a), a, b), a, b)
