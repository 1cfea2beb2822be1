import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gaussian_ladder import SCHEDULE, gaussian, marginal
from helpers.statistical import assert_mean, assert_variance

from drl_jax import method, noise
from drl_jax.config import default
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin
from drl_jax.metrics import diagnostics
from drl_jax.sampling import chains as chains_lib
from drl_jax.sampling.ladder import Conditionals, Sampler

T = 6
DECAY = 0.8  # r: what a Langevin step leaves of a distance on the Gaussian conditionals
S = 1 + chains_lib.PROJECTIONS


def conditional(t, x_tilde):
    """Mean and precision of p(y | x_tilde) under the energy `gaussian`, in one dimension."""
    mean, variance = marginal(t)
    pull = jnp.where(t == T - 1, 0.0, 1 / SCHEDULE.sigma[t + 1] ** 2)
    precision = 1 / variance + pull
    return (mean / variance + pull * x_tilde) / precision, precision


def steps_of_decay(r):
    """Langevin with y <- mean + r (y - mean) + s z at every level: s² = 2 (1 - r) / precision.

    Its stationary variance is s² / (1 - r²) = 2 / (precision (1 + r)).
    """
    _, precision = conditional(jnp.arange(T), 0.0)
    return Sampler(
        langevin.init, langevin.kernel, {"step_size": jnp.sqrt(2 * (1 - r) / precision)}, 1
    )


def hmc_sampler():
    _, precision = conditional(jnp.arange(T), 0.0)
    tuning = {"step_size": 0.5 / jnp.sqrt(precision), "leapfrog": jnp.full(T, 2)}
    return Sampler(hmc.init, hmc.kernel, tuning, 1)


def runner(F, sampler, x_tilde, t, points, seed=0):
    """Returns chains at their start, and a compiled function that takes chains on to a step."""
    keys = noise.example_keys(jax.random.key(seed), jnp.arange(len(t)))
    trace = jnp.zeros((len(t), points, S))
    conditionals = Conditionals(F, SCHEDULE, sampler)
    start = chains_lib.start(conditionals, x_tilde, t, trace)

    @jax.jit
    def advance(chains, last):
        first = chains.step[0]
        return chains_lib.advance(keys, conditionals, chains, x_tilde, t, first, last)

    return start, advance


