"""The density of a model: log Z by annealed importance sampling, and log p of data.

Level t assigns x_t the unnormalised log-density log q_t(x) = F(a x, t) + D log a, where D is
the number of dimensions and a is `NoiseSchedule.y_scale`. Z_t is the integral of q_t, and Z
without an index is that of level 0. Two series of intermediate distributions lead from a
Gaussian, whose Z is 1, to level 0:

- `Path` leads through the levels. Level T is white noise, N(0, I). Between two levels lie the
  distributions

      log q = (1 - beta) log q_t + beta log q_{t-1},   0 <= beta < 1.

- `tempering` starts from a Gaussian much wider than white noise, and leads through tempered
  versions of level 0 at lower and lower temperatures. It uses no other level:

      log q = (1 - beta) log N(x; 0, s² I) + beta log q_0,   0 <= beta <= 1.

A move from one distribution to the next adds log q_next(x) - log q_previous(x) to the chain's
log-weight log w, and is followed by transitions that leave q_next invariant (Neal 2001). The
transitions must be exact (MALA or HMC), because biased transitions give no bound. Each
direction gives one bound of log Z:

- Lower bound, from a Gaussian to level 0: the chains start from exact samples, so E[w] = Z.
  Therefore the expectation of log mean w is at most log Z (Jensen's inequality), and log mean w
  exceeds log Z + c with probability at most exp(-c) (Markov's inequality). This holds however
  badly the chains mix.
- Upper bound, from level 0 to white noise: if the chains start from exact samples of q_0, then
  E[w] = 1 / Z, and -log mean w is at least log Z in expectation (Burda, Grosse, Salakhutdinov
  2015; Grosse, Ghahramani, Adams 2015). If instead all chains start in regions that contain a
  fraction m < 1 of q_0's probability, and cannot leave them, then -log mean w tends to
  log Z + log m, which is below log Z. No starting points are known to be exact samples of a
  trained energy. `Agreement` tests whether two sets of starting points contradict each other
  or the lower bounds.

Chains through the levels can only reach regions of level 0 that are also probable at the levels
above. Tempered chains do not have this limitation. They can reach regions within a few s of the
origin, unless these are improbable in the hotter versions. Both kinds of chains can miss a
narrow region that is far from all others; no finite number of chains rules this out.

The bounds differ if the chains have too few transitions to follow the distributions, not if
the model differs from the data.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float, Int, Key

from drl_jax import diffusion, noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.recovery import LevelFn
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Sampler

FALSE_ALARM = 1e-4  # probability that `Agreement` rejects exact starting points
SIGNIFICANCE = FALSE_ALARM / 3  # of each of its three tests
PILOT_FALSE_ALARM = 1e-6  # the same of `contradiction`, with fewer chains
PASSES = ("levels", "tempered", "from_data", "from_model")  # see `Partition`
ROUNDING = 0.01  # differences of log Z that rounding in float32 can cause [nats]


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

    def log_density(
        self, F: LevelFn, x: Float[Array, "B *D"], i: Int[Array, ""], schedule: NoiseSchedule
    ) -> Float[Array, "B"]:
        """Returns log q(x) of distribution i, up to a constant [nats]."""
        return intermediate_log_density(F, x, self.level[i], self.beta[i], schedule)


class Tempering(NamedTuple):
    """R hotter versions of level 0, from a Gaussian to level 0 itself.

    Attributes:
      beta: weight of level 0, from 0 to 1.
      width: standard deviation of each version if level 0 were N(0, sigma_bar_0² I); the first
        is that of the Gaussian.
    """

    beta: Float[Array, "R"]
    width: Float[Array, "R"]

    def log_density(
        self, F: LevelFn, x: Float[Array, "B *D"], i: Int[Array, ""], schedule: NoiseSchedule
    ) -> Float[Array, "B"]:
        """Returns log q(x) of version i, up to a constant [nats]."""
        return tempered_log_density(F, x, self.beta[i], self.width[0], schedule)


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


def tempering(num_distributions: int, std: float, schedule: NoiseSchedule) -> Tempering:
    """Returns num_distributions + 1 hotter versions of level 0, of widths `std` to sigma_bar_0.

    No region of level 0 is narrower than the noise in it, whose standard deviation is
    sigma_bar_0. If level 0 were a normal distribution of this width, the hotter versions would
    be normal too, and each would be narrower than the one before by the same factor.
    """
    u = jnp.linspace(0.0, 1.0, num_distributions + 1)
    log_ratio = 2 * jnp.log(std / schedule.sigma_bar[0])
    beta = jnp.expm1(u * log_ratio) / jnp.expm1(log_ratio)
    return Tempering(beta, std * jnp.exp(-u * log_ratio / 2))


def tempered_log_density(
    F: LevelFn,
    x: Float[Array, "B *D"],
    beta: Float[Array, ""],
    std: float | Float[Array, ""],
    schedule: NoiseSchedule,
) -> Float[Array, "B"]:
    """Returns log q(x) of a hotter version of level 0, up to a constant [nats].

    beta = 0 is N(0, std² I), normalised.
    """
    squares = jnp.sum(jnp.square(x / std), axis=range(1, x.ndim))
    gaussian = -squares / 2 - x[0].size * (jnp.log(std) + math.log(2 * math.pi) / 2)
    log_q_0 = level_log_density(F, x, jnp.zeros(len(x), jnp.int32), schedule)
    return (1 - beta) * gaussian + beta * log_q_0


class Segment(NamedTuple):
    """The result of R moves of chains from distribution to distribution.

    Attributes:
      x: last positions of the chains.
      log_weights: increment of log w by each move [nats]. Sum them in float64, since there can
        be thousands.
      log_density: log q(x) of each chain before each move, for the distribution q that the
        move starts from [nats].
      acceptance: mean acceptance probability of each move's transitions.
    """

    x: Float[Array, "B *D"]
    log_weights: Float[Array, "B R"]
    log_density: Float[Array, "B R"]
    acceptance: Float[Array, "B R"]


def anneal(
    keys: Key[Array, "B"],
    log_q: Callable[[Float[Array, "B *D"], Int[Array, ""]], Float[Array, "B"]],
    x: Float[Array, "B *D"],
    move: Int[Array, "R"],
    start: Int[Array, "R"],
    end: Int[Array, "R"],
    sampler: Sampler,
) -> Segment:
    """Moves chains from distribution start[i] to distribution end[i], for each i in turn.

    The indices are traced values, so one compiled program can make the moves of either
    direction.

    Args:
      keys: one key per chain.
      log_q: (x, i) -> log-density of distribution i, up to a constant.
      x: samples of the first distribution.
      move: number of each move, folded into the keys, so that the moves can be split into
        several calls at any point.
      start: index of the distribution that each move starts from.
      end: index of the distribution that each move leads to.
      sampler: exact transitions, K per move, tuned per distribution.
    """

    def make_move(x, indices):
        move, start, end = indices
        log_density = log_q(x, start)
        log_weight = log_q(x, end) - log_density
        x, acceptance = ladder.run_chain(
            noise.fold(keys, move),
            sampler,
            lambda x: log_q(x, end),
            position=x,
            t=jnp.full(keys.shape, end),
            steps=jnp.arange(sampler.K),
        )
        return x, (log_weight, log_density, acceptance)

    x, per_move = jax.lax.scan(make_move, x, (move, start, end))
    return Segment(x, *(values.T for values in per_move))


def interpolate_step_sizes(
    step_size: Float[Array, "G"], at: Float[Array, "R"]
) -> Float[Array, "R"]:
    """Interpolates G step sizes on a log scale, at the positions `at` between 0 and G - 1.

    Beyond G - 1 the step size is the last one. So white noise, which is level G, has the step
    size of level G - 1.
    """
    return jnp.exp(jnp.interp(at, jnp.arange(len(step_size)), jnp.log(step_size)))


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
    step_size, acceptance, _ = ladder.adapt_step_sizes(
        keys,
        sampler,
        lambda _, t: lambda x: level_log_density(F, x, t, schedule),
        start=ladder.white_noise(keys, shape, schedule),
        to_next_level=lambda x, _: x,
        step_size=schedule.sigma_bar[:-1],
        num_steps=num_steps,
        target=target,
    )
    return step_size, acceptance


def warm_up_tempered(
    keys: Key[Array, "B"],
    F: LevelFn,
    shape: tuple[int, ...],
    tempering: Tempering,
    schedule: NoiseSchedule,
    sampler: Sampler,
    num_steps: int,
    target: float,
) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
    """Adapts the step size at R hotter versions of level 0, on B chains that are discarded.

    The initial step size of a version is its width.

    Args:
      keys: one key per chain.
      F: log-density of the levels.
      shape: shape of one example.
      tempering: the hotter versions.
      schedule: noise levels.
      sampler: kernel to be tuned.
      num_steps: steps per version.
      target: mean acceptance probability to reach.

    Returns:
      the step size and the mean acceptance probability of every version, hottest first.
    """
    last = len(tempering.beta) - 1  # `adapt_step_sizes` goes from the last index to the first
    step_size, acceptance, _ = ladder.adapt_step_sizes(
        keys,
        sampler,
        lambda _, t: lambda x: tempering.log_density(F, x, last - t[0], schedule),
        start=tempering.width[0] * ladder.white_noise(keys, shape, schedule),
        to_next_level=lambda x, _: x,
        step_size=tempering.width[::-1],
        num_steps=num_steps,
        target=target,
    )
    return step_size[::-1], acceptance[::-1]


class Bound(NamedTuple):
    """An estimate of log Z from one pass of annealing.

    Attributes:
      log_Z: the estimate: log mean w of a pass from a Gaussian to level 0, -log mean w of a
        pass from level 0 to white noise [nats].
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


