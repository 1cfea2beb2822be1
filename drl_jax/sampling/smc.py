"""Sequential Monte Carlo (SMC): the posterior given an observation, and its evidence.

The posterior of level 0 is

    p(x_0 | observed) = p(observed | x_0) exp(F_0(x_0)) / Z,   Z = evidence * Z_prior

where exp(F_0), with the integral Z_prior, is the model's density. Particles descend through the
levels, with the targets

    log pi_t(x) = log q_t(x) + lambda_t log p(observed | x_hat_t(x)),   t = T-1, ..., 0

- log q_t is the model's log-density of x_t (`annealing.level_log_density`).
- x_hat_t is the data that Tweedie's formula expects (`ladder.denoised`). At level 0 it is x
  itself, so the likelihood is exact there.
- lambda_t = w² / (w² + v_t) weakens the likelihood of an estimate by its variance v_t, that of
  normal data. w is the width of the likelihood, and lambda_0 = 1.

**Proposals.** From x_{t+1}, a particle draws y = a_{t+1} x_t from a Gaussian r, with the mean
x_{t+1} + sigma_{t+1}² g, g = grad log pi_{t+1}(x_{t+1}). This is E[y | x_{t+1}], if pi_{t+1} is
the density of noisy pi_t. The variance of each pixel is sigma_{t+1}² (1 - sigma_{t+1}² E g²),
with the mean over the particles. Under the same condition, this is the mean of
Var[y | x_{t+1}] (Bao et al. 2022).

**Weights.** The pair (x_{t+1}, y) has the target pi_t(y) N(x_{t+1}; y, sigma_{t+1}²), whose
marginal is pi_t, and the proposal pi_{t+1}(x_{t+1}) r(y). Between them lead B bridges,

    log gamma_b = (1 - b / B) log(pi_{t+1} r) + b / B log(pi_t N),   b = 1, ..., B

and each adds log gamma_b - log gamma_{b-1} to the log-weights. Particles are resampled if their
effective sample size is below half of their number. Then K transitions of MALA or HMC move y,
and leave gamma_b invariant (Del Moral, Doucet, Jasra 2006).

Z is estimated by the mean weight, and by the same particles without a likelihood, Z_prior. So
the evidence, their ratio, needs no partition function. As the number of particles grows, the
weighted particles and the evidence become exact, for any energies, consistent or not. With few
particles, those of one problem descend from few ancestors, and so resemble each other.

Levels are in one loop; the memory does not depend on their number.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from drl_jax import noise
from drl_jax.diffusion import NoiseSchedule
from drl_jax.mcmc.hmc import State
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.sampling import annealing, ladder
from drl_jax.sampling.ladder import Conditionals

PARTICLES = 64  # by default
LEAST = 16  # particles that estimate the variance of the proposals
BRIDGES = 100  # of all levels together, by default, if there are fewer levels
WIDTH = 0.1  # by default [pixel values in [-1, 1]]
# Variance of data that v_t assumes. Without weights, it is about that of a pixel given most
# others; with weights, the largest possible, with which they vary less.
VARIANCE = {"approximate": 0.05, "weighted": 1.0}
TARGET = 0.65  # mean acceptance probability that the step sizes lead to
FIRST_STEP = 0.5  # first step size, in standard deviations of the proposal
RATE = 0.5  # change of a step size's logarithm per unit of acceptance
LARGEST_STEP = 2.0  # largest step size, in the same unit

# (x [n, ...]) -> log p(observed | x) [n]. A pytree, such as `jax.tree_util.Partial`; its arrays
# have one entry per problem along their first axis.
LogLikelihood = Callable[[Any], Any]


def as_pytree(log_likelihood: LogLikelihood) -> LogLikelihood:
    """Returns the likelihood as a pytree: of a plain function, one without arrays."""
    plain = jax.tree_util.all_leaves([log_likelihood])
    return Partial(log_likelihood) if plain else log_likelihood


class Share(NamedTuple):
    """How the particles are divided among devices; by default, one device has all of them.

    Attributes:
      gather: array [n, ...] of this device's particles -> [N, ...] of all particles.
      own: array [N, ...] of all particles -> [n, ...] of this device's.
    """

    gather: Callable[[Any], Any] = lambda x: x
    own: Callable[[Any], Any] = lambda x: x


ALONE = Share()


class Posterior(NamedTuple):
    """Weighted particles of P problems. The arrays may be numpy arrays.

    Attributes:
      x: particles of level 0.
      log_weights: their log-weights; the mean weight estimates Z [nats].
      log_likelihood: log p(observed | x) of each particle [nats].
      effective_sample_size: (sum w)² / sum w² at each level, before resampling; the smallest of
        its bridges. The same for all particles.
      acceptance: mean acceptance probability at each level. The same for all particles.
    """

    x: Float[Array, "N P *D"]
    log_weights: Float[Array, "N P"]
    log_likelihood: Float[Array, "N P"]
    effective_sample_size: Float[Array, "N P T"]
    acceptance: Float[Array, "N P T"]


def tempering(
    schedule: NoiseSchedule, width: float | Array, variance: float | Array
) -> Float[Array, "T"]:
    """Returns lambda_t, the exponent of the likelihood, at levels 0..T-1.

    The arguments are those of `descend`.
    """
    noise, signal = schedule.sigma_bar[:-1] ** 2, variance * schedule.a_bar[:-1] ** 2
    variance = variance * noise / (signal + noise)
    exponent = width**2 / (width**2 + variance)
    return exponent.at[0].set(1.0)


def log_target(
    conditionals: Conditionals,
    log_likelihood: LogLikelihood,
    x: Float[Array, "N P *D"],
    t: Int[Array, ""],
    exponent: Float[Array, ""],
) -> Float[Array, "N P"]:
    """Returns log pi_t(x), at level t in 0..T-1 [nats]."""
    schedule, shape = conditionals.schedule, x.shape
    flat = x.reshape(-1, *shape[2:])
    levels = jnp.full(len(flat), t)
    log_q, g = value_and_gradient(
        lambda x: annealing.level_log_density(conditionals.F, x, levels, schedule), flat
    )
    x_hat = jnp.where(t == 0, flat, ladder.tweedie(flat, g, levels, schedule)).reshape(shape)
    return log_q.reshape(shape[:2]) + exponent * _evaluate(log_likelihood, x_hat)


def _evaluate(log_likelihood: LogLikelihood, x: Float[Array, "N P *D"]) -> Float[Array, "N P"]:
    """Returns log p(observed | x), each problem with its own observation."""
    return jax.vmap(lambda likelihood, x: likelihood(x), (0, 1), 1)(log_likelihood, x)


def effective_sample_size(log_w: Float[Array, "N *P"]) -> Float[Array, "*P"]:
    """Returns (sum w)² / sum w² of each problem; 0 if all weights are 0 or one is NaN."""
    w = jax.nn.softmax(log_w, axis=0)
    return jnp.nan_to_num(1 / jnp.sum(w**2, axis=0))


def log_mean_weight(posterior: Posterior) -> Float[np.ndarray, "P"]:
    """Returns the logarithm of each problem's mean weight, which estimates Z [nats]."""
    return np.logaddexp.reduce(posterior.log_weights) - math.log(len(posterior.log_weights))


