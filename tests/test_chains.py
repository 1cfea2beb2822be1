from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gaussian_ladder import MEAN, SCHEDULE, VARIANCE, exact_F, marginal_moments
from helpers.statistical import RATE, assert_mean, assert_variance
from scipy import stats

from drl_jax import noise, recovery
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin
from drl_jax.metrics import diagnostics
from drl_jax.sampling import chains as chains_lib
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler

T = 6
DECAY = 0.8  # factor by which a Langevin step reduces y's distance to the conditional's mean
S = chains_lib.SCALARS  # per point of a trace


def conditional_moments(t, x_tilde):
    """Returns the mean and precision of p(y | x_tilde) in one dimension, with `exact_F`."""
    mean, variance = marginal_moments(t)
    noise_precision = jnp.where(t == T - 1, 0.0, 1 / SCHEDULE.sigma[t + 1] ** 2)
    precision = 1 / variance + noise_precision
    return (mean / variance + noise_precision * x_tilde) / precision, precision


def langevin_sampler(r=DECAY):
    """Returns Langevin dynamics with y <- mean + r (y - mean) + s z at every level.

    Then s² = 2 (1 - r) / precision, and the stationary variance is
    s² / (1 - r²) = 2 / (precision (1 + r)).
    """
    _, precision = conditional_moments(jnp.arange(T), 0.0)
    step_size = jnp.sqrt(2 * (1 - r) / precision)
    return Sampler(langevin.init, langevin.kernel, {"step_size": step_size}, 1)


def hmc_sampler():
    _, precision = conditional_moments(jnp.arange(T), 0.0)
    tuning = {"step_size": 0.5 / jnp.sqrt(precision), "leapfrog": jnp.full(T, 2)}
    return Sampler(hmc.init, hmc.kernel, tuning, 1)


def propose(x_tilde, t):
    """Stands for an initialiser."""
    return 0.5 * x_tilde + t[:, None]


def first_coordinate(x):
    """Stands for a classifier."""
    return x[:, 0]


def make_chains(F, sampler, x_tilde, t, points, seed=0, label=None):
    """Returns new chains, and a compiled function that advances chains to step `last`."""
    keys = noise.example_keys(jax.random.key(seed), jnp.arange(len(t)))
    trace = jnp.zeros((len(t), points, S + bool(label)))
    conditionals = Conditionals(F, SCHEDULE, sampler, propose)
    start = chains_lib.start(keys, conditionals, x_tilde, t, trace)

    @jax.jit
    def advance(chains, last):
        first = chains.step[0]
        return chains_lib.advance(keys, conditionals, chains, x_tilde, t, first, last, label)

    return start, advance


@pytest.mark.slow
def test_long_chains_have_the_exact_stationary_moments_at_every_level():
    """Tests Langevin dynamics, whose stationary variance is not quite the conditional's.

    Each chain gives one draw, so the draws are independent. After 80 steps 0.8^80 = 2e-8 of
    the distance at the start is left.
    """
    n = 20_000
    t = jnp.repeat(jnp.arange(T), n)
    x_tilde = jnp.full((T * n, 1), 1.5)
    start, advance = make_chains(exact_F, langevin_sampler(), x_tilde, t, points=0)
    _, observation = advance(start, 80)
    for level in range(T):
        mean, precision = conditional_moments(jnp.asarray(level), 1.5)
        variance = 2 / (precision * (1 + DECAY))
        a = float(SCHEDULE.y_scale(jnp.asarray(level)))
        x = np.asarray(observation.x[t == level, 0])
        assert_mean(x, float(mean) / a, float(variance) / a**2, of=2 * T)
        assert_variance(x, float(mean) / a, float(variance) / a**2, of=2 * T)
    y = observation.x * SCHEDULE.y_scale(t)[:, None]
    np.testing.assert_allclose(observation.displacement, jnp.abs(y - 1.5)[:, 0], atol=1e-6)
    np.testing.assert_allclose(observation.log_density, exact_F(y, t), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "label"),
    [(langevin_sampler(), None), (langevin_sampler(), first_coordinate), (hmc_sampler(), None)],
)
def test_chains_are_bit_identical_however_their_steps_are_divided_into_calls(sampler, label):
    t = jnp.arange(12) % T
    x_tilde = jax.random.normal(jax.random.key(1), (12, 3))
    start, advance = make_chains(exact_F, sampler, x_tilde, t, points=8, label=label)
    in_one_call = advance(start, 50)
    chains = start
    for last in (1, 2, 9, 17, 30, 31, 50):
        chains, observation = advance(chains, last)
    jax.tree.map(np.testing.assert_array_equal, (chains, observation), in_one_call)
    assert advance._cache_size() == 1  # one program for all numbers of steps