def bound(log_w: Float[np.ndarray, "n"]) -> Bound:
    """Returns log mean w of n chains, with its error and effective sample size."""
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


def contradiction(lower: Bound, upper: Bound) -> float:
    """Returns a p-value of the hypothesis that the upper bound's chains start from level 0.

    The mean weight of the lower bound's chains has the expectation Z. That of the upper bound's
    has the expectation 1 / Z if they start from exact samples of level 0. Both are independent,
    so their product has the expectation 1, and exceeds exp(c) with probability at most exp(-c)
    (Markov's inequality). Its logarithm is lower.log_Z - upper.log_Z. This holds for any number
    of chains, even if one of them carries all the weight; `Agreement.order` is more sensitive,
    but needs standard errors.
    """
    return math.exp(min(0.0, upper.log_Z - lower.log_Z))


class Agreement(NamedTuple):
    """P-values of the hypothesis that both upward passes start from exact samples of level 0.

    If the chains start from independent exact samples, each p-value is at most p with
    probability at most p, so `rejected` names a test with probability at most `FALSE_ALARM`.
    For `log_density` and `log_weight` this is exact. `order` assumes that log mean w is
    normally distributed with the standard error of `Bound`.

    Attributes:
      order: tests that each upper bound is at least each lower bound: four one-sided z-tests
        with Bonferroni's correction. Differences up to `ROUNDING` do not count.
      log_density: tests that log q_0 has the same distribution at the starting points of both
        passes (Kolmogorov-Smirnov).
      log_weight: tests that log w has the same distribution in both passes, in the same way.
    """

    order: float
    log_density: float
    log_weight: float

    @property
    def rejected(self) -> list[str]:
        """Names of the tests that reject the hypothesis."""
        return [name for name, p in self._asdict().items() if not p >= SIGNIFICANCE]  # or NaN


