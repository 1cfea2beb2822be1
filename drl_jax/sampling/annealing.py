"""The density of a model: log Z by annealed importance sampling, and log p of data.

Level t assigns x_t the unnormalised log-density log q_t(x) = F(a x, t) + D log a, where D is
the number of dimensions and a is `NoiseSchedule.y_scale`. Z_t is the integral of q_t. Level T
is white noise, N(0, I), whose Z is 1. Chains pass through the intermediate distributions
(t, beta) of a `Path`,

    log q = (1 - beta) log q_t + beta log q_{t-1},   0 <= beta < 1.

A move from one distribution to the next adds log q_next(x) - log q_previous(x) to the chain's
log-weight log w, and is followed by transitions that leave q_next invariant (Neal 2001). Each
direction bounds log Z of level 0:

- From white noise to level 0, starting from exact samples: E[w] = Z, so log mean w is at most
  log Z in expectation.
- From level 0 to white noise, starting from samples of q_0: E[w] = 1 / Z, so -log mean w is at
  least log Z in expectation (Burda, Grosse, Salakhutdinov 2015; Grosse, Ghahramani, Adams
  2015). This holds only as far as the starting points are samples of q_0; they come from
  transitions on q_0 that start from data.

The bounds differ if the chains have too few transitions to follow the distributions, not if
the model differs from the data. The transitions must be exact (MALA or HMC), because biased
transitions give no bound.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.recovery import LevelFn
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Sampler


def level_log_density(
    F: LevelFn, x: Float[Array, "B *D"], t: Int[Array, "B"], schedule: NoiseSchedule
) -> Float[Array, "B"]:
    """Returns log q_t(x), the unnormalised log-density of x_t, at levels t in 0..T [nats]."""
    D, T = x[0].size, schedule.T
    below = jnp.minimum(t, T - 1)
    a = schedule.y_scale(below)
    log_q = F(noise.per_example(a, x) * x, below) + D * jnp.log(a)
    squares = jnp.sum(jnp.square(x), axis=range(1, x.ndim))
    return jnp.where(t == T, -(squares + D * math.log(2 * math.pi)) / 2, log_q)


class Path(NamedTuple):
    """The R intermediate distributions, from white noise (T, 0) to data (0, 0).

    Attributes:
      level: t.
      beta: weight of level t - 1, in [0, 1).
    """

    level: Int[Array, "R"]
    beta: Float[Array, "R"]


def annealing_path(schedule: NoiseSchedule, num_distributions: int) -> Path:
    """Returns about this many intermediate distributions, evenly spaced in log sigma_bar.

    Every level is one of them. About normal data of variance 1, x_t contains

        log(1 + a_bar_t² / sigma_bar_t²) / 2 = -log sigma_bar_t

    nats of information per dimension, so equal steps of log sigma_bar are equal steps of
    information. The lowest levels are the farthest apart, even for T1k, where sigma_bar falls
    by a third from level 1 to level 0.
    """
    log_sigma_bar = np.log(np.asarray(schedule.sigma_bar, np.float64))
    share = np.diff(log_sigma_bar) / (log_sigma_bar[-1] - log_sigma_bar[0])
    # counts[t]: distributions from level t + 1 (included) to level t (excluded).
    counts = np.maximum(1, np.rint(num_distributions * share).astype(int))
    descending = np.arange(schedule.T)[::-1]
    level = np.repeat(descending + 1, counts[descending])
    beta = np.concatenate([np.arange(n) / n for n in counts[descending]])
    return Path(jnp.asarray(np.append(level, 0)), jnp.asarray(np.append(beta, 0.0)))


def intermediate_log_density(
    F: LevelFn,
    x: Float[Array, "B *D"],
    level: Int[Array, ""],
    beta: Float[Array, ""],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns log q(x) of one intermediate distribution, up to a constant [nats]."""

    def log_q(x, level):
        return level_log_density(F, x, jnp.full(x.shape[:1], level), schedule)

    return jax.lax.cond(
        beta == 0,  # true of most distributions if there are many levels; half the cost
        lambda x: log_q(x, level),
        lambda x: (1 - beta) * log_q(x, level) + beta * log_q(x, level - 1),
        x,
    )