@pytest.mark.slow
@pytest.mark.parametrize("start", ladder.STARTS)
def test_chains_make_the_same_steps_as_generation_from_the_same_starting_points(start):
    """Fails if the level is not folded into the keys of the steps or of the starting points, or
    x is not divided by a."""
    level, K = 2, 5
    sampler = langevin_sampler()._replace(K=K, start=ladder.STARTS[start])
    x_tilde = jax.random.normal(jax.random.key(1), (4, 3))
    start, advance = make_chains(exact_F, sampler, x_tilde, jnp.full(4, level), points=0)
    _, observation = advance(start, K)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(4))
    conditionals = Conditionals(exact_F, SCHEDULE, sampler, propose)
    x = jax.jit(lambda x: ladder.descend(keys, conditionals, x, level + 1, level))(x_tilde)
    np.testing.assert_allclose(observation.x, x, rtol=1e-5, atol=1e-6)


def test_the_acceptance_probabilities_of_all_steps_are_added_up():
    def kernel(keys, state, log_density_fn, step_size):
        return state, SimpleNamespace(acceptance=0.1 * step_size)

    sampler = Sampler(langevin.init, kernel, {"step_size": jnp.arange(1.0, T + 1)}, K=1)
    t = jnp.arange(T)
    start, advance = make_chains(exact_F, sampler, jnp.zeros((T, 1)), t, points=0)
    chains, _ = advance(advance(start, 3)[0], 7)
    np.testing.assert_allclose(chains.accepted, 7 * 0.1 * (t + 1), rtol=1e-6)