def test_long_chains_have_the_exact_stationary_moments_at_every_level():
    """Of Langevin, whose variance is not quite the conditional's.

    Every chain counts once, so the draws are independent. After 80 steps 0.8^80 = 2e-8 of
    the start is left.
    """
    n = 20_000
    t = jnp.repeat(jnp.arange(T), n)
    x_tilde = jnp.full((T * n, 1), 1.5)
    start, advance = runner(gaussian, steps_of_decay(DECAY), x_tilde, t, points=0)
    _, seen = advance(start, 80)
    for level in range(T):
        mean, precision = conditional(jnp.asarray(level), 1.5)
        variance = 2 / (precision * (1 + DECAY))
        a = float(SCHEDULE.a_y(jnp.asarray(level)))
        x = np.asarray(seen.x[t == level, 0])
        assert_mean(x, float(mean) / a, float(variance) / a**2, of=2 * T)
        assert_variance(x, float(mean) / a, float(variance) / a**2, of=2 * T)
    y = seen.x * SCHEDULE.a_y(t)[:, None]
    np.testing.assert_allclose(seen.displacement, jnp.abs(y - 1.5)[:, 0], atol=1e-6)
    np.testing.assert_allclose(seen.log_density, gaussian(y, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [steps_of_decay(DECAY), hmc_sampler()])
def test_where_chains_stop_on_their_way_does_not_change_a_bit(sampler):
    t = jnp.arange(12) % T
    x_tilde = jax.random.normal(jax.random.key(1), (12, 3))
    start, advance = runner(gaussian, sampler, x_tilde, t, points=8)
    whole = advance(start, 50)
    chains = start
    for last in (1, 2, 9, 17, 30, 31, 50):
        chains, seen = advance(chains, last)
    jax.tree.map(np.testing.assert_array_equal, (chains, seen), whole)
    assert advance._cache_size() == 1  # one program for every level and number of steps


def test_the_trace_holds_equidistant_steps_and_never_more_than_its_points():
    t = jnp.arange(4) % T
    x_tilde = jax.random.normal(jax.random.key(1), (4, 3))
    start, advance = runner(gaussian, steps_of_decay(DECAY), x_tilde, t, points=8)
    _, by_one = runner(gaussian, steps_of_decay(DECAY), x_tilde, t, points=1)
    chains, positions = start, {}
    one = start._replace(trace=start.trace[:, :1])
    for n in range(1, 70):
        chains, _ = advance(chains, n)
        one, _ = by_one(one._replace(trace=jnp.zeros_like(one.trace)), n)
        positions[n] = np.asarray(one.state.position)
        every = int(chains_lib.thinning(n, 8))
        assert every == next(e for e in (1, 2, 4, 8, 16) if n <= 8 * e)
        points = n // every
        assert points <= 8
        # Random directions: as many products as there are, all as far from zero as |y|.
        y = np.stack([positions[every * (i + 1)] for i in range(points)], axis=1)
        projected = np.asarray(chains.trace)[:, :points, 1:]
        direction, *_ = np.linalg.lstsq(y.reshape(-1, 3), projected.reshape(-1, S - 1))
        if points > 1:
            np.testing.assert_allclose(y @ direction, projected, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(direction, axis=0), 1, atol=1e-4)
        kept = chains_lib.draws_after_warm_up(chains)
        np.testing.assert_array_equal(kept, chains.trace[:, points // 2 : points])
    assert chains_lib.draws_after_warm_up(start).shape == (4, 0, S)


def test_the_effective_sample_size_is_that_of_the_ar1_which_langevin_is():
    """n draws of correlation r are worth n (1 - r) / (1 + r), in the limit of many."""
    n = 400
    t = jnp.full((n,), T - 1)
    start, advance = runner(gaussian, steps_of_decay(DECAY), jnp.zeros((n, 1)), t, points=1000)
    chains, _ = advance(start, 4000)  # every fourth is kept, of which the second half
    draws, r = chains_lib.draws_after_warm_up(chains), DECAY**4
    assert draws.shape == (n, 500, S)
    found = diagnostics.convergence(draws, np.arange(n) % (n // 4))
    assert found.draws == 500 * n
    expected = 500 * n * (1 - r) / (1 + r)
    assert abs(found.effective_sample_size / expected - 1) < 0.05
    assert found.r_hat < 1.01


def test_r_hat_tells_chains_that_mix_from_chains_that_are_stuck():
    def two_modes(y, t):
        return jnp.logaddexp(*(-jnp.sum((y - m) ** 2, axis=1) / (2 * 0.3**2) for m in (-2, 2)))

    def one_mode(y, t):
        return -jnp.sum(y**2, axis=1) / (2 * 0.3**2)

    n = 64
    x_tilde = jnp.where(jnp.arange(n) % 2, 2.0, -2.0)[:, None]
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": jnp.full(T, 0.2)}, 1)
    r_hat = {}
    for F in (one_mode, two_modes):
        start, advance = runner(F, sampler, x_tilde, jnp.full((n,), T - 1), points=1000)
        chains, _ = advance(start, 1000)
        found = diagnostics.convergence(
            chains_lib.draws_after_warm_up(chains), np.arange(n) // 4
        )
        r_hat[F] = found.r_hat, found.r_hat_worst
    assert r_hat[one_mode][1] < 1.1
    assert r_hat[two_modes][0] > 5


def test_the_recorded_steps_are_a_ladder_of_1_2_5():
    assert chains_lib.recorded_steps(1) == [0, 1]
    assert chains_lib.recorded_steps(10) == [0, 1, 2, 5, 10]
    assert chains_lib.recorded_steps(300) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 300]
    assert chains_lib.recorded_steps(100_000)[-3:] == [20_000, 50_000, 100_000]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 9, 64])
def test_chains_that_share_a_condition_are_four_or_more(n):
    _, counts = np.unique(chains_lib.shared_conditions(n), return_counts=True)
    assert counts.sum() == n
    assert counts.min() >= min(n, 4)
    assert counts.max() < 8


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: chains_lib.shared_conditions(1), "1 chains.*R-hat.*2 or more"),
        (lambda: chains_lib.require_levels(np.array([0, 6]), 6), "level 6 is out of.*0 to 5"),
        (lambda: chains_lib.require_levels(np.array([-1]), 6), "level -1 is out of range"),
    ],
)
def test_impossible_chains_are_one_clear_line(refused, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        refused()


@pytest.mark.parametrize("name", ["langevin", "mala", "hmc", "normal_approximation"])
def test_one_draw_is_no_chain(name):
    config = default()
    config.mcmc.sampler = name
    require = functools.partial(
        chains_lib.require_chain, method.make_sampler(config.mcmc, SCHEDULE)
    )
    if name == "normal_approximation":
        with pytest.raises(UserError, match=r"normal_approximation.*sampler=langevin"):
            require()
    else:
        require()