class Segment(NamedTuple):
    """The result of R moves of chains along the path.

    Attributes:
      x: last positions of the chains.
      log_weights: increment of log w by each move [nats]. Sum them in float64, since there can
        be thousands.
      acceptance: mean acceptance probability of each move's transitions.
    """

    x: Float[Array, "B *D"]
    log_weights: Float[Array, "B R"]
    acceptance: Float[Array, "B R"]


def anneal(
    keys: Key[Array, "B"],
    F: LevelFn,
    x: Float[Array, "B *D"],
    move: Int[Array, "R"],
    start: Int[Array, "R"],
    end: Int[Array, "R"],
    path: Path,
    schedule: NoiseSchedule,
    sampler: Sampler,
) -> Segment:
    """Moves chains from distribution start[i] to end[i] of the path, for each i in turn.

    The indices are traced values, so one compiled program can make the moves of either
    direction.

    Args:
      keys: one key per chain.
      F: log-density of the levels.
      x: samples of the first distribution.
      move: number of each move, folded into the keys, so that the moves can be split into
        several calls at any point.
      start: indices of distributions on the path.
      end: indices of distributions on the path.
      path: intermediate distributions.
      schedule: noise levels.
      sampler: exact transitions, K per move, tuned per distribution (`interpolate_step_sizes`).
    """

    def log_q(x, i):
        return intermediate_log_density(F, x, path.level[i], path.beta[i], schedule)

    def make_move(x, indices):
        move, start, end = indices
        log_weight = log_q(x, end) - log_q(x, start)
        x, acceptance = ladder.run_chain(
            noise.fold(keys, move),
            sampler,
            lambda x: log_q(x, end),
            position=x,
            t=jnp.full(keys.shape, end),
            steps=jnp.arange(sampler.K),
        )
        return x, (log_weight, acceptance)

    x, (log_weights, acceptance) = jax.lax.scan(make_move, x, (move, start, end))
    return Segment(x, log_weights.T, acceptance.T)


def interpolate_step_sizes(step_size: Float[Array, "T"], path: Path) -> Float[Array, "R"]:
    """Interpolates the levels' step sizes, on a log scale, to the distributions of the path.

    White noise, level T, has the step size of level T - 1.
    """
    levels = jnp.arange(len(step_size))
    return jnp.exp(jnp.interp(path.level - path.beta, levels, jnp.log(step_size)))