@pytest.mark.slow
def test_traces_hold_equidistant_steps_and_at_most_their_capacity():
    t = jnp.arange(4) % T
    x_tilde = jax.random.normal(jax.random.key(1), (4, 3))
    start, advance = make_chains(exact_F, langevin_sampler(), x_tilde, t, points=8)
    _, advance_single = make_chains(exact_F, langevin_sampler(), x_tilde, t, points=1)
    chains, positions = start, {}
    single = start._replace(trace=start.trace[:, :1])
    for n in range(1, 70):
        chains, _ = advance(chains, n)
        single, _ = advance_single(single._replace(trace=jnp.zeros_like(single.trace)), n)
        positions[n] = np.asarray(single.state.position)
        every = int(chains_lib.thinning(n, 8))
        assert every == next(e for e in (1, 2, 4, 8, 16) if n <= 8 * e)
        points = n // every
        assert points <= 8
        # The projections are inner products of y with the same unit vectors at every point.
        y = np.stack([positions[every * (i + 1)] for i in range(points)], axis=1)
        projected = np.asarray(chains.trace)[:, :points, 1:]
        direction, *_ = np.linalg.lstsq(y.reshape(-1, 3), projected.reshape(-1, S - 1))
        if points > 1:
            np.testing.assert_allclose(y @ direction, projected, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(direction, axis=0), 1, atol=1e-4)
        draws = chains_lib.draws_after_warm_up(chains)
        np.testing.assert_array_equal(draws, chains.trace[:, points // 2 : points])
    # The first scalar is the log-density of the conditional, and not F.
    log_p = recovery.conditional_log_density(
        exact_F, positions[every * points], x_tilde, t, SCHEDULE
    )
    np.testing.assert_allclose(chains.trace[:, points - 1, 0], log_p, rtol=1e-4)
    assert chains_lib.draws_after_warm_up(start).shape == (4, 0, S)


def test_labels_are_those_of_denoised_positions_at_the_points_of_the_trace():
    """The mean of normal data given x_t is known.

    Fails if x_t or y is labelled, if the level is not that of the chain, and if labels change
    the other scalars or the chains.
    """
    t = jnp.arange(T)
    x_tilde = jax.random.normal(jax.random.key(1), (T, 3))
    start, advance = make_chains(
        exact_F, langevin_sampler(), x_tilde, t, points=8, label=first_coordinate
    )
    start_without, advance_without = make_chains(
        exact_F, langevin_sampler(), x_tilde, t, points=8
    )
    chains, observation = advance(start, 24)  # the trace holds every fourth step
    without, _ = advance_without(start_without, 24)
    np.testing.assert_allclose(chains.trace[:, :6, :S], without.trace[:, :6], atol=1e-5)
    np.testing.assert_allclose(chains.state.position, without.state.position, atol=1e-5)
    a, s = SCHEDULE.a_bar[:T], SCHEDULE.sigma_bar[:T]
    gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
    expected = MEAN + gain * (observation.x[:, 0] - a * MEAN)
    np.testing.assert_allclose(chains.trace[:, 5, S], expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(chains.trace[:, :6, S], axis=1).min() > 0


@pytest.mark.slow
def test_r_hat_of_labels_is_one_for_independent_draws_and_infinite_for_chains_in_one_class():
    """The classes are the sides of the mean of the data.

    Langevin dynamics with r = 0 makes independent draws. With n draws per half-chain and m
    half-chains, (R-hat² - (n - 1) / n) n has an F distribution with m - 1 and m (n - 1) degrees
    of freedom, up to the distribution of the share of a class, which is close to normal. So the
    test fails with probability RATE. If the data are at -40 and 40, more than 40 nats separate
    the two modes of y even at the highest level.
    """
    data = mixtures.mixture(np.full(2, 0.5), np.array([[-40.0], [40.0]]), np.ones((2, 1, 1)))
    two_modes = mixtures.exact_F(data, SCHEDULE)
    C = 64
    x_tilde = 40 * SCHEDULE.a_bar[T - 1] * jnp.where(jnp.arange(C) % 2, 1.0, -1.0)[:, None]
    near = Sampler(langevin.init, langevin.kernel, {"step_size": jnp.full(T, 0.5)}, 1)
    found = {}
    for F, sampler, threshold in (
        (exact_F, langevin_sampler(r=0.0), MEAN),
        (two_modes, near, 0.0),
    ):

        def label(x, threshold=threshold):
            return jnp.where(x[:, 0] > threshold, 7.0, 3.0)

        t = jnp.full((C,), T - 1)
        start, advance = make_chains(F, sampler, x_tilde, t, points=1000, label=label)
        chains, _ = advance(start, 1000)
        labels = chains_lib.draws_after_warm_up(chains)[..., S]
        found[F] = diagnostics.mixing(labels, np.zeros(C, int))
    m, n = 2 * C, 250
    ratio = (found[exact_F].label_r_hat ** 2 - (n - 1) / n) * n
    low, high = stats.f.ppf([RATE / 2, 1 - RATE / 2], m - 1, m * (n - 1))
    assert low < ratio < high
    assert found[two_modes].label_r_hat == np.inf
    assert found[two_modes].label_changes == 0


def test_effective_sample_size_of_langevin_is_that_of_an_ar1_process():
    """For large n, it is n (1 - r) / (1 + r) for n draws with correlation r."""
    n = 400
    t = jnp.full((n,), T - 1)
    start, advance = make_chains(exact_F, langevin_sampler(), jnp.zeros((n, 1)), t, points=1000)
    chains, _ = advance(start, 4000)  # the trace holds every fourth step
    draws, r = chains_lib.draws_after_warm_up(chains), DECAY**4
    assert draws.shape == (n, 500, S)
    found = diagnostics.convergence(draws, np.arange(n) % (n // 4))
    assert found.draws == 500 * n
    expected = 500 * n * (1 - r) / (1 + r)
    assert abs(found.effective_sample_size / expected - 1) < 0.05
    assert found.r_hat < 1.01


@pytest.mark.slow
def test_r_hat_is_one_for_chains_that_mix_and_large_for_chains_stuck_in_two_modes():
    def log_density(y, centre):
        return -jnp.sum((y - centre) ** 2, axis=1) / (2 * 0.3**2)

    def two_modes(y, t):
        return jnp.logaddexp(log_density(y, -2), log_density(y, 2))

    def one_mode(y, t):
        return log_density(y, 0)

    n = 64
    x_tilde = jnp.where(jnp.arange(n) % 2, 2.0, -2.0)[:, None]
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": jnp.full(T, 0.2)}, 1)
    r_hat = {}
    for F in (one_mode, two_modes):
        start, advance = make_chains(F, sampler, x_tilde, jnp.full((n,), T - 1), points=1000)
        chains, _ = advance(start, 1000)
        found = diagnostics.convergence(
            chains_lib.draws_after_warm_up(chains), np.arange(n) // 4
        )
        r_hat[F] = found.r_hat, found.r_hat_worst
    assert r_hat[one_mode][1] < 1.1
    assert r_hat[two_modes][0] > 5


def test_recorded_steps_are_1_2_and_5_times_the_powers_of_ten():
    assert chains_lib.recorded_steps(1) == [0, 1]
    assert chains_lib.recorded_steps(10) == [0, 1, 2, 5, 10]
    assert chains_lib.recorded_steps(300) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 300]
    assert chains_lib.recorded_steps(100_000)[-3:] == [20_000, 50_000, 100_000]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 9, 64])
def test_four_to_seven_chains_share_a_condition_if_there_are_four(n):
    _, counts = np.unique(chains_lib.shared_conditions(n), return_counts=True)
    assert counts.sum() == n
    assert counts.min() >= min(n, 4)
    assert counts.max() < 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chains_lib.shared_conditions(1), "num_chains is 1, "),
        (lambda: chains_lib.require_levels(np.array([0, 6]), 6), "level 6 .*0 to 5"),
        (lambda: chains_lib.require_levels(np.array([-1]), 6), "level -1 "),
    ],
)
def test_single_chains_and_unknown_levels_are_errors_of_one_line(call, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        call()
