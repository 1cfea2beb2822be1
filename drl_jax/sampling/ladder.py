"""Sampling from the conditional of one level, and through all levels from T down to 0.

Generation (Gao et al. 2021, algorithm 2) starts from white noise x_T. At each level
t = T-1, ..., 0 it runs K Markov chain Monte Carlo steps on p(y | x_{t+1}), and sets
x_t = y / a_{t+1}. The chain starts at x_{t+1}, as in the paper (`start_at_x_tilde`), or at a
draw from an approximation of the conditional (`start_from_posterior`), which can be learned
(`start_from_initialiser`).

A chain that starts at x_{t+1} and keeps a fraction r of its starting point after K steps makes
only a fraction 1 - r of the step from level t + 1 to level t. With many levels and few steps,
the missing parts add up, and the samples remain noise. A draw from the approximate posterior
has the mean that the energy of level t + 1 implies, for any K, so no part of it is missing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from drl_jax import diffusion, noise, recovery
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.log_density import LogDensityFn, value_and_gradient
from drl_jax.recovery import LevelFn

# Folded into the keys of a level, for the noise of the starting points. Steps are numbered from
# 0, and there are fewer of them.
START = 2**31 - 1


def start_at_x_tilde(
    keys: Key[Array, "B"],
    conditionals: "Conditionals",
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
) -> Float[Array, "B *D"]:
    """Returns the starting points y = x_tilde of Gao et al. (2021), algorithm 2."""
    del keys, conditionals, t
    return x_tilde


def start_from_posterior(
    keys: Key[Array, "B"],
    conditionals: "Conditionals",
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
) -> Float[Array, "B *D"]:
    """Draws y = a_{t+1} x_t with x_t ~ q(x_t | x_{t+1}, x_hat), at levels t in 0..T-1.

    x_hat is the denoised x_tilde = x_{t+1}, according to the energy of level t + 1 (Tweedie's
    formula),

        x_hat = (x_tilde + sigma_bar_{t+1}² g) / a_bar_{t+1},   g = grad log p_{t+1}(x_tilde)
        log p_{t+1}(x) = F(a x, t + 1) + constant,   a = a_{t+2}, 1 at t = T - 2

    Inserted into `diffusion.posterior`, this gives

        y = x_tilde + sigma_{t+1}² g + a_{t+1} std z,   z ~ N(0, I)

    If g is the true score, the mean is exactly E[y | x_tilde], however far apart the levels
    are. The variance is that for known data, the smallest possible. For small sigma_{t+1} this
    is the normal approximation of Gao et al. (2021, section 3.3). z is scaled by the sampler's
    `noise_scale`, if it has one.

    At t = T - 1, where x_tilde is white noise, y = x_tilde.
    """
    schedule, tuning = conditionals.schedule, conditionals.sampler.tuning_at(t)
    above = jnp.minimum(t + 1, schedule.T - 1)
    a_above = noise.per_example(schedule.y_scale(above), x_tilde)
    _, g = value_and_gradient(lambda x: conditionals.F(a_above * x, above), x_tilde)
    variance = schedule.sigma[t + 1] ** 2
    std = schedule.a[t + 1] * diffusion.posterior_std(t, schedule)
    std *= tuning.get("noise_scale", 1.0)
    z = noise.normal(noise.fold(keys, START), x_tilde.shape[1:])
    y = x_tilde + noise.per_example(variance, x_tilde) * g + noise.per_example(std, z) * z
    return jnp.where(noise.per_example(t == schedule.T - 1, y), x_tilde, y)


def start_from_initialiser(
    keys: Key[Array, "B"],
    conditionals: "Conditionals",
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
) -> Float[Array, "B *D"]:
    """Draws y = g(x_tilde, t + 1) + a_{t+1} std z, z ~ N(0, I), at levels t in 0..T-1.

    g is the initialiser's prediction, `Conditionals.propose`. std is that of
    q(x_t | x_{t+1}, x), the same as in `start_from_posterior`, and a_{t+1} is 1 at t = T - 1
    (Zhu et al. 2024). z is scaled by the sampler's `noise_scale`, if it has one.
    """
    schedule, tuning = conditionals.schedule, conditionals.sampler.tuning_at(t)
    std = schedule.y_scale(t) * diffusion.posterior_std(t, schedule)
    std *= tuning.get("noise_scale", 1.0)
    z = noise.normal(noise.fold(keys, START), x_tilde.shape[1:])
    assert conditionals.propose is not None, "without an initialiser, there is no such start"
    return conditionals.propose(x_tilde, t) + noise.per_example(std, z) * z


# The values of config.mcmc.start.
STARTS: dict[str, "StartFn"] = {
    "x_tilde": start_at_x_tilde,
    "posterior": start_from_posterior,
    "initialiser": start_from_initialiser,
}


class Sampler(NamedTuple):
    """A Markov chain Monte Carlo kernel and its settings at every level.

    Attributes:
      init: (position, log_density_fn) -> State, from a module of `mcmc`.
      kernel: (keys, state, log_density_fn, **tuning) -> (State, Info), from the same module.
      tuning: the kernel's other arguments by name, one value per level: `step_size`, and
        `noise_scale` or `leapfrog` for the kernels that take them.
      K: number of steps per level. 0 if the starting points themselves are the samples.
      start: draws the starting point of every chain, one of `STARTS`.
      denoise: factor with which generated examples are `denoised` at the end; 0: they are not.
    """

    init: Callable[[Float[Array, "B *D"], LogDensityFn], Any]
    kernel: Callable[..., tuple[Any, Any]]
    tuning: dict[str, Shaped[Array, "T"]]
    K: int
    start: "StartFn" = start_at_x_tilde
    denoise: float = 0.0

    def tuning_at(self, t: Int[Array, "B"]) -> dict[str, Shaped[Array, "B"]]:
        """Returns the tuning of each chain, which is at level t."""
        return {name: values[t] for name, values in self.tuning.items()}


class Conditionals(NamedTuple):
    """The conditionals p(y | x_{t+1}) of all levels, and the sampler that draws from them.

    Attributes:
      F: log-density of every level, up to a constant.
      schedule: noise levels.
      sampler: Markov chain Monte Carlo kernel, tuned for each level.
      propose: the initialiser's prediction g of y, given (x_{t+1}, t); None without one.
    """

    F: LevelFn
    schedule: NoiseSchedule
    sampler: Sampler
    propose: "ProposeFn | None" = None

    def log_density_fn(self, x_tilde: Float[Array, "B *D"], t: Int[Array, "B"]) -> LogDensityFn:
        """Returns y -> log p(y | x_tilde), up to a constant, at levels t in 0..T-1 [nats]."""
        return lambda y: recovery.conditional_log_density(self.F, y, x_tilde, t, self.schedule)


# (x_{t+1}, t) -> prediction of y
ProposeFn = Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B *D"]]

# (keys of level t, conditionals, x_{t+1}, t) -> starting points y of the chains
StartFn = Callable[
    [Key[Array, "B"], Conditionals, Float[Array, "B *D"], Int[Array, "B"]],
    Float[Array, "B *D"],
]


def run_chain(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: LogDensityFn,
    position: Float[Array, "B *D"],
    t: Int[Array, "B"],
    steps: Int[Array, "K"],
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Runs Markov chains and returns their last positions and mean acceptance probabilities.

    Without steps, these are the starting points and 1.

    Args:
      keys: one key per chain.
      sampler: kernel; each chain uses the tuning of its level.
      log_density_fn: log-density to sample from, up to a constant.
      position: starting points.
      t: level of each chain.
      steps: numbers of the steps, folded into the keys. Two calls with steps 0..k and
        k+1..K-1 draw the same noise as one call with steps 0..K-1.
    """
    if not len(steps):  # initialising the chains would evaluate the network
        return position, jnp.ones_like(position, shape=t.shape)
    tuning = sampler.tuning_at(t)

    def step(carry, k):
        state, accepted = carry
        state, info = sampler.kernel(noise.fold(keys, k), state, log_density_fn, **tuning)
        return (state, accepted + info.acceptance), None

    start = sampler.init(position, log_density_fn), jnp.zeros_like(position, shape=t.shape)
    (state, accepted), _ = jax.lax.scan(step, start, steps)
    return state.position, accepted / len(steps)


