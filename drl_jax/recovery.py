"""The recovery likelihood: log-densities, conditionals and losses.

The network f(x, t) is the *negative* energy: higher means more probable. A `Parameterisation`
turns it into F(y, t), the log-density of y_t up to a constant. Write y = a_{t+1} x_t and
x_tilde = x_{t+1}. Then

    p(y | x_tilde) ∝ exp( F(y, t) - |x_tilde - y|² / (2 sigma_{t+1}²) )

(Gao et al. 2021, eqs. 3 and 11). At t = T - 1, x_tilde is white noise: there is no quadratic
term, and y = x_t.

F can be learned in two ways: from the recovery likelihood, with negative samples that Markov
chains draw (`loss`), or from denoising, without them (`denoising_loss`).

The gradient of F differs between levels by orders of magnitude. Dividing f by a temperature
tau_t per level takes these factors out of the network. There are six parameterisations
(`config.energy.parameterisation`):

- 'step', for few levels (T6): F = f / s_t² with s_t the Langevin step size, as in the authors'
  program.
- 'noise', for many levels (T1k): F = f / sigma_bar_t - |x|² / 2. Level t is data plus noise
  sigma_bar_t eps, and its score is grad F = -E[eps | x] / sigma_bar_t (Tweedie's formula). The
  gradient of f is thus of order one per pixel at every level; with s_t² it would have to be
  2e-6 at t = 0 and 4e-4 at t = T - 2. The quadratic term is the log-density of white noise,
  which the levels approach, so f models only the difference from it. Since f grows no faster
  than linearly, exp(F) can be normalised and no chain diverges. For dequantised data, tau_t is
  the standard deviation of sigma_bar_t eps and the dequantisation noise together; with
  sigma_bar_t alone, F would be too steep at the lowest levels. With few levels, y is smaller
  than x_t by a factor a_{t+1} that is not close to 1, so its score is larger by 1 / a_{t+1};
  f models this, too.
- 'uniform', for images and any number of levels: F = f / tau_t + the log-density of level t if
  the data's pixels were independent and uniform in [-1, 1] (`uniform_pixels`), with tau_t as in
  'noise'. This reference is white noise at high levels. At low levels it is flat between the
  darkest and the lightest pixel value, and falls as that of Gaussian noise sigma_bar_t outside.
  A network whose output grows no faster than linearly cannot outweigh it: pixels stay within a
  few sigma_bar_t of the range of pixel values, however long the chains are. Where most pixels
  are black, f can contain their log-density, with a probability that depends on the rest of
  the image (`mixture`).
- 'gaussians', for small images and any number of levels: F = f / tau_t + the log-density of
  level t if the data were a mixture of Gaussians, which is fitted to them before training
  (`data.mixtures.fit`). This reference falls as the square of the distance from the data, and
  f / tau_t is limited (`limited`), so no region far from the data is probable.
- 'bounded_gaussians': the same, with a correction of the reference (`bounded_pixels`) that
  keeps pixels in their range, as 'uniform' does.
- 'unit', for few dimensions: F = f - |x|² / 2. A density in the plane is smooth at the scale of
  the lowest noise levels: its logarithm is of order one at every level, and the lowest levels
  hardly differ. If f were divided by sigma_bar_t, it would have to be proportional to
  sigma_bar_t at the lowest levels, to within a percent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.networks.energy import Form

LIMIT = 60 / 64  # of f / tau_t per dimension, if a mixture is fitted to the data [nats]
LOG_ODDS = 4.0  # unit of the log-odds in `mixture`, so that they are learned as fast as v

# (x [B, ...], t [B]) -> [B]: the network f with given parameters, or F computed from it.
LevelFn = Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B"]]


def step_sizes(schedule: NoiseSchedule, b_squared: float) -> Float[Array, "T"]:
    """Returns the paper's Langevin step size s_t of every level t in 0..T-1.

        s_t² = b² c_t² sigma_{t+1}²,   c_t² = sigma_bar_t / sigma_bar_0

    (Gao et al. 2021, section 3.4.)
    """
    c_squared = schedule.sigma_bar[:-1] / schedule.sigma_bar[0]
    return jnp.sqrt(b_squared * c_squared) * schedule.sigma[1:]


class Parameterisation(NamedTuple):
    """The log-density F as a function of the network's output f.

        F(y, t) = f(y, t) / tau_t + reference(y, t)

    Attributes:
      temperature: tau_t, one number per level.
      reference: log-density from which f models the difference, up to a constant [nats].
    """

    temperature: Float[Array, "T"]
    reference: LevelFn


def no_reference(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns 0: f models all of F."""
    del t
    return jnp.zeros_like(y, shape=len(y))