def warm_up(
    keys: Key[Array, "B"],
    F: LevelFn,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    sampler: Sampler,
    num_steps: int,
    target: float,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Adapts the step size on every level's marginal, with B chains that are then discarded.

    The initial step size of level t is sigma_bar_t.

    Args:
      keys: one key per chain.
      F: log-density of the levels.
      shape: shape of one example.
      schedule: noise levels.
      sampler: kernel to be tuned.
      num_steps: steps per level.
      target: mean acceptance probability to reach.

    Returns:
      the step size and the mean acceptance probability of every level.
    """
    return ladder.adapt_step_sizes(
        keys,
        sampler,
        lambda _, t: lambda x: level_log_density(F, x, t, schedule),
        start=ladder.white_noise(keys, shape, schedule),
        to_next_level=lambda x, _: x,
        step_size=schedule.sigma_bar[:-1],
        num_steps=num_steps,
        target=target,
    )


class Bound(NamedTuple):
    """A stochastic bound of log Z from one direction.

    Attributes:
      log_Z: log mean w for the lower bound, -log mean w for the upper one [nats].
      std_error: its standard error to first order, the relative standard error of mean w.
      effective_sample_size: (sum w)² / sum w².
      chains: number of chains.
      spread: standard deviation of log w [nats].
    """

    log_Z: float
    std_error: float
    effective_sample_size: float
    chains: int
    spread: float

    @property
    def reliable(self) -> bool:
        """Whether enough chains contribute for the standard error to be reliable."""
        return self.effective_sample_size >= min(10, self.chains / 2)


class Partition(NamedTuple):
    """Stochastic bounds of level 0's log Z [nats].

    Attributes:
      lower: from annealing white noise to level 0.
      upper: from annealing level 0 to white noise.
    """

    lower: Bound
    upper: Bound

    @property
    def gap(self) -> float:
        """Upper minus lower bound; negative only through their errors [nats]."""
        return self.upper.log_Z - self.lower.log_Z


def partition(down: Float[np.ndarray, "n R"], up: Float[np.ndarray, "m S"]) -> Partition:
    """Bounds log Z, given what every move added to log w, in both directions [nats].

    Args:
      down: n chains from white noise to level 0.
      up: m chains from level 0 to white noise.
    """
    lower, upper = (bound(np.float64(log_w).sum(axis=1)) for log_w in (down, up))
    return Partition(lower, upper._replace(log_Z=-upper.log_Z))


def bound(log_w: Float[np.ndarray, "n"]) -> Bound:
    """Returns log mean w of n chains with log-weights log w, and statistics of the weights."""
    n, top = len(log_w), np.max(log_w)
    w = np.exp(log_w - top)
    ess = np.sum(w) ** 2 / np.sum(w**2)
    return Bound(
        log_Z=float(top + np.log(np.mean(w))),
        std_error=math.sqrt(max(1 / ess - 1 / n, 0.0)),
        effective_sample_size=float(ess),
        chains=n,
        spread=float(np.std(log_w)),
    )


def noisy_log_density(
    keys: Key[Array, "B"],
    F: LevelFn,
    x: Float[Array, "B *D"],
    bin_width: float,
    schedule: NoiseSchedule,
) -> tuple[Float[Array, "B"], Float[Array, "B *D"]]:
    """Draws x_0 ~ N(a_bar_0 (x + u), sigma_bar_0² I) and returns (log q_0(x_0), x_0).

    log q_0(x_0) - log Z is the model's log-density of data with the noise of level 0, and with
    the dequantisation noise u, uniform in ±bin_width / 2, for a model trained with it [nats].
    """
    t = jnp.zeros(keys.shape, jnp.int32)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], jnp.float32))
    u = bin_width * (uniform(noise.fold(keys, 0)) - 0.5)
    x_0 = diffusion.diffuse(noise.fold(keys, 1), x + u, t, schedule)
    return level_log_density(F, x_0, t, schedule), x_0


def log_volume(
    x_0: Float[Array, "B *D"], values: int, dequantised: bool, schedule: NoiseSchedule
) -> Float[Array, "B"]:
    """Returns the term that turns log p(x_0) into a bound for a discrete image x [nats].

        log P(x) >= E[ log p(x_0) + log P(x | x_0) - log q(x_0 | x) ]
                  = E[ log p(x_0) - sum_pixels log sum_v q(x_0 | v) ],     x_0 ~ q(x_0 | x)

    Here q(x_0 | x) is the noise of `noisy_log_density`, v are the possible values of a pixel,
    and the decoder is P(x | x_0) = q(x_0 | x) / sum_v q(x_0 | v), pixel by pixel (Kingma et
    al. 2021, eq. 8). This accounts for the noise in x_0, the scaling to [-1, 1] and the
    rounding of pixels. Where the noise is at least as wide as the distance between neighbouring
    values, as for 8 bits even without u, the term is about the log-volume of the bin of x in
    x_0; with narrower noise it is smaller. Bits per dimension are -log P(x) / (D log 2).

    Args:
      x_0: noisy images whose pixels were -1 + 2 i / (values - 1).
      values: number of possible values of a pixel: 256 for 8 bits.
      dequantised: whether the noise includes u, as wide as the distance between values.
      schedule: noise levels.
    """
    a, sigma = schedule.a_bar[0], schedule.sigma_bar[0]
    bin_width = 2 / (values - 1)
    if dequantised:  # the bins lie side by side, so their sum is one wide bin
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
