"""The density under a model: log Z by annealed importance sampling, and log p of data.

Level t gives x_t the log-density log q_t(x) = F(a x, t) + D log a, a = `NoiseSchedule.a_y`, up
to log Z_t; level T is white noise, N(0, I), whose Z is 1. Chains are annealed through

    log q = (1 - β) log q_t + β log q_{t-1},   0 ≤ β < 1, on many rungs (t, β) (`ladder`),

by log w += log q_to(x) - log q_from(x), then transitions that leave q_to as it is, from one
rung to the next (Neal 2001). Both directions bound the log Z of level 0:

- down, from exact white noise: E[w] = Z, so that log mean w is below log Z on average;
- up, from samples of q_0: E[w] = 1 / Z, so that -log mean w is above it (Burda, Grosse,
  Salakhutdinov 2015; Grosse, Ghahramani, Adams 2015). This one is as true as the samples are:
  transitions on q_0, started from data, make them.

What makes the bounds differ is not a wrong model of the data, but chains that have no time to
follow it. Transitions must be exact (MALA or HMC): a biased chain bounds nothing.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise, sampling
from drl_jax.diffusion import NoiseSchedule
from drl_jax.recovery import LevelFn
from drl_jax.sampling import Sampler


def level_log_density(
    F: LevelFn, x: Float[Array, "B *D"], t: Int[Array, "B"], schedule: NoiseSchedule
) -> Float[Array, "B"]:
    """Returns log q_t(x), up to log Z_t, of x_t = x at levels t in 0..T [nats]."""
    D, T = x[0].size, schedule.T
    below = jnp.minimum(t, T - 1)
    a = schedule.a_y(below)
    log_q = F(noise.per_example(a, x) * x, below) + D * jnp.log(a)
    squares = jnp.sum(jnp.square(x), axis=range(1, x.ndim))
    return jnp.where(t == T, -(squares + D * math.log(2 * math.pi)) / 2, log_q)


class Ladder(NamedTuple):
    """Rungs from white noise (T, 0) down to data (0, 0).

    Attributes:
      level: t.
      beta: how far it is from level t to t - 1, in [0, 1).
    """

    level: Int[Array, "R"]
    beta: Float[Array, "R"]


def ladder(schedule: NoiseSchedule, rungs: int) -> Ladder:
    """Lays rungs: about so many, equally far apart in log sigma_bar, and one a level at least.

    A step of log sigma_bar is one of the information about data of variance 1 that a level
    has, log(1 + a_bar² / sigma_bar²) / 2 nats a dimension. The lowest levels are the farthest
    apart, also of T1k, where sigma_bar falls by a third from level 1 to 0.
    """
    log_sigma_bar = np.log(np.asarray(schedule.sigma_bar, np.float64))
    share = np.diff(log_sigma_bar) / (log_sigma_bar[-1] - log_sigma_bar[0])
    counts = np.maximum(1, np.rint(rungs * share).astype(int))  # [t]: from t + 1 to t
    down = np.arange(schedule.T)[::-1]
    level = np.repeat(down + 1, counts[down])
    beta = np.concatenate([np.arange(n) / n for n in counts[down]])
    return Ladder(jnp.asarray(np.append(level, 0)), jnp.asarray(np.append(beta, 0.0)))


def rung_log_density(
    F: LevelFn,
    x: Float[Array, "B *D"],
    level: Int[Array, ""],
    beta: Float[Array, ""],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns log q(x) of one rung, the same for all x [nats]."""

    def log_q(x, level):
        return level_log_density(F, x, jnp.full(x.shape[:1], level), schedule)

    return jax.lax.cond(
        beta == 0,  # as of most rungs of many levels: half the work
        lambda x: log_q(x, level),
        lambda x: (1 - beta) * log_q(x, level) + beta * log_q(x, level - 1),
        x,
    )


