"""Recovery likelihood: each level's energy, its conditional given the next, and the loss.

The network f(x, t) gives unnormalised log-densities, higher = more probable (f is the
*negative* energy). Writing y = a_{t+1} x_t and x_tilde = x_{t+1},

    p(y | x_tilde) ∝ exp( F(y, t) - |x_tilde - y|² / (2 sigma_{t+1}²) )

(Gao et al. 2021, eqs. 3 and 11). A temperature tau_t for each level spares the network the
levels' orders of magnitude (`Parameterisation`):

- few levels (T6): F = f / s_t², s_t the Langevin step, as in the authors' program;
- many levels (T1k): F = f / sigma_bar_t - |x|² / 2. Level t is data blurred by noise
  sigma_bar_t eps, and its score is grad F = -E[eps | x] / sigma_bar_t (Tweedie's formula). So
  grad f is of order one in each pixel at every level, while s_t² would ask for a gradient of
  2e-6 at the bottom and 4e-4 at the top. The quadratic is the log-density of white noise, to
  which the levels tend: f has only to say how a level differs from it, and since f grows no
  faster than linearly, exp(F) can be normalised and no chain can run away. Data that are
  dequantised bring noise of their own, and sigma_bar_t is the standard deviation of both: with
  what the levels add alone, the lowest would be steeper than the data are;
- few dimensions: F = f - |x|² / 2. A density in the plane is smooth at the scale of the lowest
  noise: its log is of order one at every level, and hardly changes over the lowest. Through
  sigma_bar_t, small there, a network would have to shrink as the levels do, to the percent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax import noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.log_density import value_and_gradient

# (x [B, ...], t [B]) -> [B]: a network f with its parameters bound, or its F.
LevelFn = Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B"]]


def step_sizes(schedule: NoiseSchedule, b_squared: float) -> Float[Array, "T"]:
    """Returns the paper's Langevin step s_t of every level.

    s_t² = b² c_t² sigma_{t+1}² with c_t² = sigma_bar_t / sigma_bar_0 (Gao et al. 2021,
    section 3.4).
    """
    c_squared = schedule.sigma_bar[:-1] / schedule.sigma_bar[0]
    return jnp.sqrt(b_squared * c_squared) * schedule.sigma[1:]


class Parameterisation(NamedTuple):
    """How the log-density comes of the network: F = f / tau_t - rho |x|² / 2.

    Attributes:
      temperature: tau_t, a number a level.
      precision: rho: 1 if white noise is the reference measure, 0 if there is none.
    """

    temperature: Float[Array, "T"]
    precision: float


def log_density(f: LevelFn, parameterisation: Parameterisation) -> LevelFn:
    """Returns F(x, t), the log-density of level t up to a constant."""
    temperature, precision = parameterisation

    def F(x: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        reference = precision * jnp.sum(jnp.square(x), axis=range(1, x.ndim)) / 2
        return f(x, t) / temperature[t] - reference

    return F


def conditional_log_density(
    F: LevelFn,
    y: Float[Array, "B *D"],
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns log p(y | x_tilde) up to a constant; at t = T - 1 the marginal F itself."""
    squared_distance = jnp.sum(jnp.square(x_tilde - y), axis=range(1, y.ndim))
    quadratic = squared_distance / (2 * schedule.sigma[t + 1] ** 2)
    return F(y, t) - (1 - schedule.is_marginal(t)) * quadratic


def loss(
    f: LevelFn,
    y: Float[Array, "B *D"],
    sign: float | Float[Array, ""],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns sign (sigma_1 / sigma_{t+1}) f(y, t), one a y, and f: one phase of the loss.

    The loss is that of y = a_{t+1} x_t of the data (`NoiseSchedule.a_y`), whose sign is -1, and
    that of as many draws of the model's p(y | x_tilde), whose sign is 1, added up. So added,
    the gradients with respect to f's parameters are the maximum-likelihood gradient of the
    recovery likelihood (Gao et al. 2021, eq. 8), weighted by level.

    Args:
      f: the network with the parameters to be learned.
      y: of the data, or draws.
      sign: which of them they are.
      t: levels 0..T-1.
      schedule: the noise levels.
    """
    f_y = f(y, t)
    return sign * schedule.sigma[1] / schedule.sigma[t + 1] * f_y, f_y


def denoising_loss(
    F: LevelFn,
    y: Float[Array, "B *D"],
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns the normal approximation's weighted error, one a pair.

        w_t / D · |y - x_tilde - sigma² grad F(x_tilde, t)|² / (2 sigma²),   sigma = sigma_{t+1}

    is the negative log-likelihood of y under N(x_tilde + sigma² grad F(x_tilde), sigma² I),
    without its constant, per dimension (Gao et al. 2021, section 3.3). The weight
    w_t = sigma_bar_{t+1}² / sigma_{t+1}² makes all levels weigh the same: with y the mean of
    its draws given the data, the error is |eps_bar + sigma_bar_{t+1} grad F|² / (2 D), the
    loss of Ho et al. (2020, eq. 14). Its gradient is one of a gradient; it needs no chain.

    Args:
      F: the log-density with the parameters to be learned.
      y: draws of a_{t+1} x_t given x_tilde and the data, or their mean: the same gradient
        in expectation, and less noise.
      x_tilde: x_{t+1} of the data.
      t: levels 0..T-1.
      schedule: the noise levels.
    """
    _, gradient = value_and_gradient(lambda x: F(x, t), x_tilde)
    sigma = noise.per_example(schedule.sigma[t + 1], y)
    weight = noise.per_example(schedule.sigma_bar[t + 1], y) / sigma
    error = weight * (y - x_tilde - sigma**2 * gradient) / sigma
    return jnp.mean(jnp.square(error), axis=range(1, y.ndim)) / 2


def displacement(
    y_neg: Float[Array, "B *D"], x_tilde: Float[Array, "B *D"]
) -> Float[Array, "B"]:
    """Returns the distance a chain has come from its start, |y_neg - x_tilde|."""
    return jnp.sqrt(jnp.sum(jnp.square(y_neg - x_tilde), axis=range(1, y_neg.ndim)))