def sample_conditional(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
    y: Float[Array, "B *D"] | None = None,
) -> tuple[Float[Array, "B *D"], Float[Array, "B"]]:
    """Runs the sampler's K steps on p(y | x_tilde), at levels t in 0..T-1.

    The chains start at y or, by default, where the sampler starts them.

    Returns:
      the last positions y, and the mean acceptance probability of each chain.
    """
    sampler, log_density_fn = conditionals.sampler, conditionals.log_density_fn(x_tilde, t)
    if y is None:
        y = sampler.start(keys, conditionals, x_tilde, t)
    return run_chain(keys, sampler, log_density_fn, y, t, jnp.arange(sampler.K))


def recover(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    x_tilde: Float[Array, "B *D"],
    t: Int[Array, "B"],
) -> Float[Array, "B *D"]:
    """Draws x_t given x_tilde = x_{t+1}: K steps on p(y | x_tilde), then x_t = y / a_{t+1}."""
    sampler, log_density_fn = conditionals.sampler, conditionals.log_density_fn(x_tilde, t)
    y = sampler.start(keys, conditionals, x_tilde, t)
    y, _ = run_chain(keys, sampler, log_density_fn, y, t, jnp.arange(sampler.K))
    return y / noise.per_example(conditionals.schedule.y_scale(t), y)