class Pass(NamedTuple):
    """A stretch of annealing, R rungs long.

    Attributes:
      x: where the chains are.
      gains: what each rung added to log w; exact sums of thousands are for float64.
      acceptance: mean over each rung's transitions.
    """

    x: Float[Array, "B *D"]
    gains: Float[Array, "B R"]
    acceptance: Float[Array, "B R"]


def anneal(
    keys: Key[Array, "B"],
    F: LevelFn,
    x: Float[Array, "B *D"],
    place: Int[Array, "R"],
    start: Int[Array, "R"],
    end: Int[Array, "R"],
    ladder: Ladder,
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> Pass:
    """Takes chains from rung start[i] to rung end[i], for each i in turn.

    The rungs are data of one compiled loop, whichever way they lead.

    Args:
      keys: one key a chain.
      F: the log-density of the levels.
      x: samples of the first rung.
      place: of each move in the whole pass, folded into the keys: a pass may be cut anywhere.
      start: rungs.
      end: rungs.
      ladder: what the rungs are.
      schedule: the noise levels.
      sampler: of exact transitions, tuned for each rung (`tune`); K of them a rung.
    """

    def log_q(x, rung):
        return rung_log_density(F, x, ladder.level[rung], ladder.beta[rung], schedule)

    def move(x, data):
        place, start, end = data
        gain = log_q(x, end) - log_q(x, start)
        x, acceptance = sampling.run_chain(
            *(noise.fold(keys, place), sampler, lambda x: log_q(x, end)),
            *(x, jnp.full(keys.shape, end), jnp.arange(sampler.K)),
        )
        return x, (gain, acceptance)

    x, (gains, acceptance) = jax.lax.scan(move, x, (place, start, end))
    return Pass(x, gains.T, acceptance.T)


def tune(step_size: Float[Array, "T"], ladder: Ladder) -> Float[Array, "R"]:
    """Returns the step size of every rung: of its level, or between two on a log scale.

    White noise takes the step of level T - 1.
    """
    levels = jnp.arange(len(step_size))
    return jnp.exp(jnp.interp(ladder.level - ladder.beta, levels, jnp.log(step_size)))


def warm_up(
    keys: Key[Array, "B"],
    F: LevelFn,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: Sampler,
    num_steps: int,
    target: float,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Adapts the step size on every level's marginal, along B passes that are thrown away.

    A level starts from sigma_bar_t, lengthened or shortened as the level above asked for.

    Returns:
      step size and acceptance of every level, as `sampling.adapt_step_size` has them.
    """

    def adapt(carry, level):
        x, factor = carry
        t = jnp.full(keys.shape, level)
        first = schedule.sigma_bar[level]

        def log_q(x):
            return level_log_density(F, x, t, schedule)

        step_size, acceptance, x = sampling.adapt_step_size(
            *(noise.fold(keys, level), sampler, log_q, x, level),
            *(first * factor, num_steps, target),
        )
        return (x, step_size / first), (step_size, acceptance)

    start = sampling.white_noise(keys, shape, schedule), 1.0
    _, adapted = jax.lax.scan(adapt, start, jnp.arange(schedule.T), reverse=True)
    return adapted


class Bound(NamedTuple):
    """What one direction says of log Z.

    Attributes:
      log_Z: log mean w, down; its negative, up [nats].
      std_error: of it, to first order: the relative standard error of mean w.
      effective_sample_size: (Σw)² / Σw².
      chains: how many.
      spread: standard deviation of log w [nats].
    """

    log_Z: float
    std_error: float
    effective_sample_size: float
    chains: int
    spread: float

    @property
    def meaningful(self) -> bool:
        """Whether more than a few chains decide; else its error is too small by far."""
        return self.effective_sample_size >= min(10, self.chains / 2)


class Partition(NamedTuple):
    """Stochastic bounds of level 0's log Z [nats].

    Attributes:
      lower: by annealing down.
      upper: by annealing up.
    """

    lower: Bound
    upper: Bound

    @property
    def gap(self) -> float:
        """How far the bounds are apart; below zero only by their errors."""
        return self.upper.log_Z - self.lower.log_Z


def partition(down: Float[np.ndarray, "n R"], up: Float[np.ndarray, "m R"]) -> Partition:
    """Bounds log Z from the gains of passes in either direction, summed in float64."""
    lower, upper = (bound(np.float64(gains).sum(axis=1)) for gains in (down, up))
    return Partition(lower, upper._replace(log_Z=-upper.log_Z))


def bound(log_w: Float[np.ndarray, "n"]) -> Bound:
    """Returns log mean w of the weights of n chains, and how much it is worth."""
    n, top = len(log_w), np.max(log_w)
    w = np.exp(log_w - top)
    ess = np.sum(w) ** 2 / np.sum(w**2)
    return Bound(
        float(top + np.log(np.mean(w))),
        math.sqrt(max(1 / ess - 1 / n, 0.0)),
        float(ess),
        n,
        float(np.std(log_w)),
    )


def noisy_log_density(
    keys: Key[Array, "B"],
    F: LevelFn,
    x: Float[Array, "B *D"],
    bin_width: float,
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B"], Float[Array, "B *D"]]:
    """Draws x_0 ~ N(a_bar_0 (x + u), sigma_bar_0²) of data x; returns log q_0(x_0) and x_0.

    The first, less log Z, is the model's log-density: of data with noise sigma_bar_0 in them,
    and with the noise u of dequantisation, uniform in ±bin_width / 2, if it learned from such.
    """
    t = jnp.zeros(keys.shape, jnp.int32)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], jnp.float32))
    u = bin_width * (uniform(noise.fold(keys, 0)) - 0.5)
    x_0 = diffusion.diffuse(noise.fold(keys, 1), x + u, t, schedule)
    return level_log_density(F, x_0, t, schedule), x_0


def log_volume(
    x_0: Float[Array, "B *D"], values: int, dequantised: bool, schedule: NoiseSchedule
) -> Float[Array, "B"]:
    """Returns what turns log p(x_0) into a bound for a discrete image x [nats].

        log P(x) ≥ E[ log p(x_0) + log P(x | x_0) - log q(x_0 | x) ]
                 = E[ log p(x_0) - Σ_pixels log Σ_v q(x_0 | v) ],       x_0 ~ q(x_0 | x)

    where q(x_0 | x) is the noise of `noisy_log_density`, v are the values that a pixel can
    have, and P(x | x_0) = q(x_0 | x) / Σ_v q(x_0 | v), pixel by pixel, is a decoder (Kingma et
    al. 2021, eq. 8). So the noise in x_0, the scaling to [-1, 1] and the pixels' being whole
    numbers are all accounted for. Where that noise is as wide as two values are apart, as it is
    for 8 bits even without u, this is the log-volume of a pixel's bin in x_0; bins that the
    model can tell apart cost it no more than they must.
    Bits a dimension are -log P(x) / (D log 2).

    Args:
      x_0: images with noise, whose pixels were -1 + 2 i / (values - 1).
      values: how many there are: 256 of 8 bits.
      dequantised: whether u, as wide as two values are apart, is in the noise.
      schedule: the noise levels.
    """
    a, sigma = schedule.a_bar[0], schedule.sigma_bar[0]
    bin_width = 2 / (values - 1)
    if dequantised:  # the bins lie side by side: all together they are one
        edge = a * (1 + bin_width / 2)
        inside, beyond = (
            jax.scipy.special.ndtr((end - jnp.abs(x_0)) / sigma) for end in (edge, -edge)
        )
        log_sum = jnp.log(inside - beyond) - jnp.log(a * bin_width)
    else:
        v = jnp.linspace(-1, 1, values, dtype=x_0.dtype)

        def add(i, total):
            return jnp.logaddexp(total, -(((x_0 - a * v[i]) / sigma) ** 2) / 2)

        total = jax.lax.fori_loop(0, values, add, jnp.full_like(x_0, -jnp.inf))
        log_sum = total - jnp.log(sigma) - math.log(2 * math.pi) / 2
    return -jnp.sum(log_sum, axis=range(1, x_0.ndim))