class Partition(NamedTuple):
    """Stochastic bounds of level 0's log Z [nats].

    `levels` and `tempered` are lower bounds without any condition. `from_data` and `from_model`
    are upper bounds if their chains start from exact samples of level 0.

    Attributes:
      levels: from white noise down through the levels.
      tempered: from a wide Gaussian through hotter versions of level 0.
      from_data: from data up through the levels, after moves on level 0.
      from_model: from the model's own samples up through the levels, after such moves.
      agreement: tests of the starting points of `from_data` and `from_model`.
    """

    levels: Bound
    tempered: Bound
    from_data: Bound
    from_model: Bound
    agreement: Agreement

    @property
    def lower(self) -> Bound:
        """The better lower bound; NaN if one of them is.

        This is the bound that is larger after subtracting two standard errors. The larger
        log_Z alone would often belong to the noisier bound.
        """
        return max(
            self.levels,
            self.tempered,
            key=lambda bound: _nan_last(
                bound._replace(log_Z=bound.log_Z - 2 * bound.std_error)
            ),
        )

    @property
    def upper(self) -> Bound:
        """The larger upper bound; NaN if one of them is."""
        return max(self.from_data, self.from_model, key=_nan_last)

    @property
    def gap(self) -> float:
        """Upper minus lower bound; negative only through their errors [nats]."""
        return self.upper.log_Z - self.lower.log_Z

    @property
    def detectable(self) -> float:
        """The smallest rise of log Z by undiscovered regions that would be noticed [nats].

        These are regions that only tempered chains reach. If they raise log Z by more than
        about this number, the test `Agreement.order` rejects the upper bounds.
        """
        upper = min(self.from_data, self.from_model, key=_nan_last)
        error = math.hypot(upper.std_error, self.tempered.std_error)
        deviations = float(scipy.stats.norm.isf(SIGNIFICANCE / 4))
        return upper.log_Z - self.tempered.log_Z + deviations * error + ROUNDING