def white_noise(
    keys: Key[Array, "B"], shape: tuple[int, ...], schedule: NoiseSchedule
) -> Float[Array, "B *D"]:
    """Draws x_T ~ N(0, I) of this shape, one per key, in the precision of the schedule."""
    return noise.normal(noise.fold(keys, schedule.T), shape).astype(schedule.a.dtype)


# (keys of level t, conditionals, x_{t+1}, t) -> x_t
RecoverFn = Callable[
    [Key[Array, "B"], Conditionals, Float[Array, "B *D"], Int[Array, "B"]],
    Float[Array, "B *D"],
]


def descend(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    x: Float[Array, "B *D"],
    top: int | Int[Array, ""],
    bottom: int | Int[Array, ""],
    recover: RecoverFn = recover,
) -> Float[Array, "B *D"]:
    """Draws x_bottom given x = x_top, one level at a time, in one compiled loop.

    The noise of a level depends only on the example's key and the level, so descending from
    T to t and then from t to 0 gives the same samples as descending from T to 0. The levels
    are traced values, so other values need no new compilation.

    Args:
      keys: one key per example; an example depends only on its own key and x.
      conditionals: conditionals of all levels.
      x: x_top.
      top: level to start from, at most T.
      bottom: level to end at, in 0..top.
      recover: draws x_t given x_{t+1}; it gets one key per example, which depends on the level.
    """

    def step(i, x_tilde):
        level = top - 1 - i
        t = jnp.full(keys.shape, level)
        return recover(noise.fold(keys, level), conditionals, x_tilde, t)

    return jax.lax.fori_loop(0, top - bottom, step, x)


def generate(
    keys: Key[Array, "B"], conditionals: Conditionals, shape: tuple[int, ...]
) -> Float[Array, "B *D"]:
    """Draws x_0, one example of this shape per key (Gao et al. 2021, algorithm 2).

    x_0 is data with Gaussian noise of standard deviation sigma_bar_0, which the sampler can
    remove (`finished`).
    """
    schedule = conditionals.schedule
    x_T = white_noise(keys, shape, schedule)
    return finished(conditionals, descend(keys, conditionals, x_T, schedule.T, 0))


def complete(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    x: Float[Array, "B *D"],
    top: int | Int[Array, ""],
) -> Float[Array, "B *D"]:
    """Draws x_0 given x = x_top (`descend`), and finishes it."""
    return finished(conditionals, descend(keys, conditionals, x, top, 0))


def finished(conditionals: Conditionals, x_0: Float[Array, "B *D"]) -> Float[Array, "B *D"]:
    """Returns x_0, `denoised` if `Sampler.denoise` is not 0."""
    factor = conditionals.sampler.denoise
    return denoised(conditionals, x_0, factor) if factor else x_0


def denoised(
    conditionals: Conditionals,
    x_t: Float[Array, "B *D"],
    factor: float = 1.0,
    t: Int[Array, "B"] | None = None,
) -> Float[Array, "B *D"]:
    """Removes the noise from x_t by Tweedie's formula (Efron 2011).

        (x_t + factor sigma_bar_t² grad log p_t(x_t)) / a_bar_t
        log p_t(x) = F(a_{t+1} x, t) + constant,   the factor of x is 1 at t = T - 1

    With factor 1, this is the mean of the data given x_t. The program of Zhu et al. (2024) uses
    2, with which it is not. The cost is one gradient.

    Args:
      conditionals: conditionals of all levels.
      x_t: noisy examples.
      factor: factor of the step.
      t: level of each example in 0..T-1; None: all are at level 0.
    """
    schedule = conditionals.schedule
    t = jnp.zeros(len(x_t), jnp.int32) if t is None else t
    a = noise.per_example(schedule.y_scale(t), x_t)
    _, g = value_and_gradient(lambda x: conditionals.F(a * x, t), x_t)
    return tweedie(x_t, g, t, schedule, factor)