def log_evidence(
    posterior: Posterior, prior: Posterior, problems: int
) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Returns log p(observed) of P problems, and its standard error [nats].

    It is the logarithm of the ratio of two estimates of Z, with the likelihood and without,
    each the mean of several runs. The error is that of their spread: the weights of a single
    run do not tell how far off their mean is, as its particles have common ancestors.

    Args:
      posterior: R runs of each problem, R >= 2; that of number r P + p is run r of problem p.
      prior: two or more runs without a likelihood, with a `strength` of 0.
      problems: P.
    """
    log_Z = log_mean_weight(posterior).reshape(-1, problems).T
    (*bounds, of_prior) = map(annealing.bound, [*log_Z, log_mean_weight(prior)])
    variances = [b.std_error**2 * b.chains / (b.chains - 1) for b in (*bounds, of_prior)]
    return (
        np.array([b.log_Z - of_prior.log_Z for b in bounds]),
        np.sqrt(np.array(variances[:-1]) + variances[-1]),
    )


def unweighted(n: int, devices: int) -> int:
    """Returns how many particles without weights yield n samples on a number of devices."""
    return -(-max(n, LEAST) // devices) * devices


def draws(
    posterior: Posterior, n: int, u: Float[np.ndarray, "P"]
) -> Float[np.ndarray, "n P *D"]:
    """Draws n of the particles of each problem, in proportion to their weights.

    Args:
      posterior: N weighted particles, as numpy arrays.
      n: number of draws.
      u: random numbers in [0, 1), one per problem.
    """
    columns = zip(posterior.log_weights.T, u, strict=True)
    indices = [annealing.resample(log_w, n, float(of_one)) for log_w, of_one in columns]
    return np.asarray(posterior.x)[np.transpose(indices), np.arange(len(u))]


def ancestors(log_w: Float[Array, "N"], u: Float[Array, ""]) -> Int[Array, "N"]:
    """Draws N indices in proportion to their weights, by systematic resampling.

    (Kitagawa 1996.) Index i occurs N w_i / sum w times on average, and each time this number
    rounded up or down.

    Args:
      log_w: log-weights.
      u: random number in [0, 1).
    """
    N = len(log_w)
    cumulative = jnp.cumsum(jax.nn.softmax(log_w))
    places = (jnp.arange(N) + u) / N
    indices = jnp.searchsorted(cumulative / cumulative[-1], places, side="right")
    return jnp.minimum(indices, N - 1)


def _resample(keys, tree, log_w, share):
    """Resamples the particles of the problems whose effective sample size is below half.

    Args:
      keys: one key per problem.
      tree: arrays [n, P, ...] of this device's particles.
      log_w: log-weights [N, P] of all particles.
      share: how the particles are divided among devices.
    """
    N = len(log_w)
    few = effective_sample_size(log_w) < N / 2
    drawn = jax.vmap(ancestors, (1, 0), 1)(log_w, noise.uniform(keys))
    indices = share.own(jnp.where(few, drawn, jnp.arange(N)[:, None]))
    mean = jax.nn.logsumexp(log_w, axis=0) - math.log(N)

    def select(x):
        return jax.vmap(lambda x, i: x[i], 1, 1)(share.gather(x), indices)

    return jax.tree.map(select, tree), share.own(jnp.where(few, mean, log_w))


class _Proposal(NamedTuple):
    """The Gaussian r from which y is drawn, and the particles x_{t+1} that it starts from.

    Attributes:
      x_tilde: x_{t+1}.
      log_pi: log pi_{t+1}(x_{t+1}).
      mean, std: of r.
    """

    x_tilde: Float[Array, "n P *D"]
    log_pi: Float[Array, "n P"]
    mean: Float[Array, "n P *D"]
    std: Float[Array, "n P *D"]

    def log_density(self, y: Float[Array, "n P *D"]) -> Float[Array, "n P"]:
        """Returns log(pi_{t+1} r)."""
        return self.log_pi + _log_normal(y, self.mean, self.std)

    def gradient(self, y: Float[Array, "n P *D"]) -> Float[Array, "n P *D"]:
        """Returns the gradient of log r."""
        return (self.mean - y) / self.std**2


def _log_normal(x: Array, mean: Array, std: Array) -> Float[Array, "n P"]:
    """Returns the log-density of independent normal variables, summed over an example."""
    per_pixel = -(jnp.square((x - mean) / std) + math.log(2 * math.pi)) / 2 - jnp.log(std)
    return jnp.sum(per_pixel, axis=range(2, per_pixel.ndim))


def _state(log_density: Callable[[Array], Array], y: Float[Array, "n P *D"]) -> State:
    """Returns the state of particles: y, the log-density [n, P] and its gradient."""
    log_p, vjp = jax.vjp(log_density, y)
    return State(y, log_p, vjp(jnp.ones_like(log_p))[0])


def _interpolated(a: State, weight: float | Array, b: State, weight_b: float | Array) -> State:
    """Returns the state of the weighted sum of two log-densities, at the position of a."""
    return State(
        a.position,
        weight * a.log_density + weight_b * b.log_density,
        weight * a.gradient + weight_b * b.gradient,
    )


def descend(
    keys: Key[Array, "n P"],
    problem_keys: Key[Array, "P"],
    conditionals: Conditionals,
    log_likelihood: LogLikelihood,
    shape: tuple[int, ...],
    width: float | Float[Array, ""],
    variance: float | Float[Array, ""],
    strength: float | Float[Array, ""],
    bridges: int | Int[Array, ""],
    correction: float | Float[Array, ""] = 1.0,
    share: Share = ALONE,
) -> Posterior:
    """Moves the particles of P problems from white noise to level 0.

    Args:
      keys: one key per particle of this device.
      problem_keys: one key per problem, the same on all devices.
      conditionals: energies, noise levels, and an exact kernel (MALA or HMC) with its number of
        transitions K per bridge. Its step sizes are adapted to the particles.
      log_likelihood: log p(observed | x) of each problem.
      shape: shape of one example.
      width: w, the standard deviation that the likelihood leaves to pixels. It changes the
        errors of the results, but not what they converge to.
      variance: variance of data that v_t assumes; it has no influence on the limit, either.
      strength: factor of the log-likelihood: 1, or 0 to estimate Z_prior.
      bridges: B, the number of bridges per level, at least 1.
      correction: factor of the log-weights: 1, or 0 for particles that are not resampled.
      share: how the particles are divided among devices.
    """
    schedule, sampler = conditionals.schedule, conditionals.sampler
    T, (n, P) = schedule.T, keys.shape
    exponents = strength * tempering(schedule, width, variance)

    def flat(tree):
        return jax.tree.map(lambda x: x.reshape(n * P, *x.shape[2:]), tree)

    def split(tree):
        return jax.tree.map(lambda x: x.reshape(n, P, *x.shape[1:]), tree)

    flat_keys = flat(keys)

    def descend_one(i, carry):
        x_tilde, log_pi, gradient, log_w, log_step, sizes, acceptances = carry
        t = T - 1 - i
        top, a, sigma = t == T - 1, schedule.y_scale(t), schedule.sigma[t + 1]
        level_keys, resampling_keys = noise.fold(flat_keys, t), noise.fold(problem_keys, t)

        log_volume = math.prod(shape) * jnp.log(a)  # of y = a x_t

        # At the top, x_tilde is white noise, independent of y.
        w = jax.nn.softmax(share.gather(log_w), axis=0)
        fisher = jnp.einsum("np,np...->p...", w, jnp.square(share.gather(gradient)))
        smallest = (a * sigma * schedule.sigma_bar[t] / schedule.sigma_bar[t + 1]) ** 2
        squares = jnp.clip(sigma**2 * (1 - sigma**2 * fisher), smallest, sigma**2)
        std = jnp.broadcast_to(jnp.where(top, 1.0, jnp.sqrt(squares)), x_tilde.shape)
        mean = jnp.where(top, 0.0, x_tilde + sigma**2 * gradient)
        proposal = _Proposal(x_tilde, log_pi, mean, std)
        scale = jnp.mean(std, axis=(0, *range(2, std.ndim)))  # of each problem's step sizes

        def tie(y, x_tilde):
            """Returns log N(x_tilde; y, sigma²), at the top log N(x_tilde; 0, 1)."""
            return _log_normal(x_tilde, jnp.where(top, 0.0, y), jnp.where(top, 1.0, sigma))

        def log_pair(y, x_tilde):
            log_pi = log_target(conditionals, log_likelihood, y / a, t, exponents[t])
            return log_pi - log_volume + tie(y, x_tilde)

        def bridge(b, carry):
            proposal, pair, log_w, log_step, smallest, acceptance = carry
            beta = (b + 1) / bridges
            difference = pair.log_density - proposal.log_density(pair.position)
            log_w = share.gather(log_w + correction * difference / bridges)
            smallest = jnp.minimum(smallest, effective_sample_size(log_w))
            (proposal, pair), log_w = _resample(
                noise.fold(resampling_keys, b), (proposal, pair), log_w, share
            )

            def of_proposal(y):
                return State(y, proposal.log_density(y), proposal.gradient(y))

            def log_gamma(y):
                y = split(y)
                log_r = proposal.log_density(y)
                return flat(beta * log_pair(y, proposal.x_tilde) + (1 - beta) * log_r)

            def transition(carry, k):
                state, log_step = carry
                tuning = sampler.tuning_at(jnp.full(n * P, t))
                step_size = jnp.broadcast_to(jnp.exp(log_step) * scale, (n, P))
                tuning["step_size"] = flat(step_size)
                step_keys = noise.fold(noise.fold(level_keys, b + 1), k)
                state, info = sampler.kernel(step_keys, state, log_gamma, **tuning)
                accepted = jnp.mean(share.gather(split(info.acceptance)), axis=0)
                log_step = log_step + RATE * (accepted - TARGET)
                return (state, jnp.minimum(log_step, math.log(LARGEST_STEP))), accepted

            state = _interpolated(pair, beta, of_proposal(pair.position), 1 - beta)
            (state, log_step), accepted = jax.lax.scan(
                transition, (flat(state), log_step), jnp.arange(sampler.K)
            )
            state = split(state)
            pair = _interpolated(state, 1 / beta, of_proposal(state.position), 1 - 1 / beta)
            acceptance += jnp.sum(accepted, axis=0) / (bridges * max(1, sampler.K))
            return proposal, pair, log_w, log_step, smallest, acceptance

        y = mean + std * split(noise.normal(noise.fold(level_keys, 0), shape))
        pair = _state(lambda y: log_pair(y, x_tilde), y)
        zeros = jnp.zeros_like(log_step)
        proposal, pair, log_w, log_step, smallest, acceptance = jax.lax.fori_loop(
            0, bridges, bridge, (proposal, pair, log_w, log_step, zeros + jnp.inf, zeros)
        )
        # log pi_t and its gradient, as a function of x_t = y / a.
        tied = _state(lambda y: tie(y, proposal.x_tilde), pair.position)
        log_pi = pair.log_density - tied.log_density + log_volume
        gradient = a * (pair.gradient - tied.gradient)
        sizes, acceptances = sizes.at[t].set(smallest), acceptances.at[t].set(acceptance)
        return pair.position / a, log_pi, gradient, log_w, log_step, sizes, acceptances

    x_T = split(noise.normal(noise.fold(flat_keys, T), shape))
    log_w = jnp.zeros_like(x_T, shape=(n, P))
    per_problem = share.gather(log_w)[0]  # zeros, with the same type in the loop as its results
    per_level = jnp.zeros((T, 1)) + per_problem
    start = (
        x_T,
        _log_normal(x_T, 0 * x_T, 1 + 0 * x_T),
        0 * x_T,
        log_w,
        per_problem + math.log(FIRST_STEP),
        per_level,
        per_level,
    )
    x, _, _, log_w, _, sizes, acceptances = jax.lax.fori_loop(0, T, descend_one, start)
    return Posterior(
        x=x,
        log_weights=log_w,
        log_likelihood=_evaluate(log_likelihood, x),
        effective_sample_size=jnp.broadcast_to(sizes.T, (n, P, T)),
        acceptance=jnp.broadcast_to(acceptances.T, (n, P, T)),
    )