def _nan_last(bound: Bound) -> tuple[bool, float]:
    """Returns a key that sorts bounds by log Z, with NaN after all numbers."""
    return math.isnan(bound.log_Z), bound.log_Z


def partition(
    levels: Float[np.ndarray, "n"],
    tempered: Float[np.ndarray, "n"],
    from_data: Float[np.ndarray, "n"],
    from_model: Float[np.ndarray, "n"],
    log_density: tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]],
) -> Partition:
    """Bounds log Z and tests the starting points.

    Args:
      levels: log w of each chain of the pass `levels` (see `Partition`).
      tempered: log w of each chain of the pass `tempered`.
      from_data: log w of each chain of the pass `from_data`.
      from_model: log w of each chain of the pass `from_model`.
      log_density: log q_0 of the starting points of `from_data` and of `from_model`.
    """
    down, hot = bound(levels), bound(tempered)
    data, own = (b._replace(log_Z=-b.log_Z) for b in map(bound, (from_data, from_model)))
    z = [
        (lower.log_Z - upper.log_Z - ROUNDING)
        / max(math.hypot(lower.std_error, upper.std_error), 1e-9)
        for lower in (down, hot)
        for upper in (data, own)
    ]
    agreement = Agreement(
        order=float(np.minimum(1.0, len(z) * scipy.stats.norm.sf(np.max(z)))),  # NaN stays NaN
        log_density=float(scipy.stats.ks_2samp(*log_density).pvalue),
        log_weight=float(scipy.stats.ks_2samp(from_data, from_model).pvalue),
    )
    return Partition(down, hot, data, own, agreement)


def resample(log_w: Float[np.ndarray, "N"], n: int, u: float) -> Int[np.ndarray, "n"]:
    """Draws n indices in proportion to their weights, by systematic resampling (Kitagawa 1996).

    Index i occurs n w_i / sum w times on average, and each time this number rounded up or
    down. Weights that are not finite count as zero.

    Args:
      log_w: log-weights.
      n: number of indices.
      u: random number in [0, 1).
    """
    finite = np.isfinite(log_w)
    w = np.where(finite, np.exp(log_w - np.max(log_w, where=finite, initial=-np.inf)), 0.0)
    cumulative = np.cumsum(w) / np.sum(w)
    return np.minimum(np.searchsorted(cumulative, (np.arange(n) + u) / n), len(w) - 1)


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