def tweedie(
    x_t: Float[Array, "B *D"],
    score: Float[Array, "B *D"],
    t: Int[Array, "B"],
    schedule: NoiseSchedule,
    factor: float = 1.0,
) -> Float[Array, "B *D"]:
    """Returns (x_t + factor sigma_bar_t² score) / a_bar_t, the formula of `denoised`.

    Args:
      x_t: noisy examples.
      score: grad log p_t(x_t).
      t: level of each example in 0..T-1.
      schedule: noise levels.
      factor: factor of the step.
    """
    step = noise.per_example(factor * schedule.sigma_bar[t] ** 2, x_t)
    return (x_t + step * score) / noise.per_example(schedule.a_bar[t], x_t)


class Adapted(NamedTuple):
    """The result of a warm-up. The arrays may be numpy arrays.

    Attributes:
      step_size: adapted step size of every level.
      acceptance: mean acceptance probability over the second half of the warm-up.
      correlation: fraction of its starting point that a chain keeps after the sampler's K steps
        with the adapted step size (`remaining_correlation`).
    """

    step_size: Float[Array, "T"]
    acceptance: Float[Array, "T"]
    correlation: Float[Array, "T"]


def warm_up(
    keys: Key[Array, "B"],
    conditionals: Conditionals,
    shape: tuple[int, ...],
    num_steps: int,
    target: float,
) -> Adapted:
    """Adapts the step size of every conditional, with B chains that are then discarded.

    The acceptance exceeds the target where the step size is the largest, `quarter_turn`.

    Args:
      keys: one key per chain.
      conditionals: conditionals of all levels, and the kernel to be tuned.
      shape: shape of one example.
      num_steps: steps per level.
      target: mean acceptance probability to reach.
    """
    schedule, sampler = conditionals.schedule, conditionals.sampler
    return adapt_step_sizes(
        keys,
        sampler,
        conditionals.log_density_fn,
        start=white_noise(keys, shape, schedule),
        to_next_level=lambda y, t: y / noise.per_example(schedule.y_scale(t), y),
        step_size=sampler.tuning["step_size"],
        num_steps=num_steps,
        target=target,
        max_step_size=quarter_turn(sampler, schedule),
        begin=lambda keys, x, t: sampler.start(keys, conditionals, x, t),
    )


def quarter_turn(sampler: Sampler, schedule: NoiseSchedule) -> Float[Array, "T"]:
    """Returns the step size with which HMC makes a quarter turn on every conditional.

    Where p(y | x_tilde) is Gaussian with standard deviation s in all directions, a trajectory
    of L steps of size pi s / (2 L) ends at a position that is independent of its start. A
    longer one only costs acceptance, and returns to its start if it is four times as long. If F
    is log-concave, s is at most sigma_{t+1} in every direction, so a trajectory need not be
    longer than for s = sigma_{t+1}. At t = T - 1, where nothing ties y to x_tilde, p is close
    to white noise, whose standard deviation 1 is about sigma_T.

    For kernels without trajectories of two or more steps, there is no such step size, and the
    result is infinite.
    """
    leapfrog = sampler.tuning.get("leapfrog", jnp.ones(schedule.T))
    step_size = math.pi / 2 * schedule.sigma[1:] / leapfrog
    return jnp.where(leapfrog > 1, step_size, jnp.inf)


def adapt_step_sizes(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: Callable[[Float[Array, "B *D"], Int[Array, "B"]], LogDensityFn],
    start: Float[Array, "B *D"],
    to_next_level: Callable[[Float[Array, "B *D"], Int[Array, "B"]], Float[Array, "B *D"]],
    step_size: Float[Array, "T"],
    num_steps: int,
    target: float,
    max_step_size: float | Float[Array, "T"] = math.inf,
    begin: Callable[[Key[Array, "B"], Float[Array, "B *D"], Int[Array, "B"]], Any] = (
        lambda keys, x, t: x
    ),
) -> Adapted:
    """Adapts the step size of every level in turn, from T - 1 down to 0.

    A level starts from its own initial step size, multiplied by the factor by which the level
    above changed its own.

    Args:
      keys: one key per chain.
      sampler: kernel to be tuned.
      log_density_fn: (starting points, t) -> log-density to sample at level t.
      start: starting points at level T - 1.
      to_next_level: (last positions at level t, t) -> starting points at level t - 1.
      step_size: initial step sizes.
      num_steps: steps per level.
      target: mean acceptance probability to reach.
      max_step_size: largest step sizes.
      begin: (keys of level t, starting points, t) -> where the chains of level t begin; by
        default at the starting points.
    """
    largest = jnp.broadcast_to(max_step_size, step_size.shape)

    def adapt(carry, level):
        x, factor = carry
        t = jnp.full(keys.shape, level)
        level_keys, log_density = noise.fold(keys, level), log_density_fn(x, t)
        x = begin(level_keys, x, t)
        adapted, acceptance, y = adapt_step_size(
            level_keys,
            sampler,
            log_density,
            position=x,
            t=level,
            step_size=step_size[level] * factor,
            num_steps=num_steps,
            target=target,
            max_step_size=largest[level],
        )
        tuning = sampler.tuning | {"step_size": jnp.full_like(step_size, adapted)}
        correlation = remaining_correlation(
            level_keys,
            sampler._replace(tuning=tuning),
            log_density,
            starts=jnp.stack([x, y]),
            t=t,
            steps=num_steps + jnp.arange(sampler.K),
        )
        next_level = to_next_level(y, t), adapted / step_size[level]
        return next_level, Adapted(adapted, acceptance, correlation)

    levels = jnp.arange(len(step_size))
    _, adapted = jax.lax.scan(adapt, (start, 1.0), levels, reverse=True)
    return adapted


