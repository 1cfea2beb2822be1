"""Recovery likelihood: each level's energy, its conditional given the next, and the loss.

The network f(x, t) gives unnormalised log-densities, higher = more probable (f is the
*negative* energy). Writing y = a_{t+1} x_t and x_tilde = x_{t+1},

    p(y | x_tilde) ∝ exp( F(y, t) - |x_tilde - y|² / (2 sigma_{t+1}²) )

(Gao et al. 2021, eqs. 3 and 11), with F = f / s_t² for the Langevin step s_t of that level:
f then stays of order one at every level.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax.diffusion import NoiseSchedule

# f(x [B, ...], t [B]) -> [B], a network with its parameters bound.
LevelFn = Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B"]]


def step_sizes(schedule: NoiseSchedule, b_squared: float) -> Float[Array, "T"]:
    """Returns the Langevin step s_t of every level.

    s_t² = b² c_t² sigma_{t+1}² with c_t² = sigma_bar_t / sigma_bar_0 (Gao et al. 2021,
    section 3.4).
    """
    c_squared = schedule.sigma_bar[:-1] / schedule.sigma_bar[0]
    return jnp.sqrt(b_squared * c_squared) * schedule.sigma[1:]


def log_density(
    f: LevelFn, x: Float[Array, "B *D"], t: Int[Array, "B"], s: Float[Array, "T"]
) -> Float[Array, "B"]:
    """Returns F(x, t) = f(x, t) / s_t², the log-density of level t up to a constant."""
    return f(x, t) / s[t] ** 2


def conditional_log_density(
    f: LevelFn,
    y: Float[Array, "B *D"],
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    s: Float[Array, "T"],
) -> Float[Array, "B"]:
    """Returns log p(y | x_tilde) up to a constant; at t = T - 1 the marginal F itself."""
    squared_distance = jnp.sum(jnp.square(x_tilde - y), axis=range(1, y.ndim))
    quadratic = squared_distance / (2 * schedule.sigma[t + 1] ** 2)
    return log_density(f, y, t, s) - (1 - schedule.is_marginal(t)) * quadratic


def loss(
    f: LevelFn,
    y_pos: Float[Array, "B *D"],
    y_neg: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B"], tuple[Float[Array, "B"], Float[Array, "B"]]]:
    """Returns -(sigma_1 / sigma_{t+1}) (f(y_pos, t) - f(y_neg, t)), one a pair, and both f.

    Its gradient is the maximum-likelihood gradient of the recovery likelihood (Gao et al.
    2021, eq. 8), weighted by level.

    Args:
      f: the network with the parameters to be learned.
      y_pos: y = a_{t+1} x_t of the data (`NoiseSchedule.a_y`).
      y_neg: draws of the model's p(y | x_tilde); constants to the gradient.
      t: levels 0..T-1.
      schedule: the noise levels.
    """
    # One batch of twice the size, each pair side by side, so that a batch sharded over
    # devices stays where it is.
    pairs = jnp.stack([y_pos, jax.lax.stop_gradient(y_neg)], axis=1)
    f_both = f(pairs.reshape(-1, *y_pos.shape[1:]), jnp.repeat(t, 2)).reshape(-1, 2)
    f_pos, f_neg = f_both[:, 0], f_both[:, 1]
    weight = schedule.sigma[1] / schedule.sigma[t + 1]
    return -weight * (f_pos - f_neg), (f_pos, f_neg)


def displacement(
    y_neg: Float[Array, "B *D"], x_tilde: Float[Array, "B *D"]
) -> Float[Array, "B"]:
    """Returns the distance a chain has come from its start, |y_neg - x_tilde|."""
    return jnp.sqrt(jnp.sum(jnp.square(y_neg - x_tilde), axis=range(1, y_neg.ndim)))