def white_noise(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns -|y|² / 2, the log-density of N(0, I) up to a constant."""
    del t
    return -jnp.sum(jnp.square(y), axis=range(1, y.ndim)) / 2


def uniform_pixels(schedule: NoiseSchedule, half_width: float) -> LevelFn:
    """Returns the log-density of y_t for independent uniform pixels, up to a constant.

    It is the sum over pixels of `_uniform_pixel`.

    Args:
      schedule: noise levels.
      half_width: h, 1 for pixels in [-1, 1].
    """
    log_p = _uniform_pixel(schedule, half_width)
    return lambda y, t: jnp.sum(log_p(y, t), axis=range(1, y.ndim))


# (y [B, ...], t [B]) -> log-density of each pixel, [B, ...], up to a constant per level.
PixelFn = Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B *D"]]


def _uniform_pixel(schedule: NoiseSchedule, half_width: float) -> PixelFn:
    """Returns the log-density of each pixel of y_t for a uniform pixel, up to a constant.

    If every pixel of the data is uniform in [-h, h], then that of x_t = y / y_scale is uniform
    noise plus Gaussian noise, with the density

        (Phi((e - x_t) / sigma_bar_t) - Phi((-e - x_t) / sigma_bar_t)) / (2 e),   e = a_bar_t h

    where Phi is the normal distribution function.

    Args:
      schedule: noise levels.
      half_width: h, 1 for pixels in [-1, 1].
    """

    def log_p(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B *D"]:
        sigma_bar = noise.per_example(schedule.sigma_bar[t], y)
        edge = noise.per_example(schedule.a_bar[t], y) * half_width
        # The density is even. At |x|, the first term is the larger one, and both keep their
        # relative precision in the tail.
        x = jnp.abs(y) / noise.per_example(schedule.y_scale(t), y)
        upper = log_ndtr((edge - x) / sigma_bar)
        lower = log_ndtr((-edge - x) / sigma_bar)
        return upper + jnp.log1p(-jnp.exp(lower - upper))

    return log_p


def bounded_pixels(schedule: NoiseSchedule, half_width: float) -> LevelFn:
    """Returns by how much y_t is more probable for uniform than for normal pixels [nats].

    This is the log-density of `uniform_pixels` minus that of independent normal pixels with the
    same variance, up to a constant per level. Added to the log-density of a mixture of
    Gaussians, it keeps pixels in their range. At high levels, where both are those of white
    noise, it vanishes.

    Args:
      schedule: noise levels.
      half_width: h, 1 for pixels in [-1, 1].
    """
    uniform = uniform_pixels(schedule, half_width)

    def log_ratio(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        uniform_variance = jnp.square(schedule.a_bar[t] * half_width) / 3
        variance = schedule.y_scale(t) ** 2 * (uniform_variance + schedule.sigma_bar[t] ** 2)
        return uniform(y, t) + jnp.sum(jnp.square(y), axis=range(1, y.ndim)) / (2 * variance)

    return log_ratio


def mixture(schedule: NoiseSchedule, temperature: Float[Array, "T"], half_width: float) -> Form:
    """Returns the form of f for images of which many pixels are black.

    The network's output is two arrays (v, w / `LOG_ODDS`), and

        f = <x, v> + tau_t sum_i (softplus(w_i + r_i) - softplus(w_i))
        r_i = log N(x_i; -a_bar_t, s²) - log p(x_i),   s² = sigma_bar_t² + a_bar_t² (h - 1)² / 3

    where p is the density of a uniform pixel, as in `uniform_pixels`, and the normal density is
    that of a black one (-1 with the noise of dequantisation). With the reference
    `uniform_pixels`, F is then <x, v> / tau_t plus the log-density of pixels that are
    black with the log-odds w_i and uniform otherwise. Whether a pixel is black is a property
    of the rest of the image, which the network sees: so w can be smooth, although the
    log-density has a peak sigma_bar_t wide. F is bounded by <x, v> / tau_t plus the
    larger of both log-densities, so pixels cannot leave their range either.

    Args:
      schedule: noise levels.
      temperature: tau_t.
      half_width: h: 1, or more for dequantised data.
    """
    uniform = _uniform_pixel(schedule, half_width)

    def form(
        x: Float[Array, "B *D"], u: Float[Array, "B 2 *D"], t: Int[Array, "B"]
    ) -> Float[Array, "B"]:
        v, w = u[:, 0], LOG_ODDS * u[:, 1]
        a_bar, sigma_bar = schedule.a_bar[t], schedule.sigma_bar[t]
        std = jnp.hypot(sigma_bar, a_bar * (half_width - 1) / math.sqrt(3))
        a_bar, std, tau, scale = (
            noise.per_example(each, x)
            for each in (a_bar, std, temperature[t], schedule.y_scale(t))
        )
        black = -jnp.square((x / scale + a_bar) / std) / 2 - jnp.log(std)
        constant = math.log(2 * half_width / math.sqrt(2 * math.pi))
        r = black + jnp.log(a_bar) + constant - uniform(x, t)
        pixels = x * v + tau * (jax.nn.softplus(w + r) - jax.nn.softplus(w))
        return jnp.sum(pixels, axis=range(1, x.ndim))

    return form


def limited(f: LevelFn, temperature: Float[Array, "T"]) -> LevelFn:
    """Returns c tau_t tanh(f(y, t) / (c tau_t)), with c = `LIMIT` D for D dimensions.

    It contributes between -c and c to F, and equals f where |f| / tau_t is far below c.
    """

    def g(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        largest = LIMIT * y[0].size * temperature[t]
        return largest * jnp.tanh(f(y, t) / largest)

    return g


def log_density(f: LevelFn, parameterisation: Parameterisation) -> LevelFn:
    """Returns the function F(y, t), the log-density of level t up to a constant [nats]."""
    temperature, reference = parameterisation

    def F(y: Float[Array, "B *D"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        return f(y, t) / temperature[t] + reference(y, t)

    return F


def conditional_log_density(
    F: LevelFn,
    y: Float[Array, "B *D"],
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns log p(y | x_tilde) up to a constant, at levels t in 0..T-1 [nats].

        F(y, t) - |x_tilde - y|² / (2 sigma_{t+1}²),   and F(y, t) at t = T - 1

    (Gao et al. 2021, eqs. 3 and 11.)
    """
    squared_distance = jnp.sum(jnp.square(x_tilde - y), axis=range(1, y.ndim))
    quadratic = squared_distance / (2 * schedule.sigma[t + 1] ** 2)
    return F(y, t) - (1 - schedule.is_marginal(t)) * quadratic


def positives(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws positive samples (y, x_tilde) ~ q(y_t, x_{t+1} | x) for data x, t in 0..T-1."""
    x_t, x_tilde = diffusion.diffuse_pair(keys, x, t, schedule)
    return noise.per_example(schedule.y_scale(t), x) * x_t, x_tilde


def positives_with_shared_noise(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws positive samples (y, x_tilde) that have the same noise, at levels t in 0..T-1.

    See `diffusion.shared_noise_pair`. x_tilde - y is not independent of y here, as the model
    assumes. But F learns the same as from `positives`: with

        log p(y | x_tilde) = F(y, t) - |x_tilde - y|² / (2 sigma_{t+1}²) - log Z(x_tilde)

    the first and the last term depend on one variable each, whose distributions are the same
    for both kinds of pairs, and the second one does not depend on F. So the expected gradient
    is the same for every F, also with the negative samples of short chains, which depend on
    x_tilde alone. For normal data, the gradient of a batch varies less: y and the negative
    sample are closer.
    """
    x_t, x_tilde = diffusion.shared_noise_pair(keys, x, t, schedule)
    return noise.per_example(schedule.y_scale(t), x) * x_t, x_tilde


def positives_with_noise(
    keys: Key[Array, "B"],
    x: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
    """Draws y_t given data x, at levels t in 0..T-1.

        y_t = a (a_bar_t x + sigma_bar_t eps),   eps ~ N(0, I),   a = a_{t+1}, 1 at t = T - 1

    Returns:
      y_t and its noise eps.
    """
    eps = noise.normal(keys, x.shape[1:])
    a_bar, sigma_bar = schedule.a_bar[t], schedule.sigma_bar[t]
    x_t = noise.per_example(a_bar, x) * x + noise.per_example(sigma_bar, x) * eps
    return noise.per_example(schedule.y_scale(t), x) * x_t, eps


def loss(
    f: LevelFn,
    y: Float[Array, "B *D"],
    sign: float | Float[Array, ""],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns the positive or the negative term of the loss per example, and f(y, t).

        loss = sign (sigma_1 / sigma_{t+1}) f(y, t)

    In the positive term, y is drawn from the data (`positives`) and the sign is -1. In the
    negative term, y is an equally large sample of the model's p(y | x_tilde), treated as
    constant, and the sign is 1. The sum of both terms has the gradient of the negative log
    recovery likelihood with respect to the parameters of f (Gao et al. 2021, eq. 8), up to a
    weight per level.

    Args:
      f: the network with the parameters to be learned.
      y: positive or negative samples.
      sign: -1 for positive samples, 1 for negative ones.
      t: levels in 0..T-1.
      schedule: the noise levels.
    """
    f_y = f(y, t)
    return sign * schedule.sigma[1] / schedule.sigma[t + 1] * f_y, f_y


def denoising_loss(
    F: LevelFn,
    y: Float[Array, "B *D"],
    eps: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns the loss of denoising score matching per example.

        |eps + a sigma_bar_t grad F(y, t)|² / (2 D),   a = a_{t+1}, 1 at t = T - 1

    y is data with Gaussian noise a sigma_bar_t eps. Of all functions of y, the score of its
    density, grad log q(y_t) = -E[eps | y_t] / (a sigma_bar_t), minimises the expected loss
    (Vincent 2011; Ho et al. 2020, eq. 14). So F(., t) learns the log-density of y_t, as it does
    from the recovery likelihood, however far apart the levels are. The variance of eps is 1 at
    every level, so all levels have the same importance. No chain is needed, but minimising the
    loss takes the gradient of a gradient.

    Args:
      F: the log-density with the parameters to be learned.
      y: samples of y_t (`positives_with_noise`).
      eps: their noise.
      t: levels in 0..T-1.
      schedule: the noise levels.
    """
    _, gradient = value_and_gradient(lambda y: F(y, t), y)
    std = schedule.y_scale(t) * schedule.sigma_bar[t]
    error = eps + noise.per_example(std, y) * gradient
    return jnp.mean(jnp.square(error), axis=range(1, y.ndim)) / 2


def displacement(
    y_neg: Float[Array, "B *D"], x_tilde: Float[Array, "B *D"]
) -> Float[Array, "B"]:
    """Returns the Euclidean distance |y_neg - x_tilde| from the condition to a chain's end."""
    return jnp.sqrt(jnp.sum(jnp.square(y_neg - x_tilde), axis=range(1, y_neg.ndim)))