def adapt_step_size(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: LogDensityFn,
    position: Float[Array, "B *D"],
    t: Int[Array, ""],
    step_size: Float[Array, ""],
    num_steps: int,
    target: float,
    max_step_size: float | Float[Array, ""] = math.inf,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B *D"]]:
    """Finds the step size at which the chains' mean acceptance probability is the target.

    Stochastic approximation (Robbins and Monro 1951): for step k = 1..num_steps,

        log s <- min(log s + (acceptance - target) / k^0.6, log max_step_size)

    The result is exp of the mean of log s over the second half of the steps. A chain whose step
    size changes has no stationary distribution, so these chains are for adaptation only.

    Args:
      keys: one key per chain.
      sampler: kernel to be tuned.
      log_density_fn: log-density to sample from, up to a constant.
      position: starting points.
      t: level, whose other settings of the kernel are used.
      step_size: initial step size.
      num_steps: number of steps.
      target: mean acceptance probability to reach.
      max_step_size: largest step size, at which the acceptance may exceed the target.

    Returns:
      the step size, the mean acceptance probability over the second half of the steps, and
      the last positions.
    """
    tuning = {name: jnp.broadcast_to(v[t], keys.shape) for name, v in sampler.tuning.items()}
    half = num_steps // 2

    def step(carry, k):
        state, log_s, sums = carry
        tuning["step_size"] = jnp.broadcast_to(jnp.exp(log_s), keys.shape)
        state, info = sampler.kernel(noise.fold(keys, k), state, log_density_fn, **tuning)
        acceptance = jnp.mean(info.acceptance)
        sums += jnp.where(k >= half, jnp.stack([log_s, acceptance]), 0.0)
        log_s += (acceptance - target) / (k + 1) ** 0.6
        return (state, jnp.minimum(log_s, jnp.log(max_step_size)), sums), None

    log_s = jnp.log(jnp.minimum(step_size, max_step_size))
    start = sampler.init(position, log_density_fn), log_s, jnp.zeros(2)
    (state, _, sums), _ = jax.lax.scan(step, start, jnp.arange(num_steps))
    log_s, acceptance = sums / (num_steps - half)
    return jnp.exp(log_s), acceptance, state.position


def remaining_correlation(
    keys: Key[Array, "B"],
    sampler: Sampler,
    log_density_fn: LogDensityFn,
    starts: Float[Array, "2 B *D"],
    t: Int[Array, "B"],
    steps: Int[Array, "K"],
) -> Float[Array, ""]:
    """Estimates which fraction of its starting point a chain keeps after K steps.

    Runs two chains on the same density from each pair of starting points. With d the difference
    between these, and d' that between the ends, the estimate is a sum over chains and pixels,

        r = sum(d d') / sum(d²)

    If the expected end is an affine function of the start, as for a Gaussian density, then
    E d' = rho d along each principal axis, where rho is the correlation of a stationary chain
    with itself K steps earlier; and r is the mean of rho, weighted by d². The mean of the
    density is not needed, and the starting points need not be samples. Both chains have the
    same noise: this does not change E d', and makes r more precise.

    A direction in which the starting points do not differ has no weight. If they do not differ
    at all, r is 1.

    Args:
      keys: one key per pair.
      sampler: kernel; each chain uses the tuning of its level.
      log_density_fn: log-density to sample from, up to a constant.
      starts: first and second starting points of the pairs.
      t: level of each pair.
      steps: numbers of the K steps, folded into the keys.
    """

    def end(start):
        return run_chain(keys, sampler, log_density_fn, start, t, steps)[0]

    before, after = (a - b for a, b in (starts, jax.lax.map(end, starts)))
    squares = jnp.sum(before**2)
    return jnp.where(squares > 0, jnp.sum(before * after) / squares, 1.0)
