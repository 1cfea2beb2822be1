import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gaussian_ladder import (
    CONDITIONALS,
    DATA,
    LANGEVIN,
    SCHEDULE,
    K,
    S,
    exact_F,
    marginal_moments,
)
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise
from drl_jax.data import mixtures
from drl_jax.mcmc import hmc, langevin, mala
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler

KERNELS = [(mala.kernel, {}), (hmc.kernel, {"leapfrog": jnp.full(6, 3)})]


def exact_moments(noise_scale=1.0, start="x_tilde", K=K):
    """Returns the mean and variance of x_t at every level, for chains of K Langevin steps.

    On a Gaussian each Langevin step is affine in (y, x_tilde), and so is the start from the
    posterior in x_tilde. So y after K steps is alpha x_tilde + beta + noise.
    """
    mean, variance = 0.0, 1.0
    levels = []
    for t in reversed(range(6)):
        m, v = (float(x) for x in marginal_moments(jnp.array(t)))
        s2, sigma2 = float(S[t]) ** 2, float(SCHEDULE.sigma[t + 1]) ** 2
        noise_precision = 0.0 if t == 5 else 1 / sigma2
        alpha, beta, spread = 1.0, 0.0, 0.0
        if start == "posterior" and t < 5:
            above, of_x_tilde = mixtures.marginal(DATA, t + 1, SCHEDULE).mean_and_covariance()
            shrinkage = sigma2 / float(of_x_tilde[0, 0])
            alpha, beta = 1 - shrinkage, shrinkage * float(above[0])
            a, _, _, sigma_bar = (float(x[t + 1]) for x in jax.tree.leaves(SCHEDULE))
            posterior_variance = sigma2 * (float(SCHEDULE.sigma_bar[t]) / sigma_bar) ** 2
            spread = noise_scale**2 * a**2 * posterior_variance
        r = 1 - s2 / 2 * (1 / v + noise_precision)
        for _ in range(K):
            alpha = r * alpha + s2 / 2 * noise_precision
            beta = r * beta + s2 / 2 * m / v
            spread = r**2 * spread + noise_scale**2 * s2
        a = float(SCHEDULE.y_scale(jnp.array(t)))
        mean, variance = (alpha * mean + beta) / a, (alpha**2 * variance + spread) / a**2
        levels.append((mean, variance))
    return levels[::-1]


@pytest.mark.slow
def test_generation_from_gaussian_data_has_its_exact_moments_at_every_level():
    """Fails if x is not divided by a, the quadratic term is kept at the top, or the levels are
    visited upwards."""
    n = 200_000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    descend = jax.jit(lambda x, top, bottom: ladder.descend(keys, CONDITIONALS, x, top, bottom))
    x = ladder.white_noise(keys, (1,), SCHEDULE)
    for t, (mean, variance) in reversed(list(enumerate(exact_moments()))):
        x = descend(x, t + 1, t)
        assert_mean(x[:, 0], mean, variance, of=12)
        assert_variance(x[:, 0], mean, variance, of=12)
    generated = ladder.generate(keys, CONDITIONALS, (1,))
    np.testing.assert_allclose(generated, x, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_sample_depends_only_on_its_own_key():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(10))
    many = ladder.generate(keys, CONDITIONALS, (3,))
    few = ladder.generate(keys[4:6], CONDITIONALS, (3,))
    np.testing.assert_allclose(many[4:6], few, rtol=1e-6)


@pytest.mark.parametrize(
    ("start", "K", "noise_scale"),
    [("x_tilde", K, 0.5), ("posterior", 0, 1.0), ("posterior", 2, 0.5)],
)
def test_generation_has_the_exact_moments_of_its_starts_steps_and_noise_scale(
    start, K, noise_scale
):
    """Fails if the noise scale is ignored at a single level or by the starting points, the
    starting points share their noise with a step, or use the score of another level."""
    n = 100_000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    tuning = {"step_size": S, "noise_scale": jnp.full(6, noise_scale)}
    sampler = LANGEVIN._replace(tuning=tuning, K=K, start=ladder.STARTS[start])
    conditionals = CONDITIONALS._replace(sampler=sampler)
    x = jax.jit(lambda keys: ladder.generate(keys, conditionals, (1,)))(keys)
    mean, variance = exact_moments(noise_scale, start, K)[0]
    assert_mean(x[:, 0], mean, variance, of=2)
    assert_variance(x[:, 0], mean, variance, of=2)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "name"), [(6, "cosine"), (1000, "linear")])
def test_starts_from_the_posterior_have_the_exact_mean_of_the_conditional(T, name):
    """For data with two modes, however far apart the levels are; at the top they are x_tilde.

    The mean and standard deviation are those of q(x_t | x_{t+1}, x_hat) with x_hat = E[x |
    x_{t+1}], times a_{t+1}. Fails if F of level t is used, or F of level t + 1 at x_tilde that
    is not scaled or is scaled at level T - 1.
    """
    data = mixtures.isotropic(np.array([[-0.9], [0.9]]), 0.2, np.array([0.4, 0.6]))
    with jax.enable_x64(True):
        schedule = diffusion.schedule(T, name)
        t = jnp.unique(jnp.linspace(0, T - 1, 20).astype(int))
        x_tilde = jnp.linspace(-1.5, 1.4, len(t))[:, None]
        keys = noise.example_keys(jax.random.key(0), t)

        @jax.jit
        def draw(scale):
            sampler = LANGEVIN._replace(tuning={"noise_scale": jnp.full(T, scale)})
            conditionals = Conditionals(mixtures.exact_F(data, schedule), schedule, sampler)
            return ladder.start_from_posterior(keys, conditionals, x_tilde, t)

        starts = [draw(scale) for scale in (0.0, 1.0)]
        mean, start = (np.asarray(y)[:-1] for y in starts)
        np.testing.assert_array_equal(starts[1][-1], x_tilde[-1])
        exact = mixtures.conditional(data, x_tilde, t, schedule)
        expected = jnp.einsum("bk,bkd->bd", jnp.exp(exact.log_weights), exact.means)
        np.testing.assert_allclose(mean, expected[:-1], rtol=1e-9, atol=1e-12)
        # E[x | x_{t+1}], by conditioning the data on x_{t+1} / a_bar_{t+1}
        a, a_bar, sigma_bar = (
            schedule.a[t + 1],
            schedule.a_bar[t + 1],
            schedule.sigma_bar[t + 1],
        )
        given = data.posterior(x_tilde / a_bar[:, None], sigma_bar / a_bar)
        x_hat = jnp.einsum("bk,bkd->bd", jnp.exp(given.log_weights), given.means)
        posterior_mean, std = diffusion.posterior(x_hat, x_tilde, t, schedule)
        np.testing.assert_allclose(mean, (a[:, None] * posterior_mean)[:-1], rtol=1e-9)
        z = noise.normal(noise.fold(keys, ladder.START), (1,))
        np.testing.assert_allclose(
            start - mean, ((a * std)[:, None] * z)[:-1], rtol=1e-6, atol=1e-12
        )


# Three Gaussians in the plane: one long, one wide and one round, of different weights.
WEIGHTS = np.array([0.2, 0.5, 0.3])
PLANAR = mixtures.mixture(
    WEIGHTS,
    np.array([[-0.6, 0.4], [0.5, 0.1], [0.1, -0.7]]),
    np.array([[[0.02, 0.01], [0.01, 0.03]], [[0.03, 0], [0, 0.01]], [[0.01, 0], [0, 0.01]]]),
)


def planar_statistics(x, exact):
    """Returns [n, 7]: the coordinates, their products, and the components' probabilities.

    The expected values of the latter are the weights of the components.
    """
    components = (jax.tree.map(lambda v, k=k: v[k : k + 1], exact) for k in range(2))
    p = [jnp.exp(one.log_density(x) - exact.log_density(x)) for one in components]
    return jnp.stack([*x.T, x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2, *p], axis=1)


@functools.cache
def planar_moments(T, name):
    """Returns the means and variances of `planar_statistics` at level 0.

    The variances are estimated from 50,000 exact samples.
    """
    exact = mixtures.marginal(PLANAR, 0, diffusion.schedule(T, name))
    keys = noise.example_keys(jax.random.key(1), jnp.arange(50_000))
    draws = jax.jit(lambda keys: planar_statistics(exact.sample(keys), exact))(keys)
    mean, covariance = (np.float64(v) for v in exact.mean_and_covariance())
    second = covariance + np.outer(mean, mean)
    means = [*mean, second[0, 0], second[0, 1], second[1, 1], *WEIGHTS[:2]]
    return means, np.var(np.float64(draws), axis=0)


def planar_samples(T, name, start, K, n=1000):
    """Returns samples drawn with exact energies and MALA, and their `planar_statistics`.

    The step sizes are the widths of the conditionals in their narrowest directions.
    """
    schedule = diffusion.schedule(T, name)
    t = jnp.arange(T)
    smallest = schedule.a_bar[:-1] ** 2 * 0.007 + schedule.sigma_bar[:-1] ** 2
    noise_precision = (1 - schedule.is_marginal(t)) / schedule.sigma[1:] ** 2
    step_size = 1 / jnp.sqrt(1 / (schedule.y_scale(t) ** 2 * smallest) + noise_precision)
    sampler = Sampler(mala.init, mala.kernel, {"step_size": step_size}, K, ladder.STARTS[start])
    conditionals = Conditionals(mixtures.exact_F(PLANAR, schedule), schedule, sampler)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    exact = mixtures.marginal(PLANAR, 0, schedule)

    @jax.jit
    def draw(keys):
        x = ladder.generate(keys, conditionals, (2,))
        return x, planar_statistics(x, exact)

    return draw(keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "name", "K"),
    [(1000, "linear", 0), (1000, "linear", 1), (1000, "linear", 10), (20, "cosine", 10)],
)
def test_starts_from_the_posterior_give_samples_of_the_data_for_any_number_of_steps(T, name, K):
    """Compares means, second moments and weights, of 1000 chains at level 0.

    Fails if the starting points have half the drift, or no noise.
    """
    _, statistics = planar_samples(T, name, "posterior", K)
    assert_mean(statistics, *planar_moments(T, name))


@pytest.mark.slow
def test_a_thousand_short_chains_from_x_tilde_end_in_noise():
    """One step per level leaves most of the noise of level T: why there are other starts."""
    x, _ = planar_samples(1000, "linear", "x_tilde", K=1)
    _, covariance = PLANAR.mean_and_covariance()
    assert np.trace(np.cov(np.asarray(x).T)) > 2.5 * np.trace(covariance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "tuning", "F"),
    [(*KERNELS[0], exact_F), (*KERNELS[1], lambda y, t: -22 * jnp.sum(y**2, axis=1) + 0.0 * t)],
    ids=["mala", "hmc"],
)
def test_warm_up_finds_the_step_sizes_of_the_target_acceptance(kernel, tuning, F):
    """New chains with these step sizes, which adapt nothing, reach the target too.

    The density of HMC is so narrow that its trajectories are shorter than the longest ones.
    """
    sampler = Sampler(hmc.init, kernel, {"step_size": S} | tuning, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(500))
    conditionals = Conditionals(F, SCHEDULE, sampler)
    warm_up = jax.jit(lambda keys: ladder.warm_up(keys, conditionals, (8,), 80, 0.7))
    step_size, acceptance, _ = warm_up(keys)
    np.testing.assert_allclose(acceptance, 0.7, atol=0.05)
    assert np.all(step_size < ladder.quarter_turn(sampler, SCHEDULE))
    adapted = sampler._replace(tuning=tuning | {"step_size": step_size})
    keys = noise.example_keys(jax.random.key(1), jnp.arange(600))
    t = jnp.arange(600) % 6
    x_tilde = jax.random.normal(jax.random.key(2), (600, 8))
    conditionals = conditionals._replace(sampler=adapted)
    _, acceptance = ladder.sample_conditional(keys, conditionals, x_tilde, t)
    acceptance = acceptance.reshape(100, 6).mean(axis=0)
    np.testing.assert_allclose(acceptance, 0.7, atol=0.06)


def test_a_quarter_turn_is_as_long_for_any_number_of_leapfrog_steps():
    sampler = Sampler(hmc.init, hmc.kernel, {"leapfrog": jnp.array([1, 2, 3, 4, 5, 5])}, K=1)
    length = sampler.tuning["leapfrog"] * ladder.quarter_turn(sampler, SCHEDULE)
    assert length[0] == np.inf  # MALA
    np.testing.assert_allclose(length[1:], np.pi / 2 * SCHEDULE.sigma[2:], rtol=1e-6)
    assert np.all(ladder.quarter_turn(LANGEVIN, SCHEDULE) == np.inf)


def test_hmc_forgets_its_start_in_one_trajectory_on_64_dimensions():
    """The coupling to x_tilde dominates the conditionals, as it does between close levels.

    Fails (each tried) if the trajectories are longer than a quarter turn: with step sizes that
    only the acceptance limits, the correlation at level 5 is -0.38, and -0.96 (half a turn)
    without random lengths.
    """
    tuning = {"step_size": 0.014 * SCHEDULE.sigma[1:], "leapfrog": jnp.full(6, 5)}
    conditionals = Conditionals(
        F=lambda y, t: -SCHEDULE.is_marginal(t) * jnp.sum(y**2, axis=1) / 2,
        schedule=SCHEDULE,
        sampler=Sampler(hmc.init, hmc.kernel, tuning, K=1),
    )
    keys = noise.example_keys(jax.random.key(0), jnp.arange(200))
    warm_up = jax.jit(lambda keys: ladder.warm_up(keys, conditionals, (64,), 100, 0.65))
    adapted = warm_up(keys)
    np.testing.assert_allclose(adapted.correlation, 0, atol=0.2)
    np.testing.assert_allclose(adapted.acceptance, 0.92, atol=0.03)


# Standard deviations of the axes of a Gaussian, and two starting points per chain.
AXES = np.tile([0.5, 1.0, 2.0], 20)
STARTS = np.random.default_rng(0).normal(size=(2, 300, 60)).astype(np.float32)


def correlation(module, K, std, **tuning):
    """Returns what K steps from `STARTS` leave of their differences on N(0, std² I)."""
    keys = noise.example_keys(jax.random.key(0), jnp.arange(300))
    tuning = {name: jnp.full(6, value) for name, value in tuning.items()}
    sampler = Sampler(module.init, module.kernel, tuning, K)
    found = ladder.remaining_correlation(
        keys,
        sampler,
        lambda y: -jnp.sum((y / std) ** 2, axis=1) / 2,
        starts=jnp.asarray(STARTS),
        t=jnp.arange(300) % 6,
        steps=7 + jnp.arange(K),
    )
    return float(found), noise.fold(keys, 7)


def test_the_remaining_correlation_of_langevin_is_that_of_an_ar1_process():
    """On each axis, it is (1 - s² / (2 std²))^K. The axes are weighted by the differences."""
    s, K = 0.4, 3
    weights = np.sum((STARTS[0] - STARTS[1]) ** 2, axis=0)
    expected = np.average((1 - s**2 / (2 * AXES**2)) ** K, weights=weights)
    found, _ = correlation(langevin, K, AXES, step_size=s, noise_scale=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_remaining_correlation_of_mala_counts_rejected_steps_as_no_steps():
    """With short steps, hardly any is rejected; with long ones, all are."""
    np.testing.assert_allclose(
        correlation(mala, 1, 1.0, step_size=0.3)[0], 1 - 0.3**2 / 2, atol=0.005
    )
    assert correlation(mala, 1, 1.0, step_size=5.0)[0] == 1


@pytest.mark.parametrize("turn", [0.5, np.pi / 2, 2.5])
def test_the_remaining_correlation_of_hmc_is_the_cosine_of_its_rotation(turn):
    """The leapfrog rotates exactly, by arccos(1 - ε² / 2) per step."""
    L = 50
    found, keys = correlation(hmc, 1, 1.0, step_size=turn / L, leapfrog=L)
    epsilon = turn / L * (0.5 + np.asarray(noise.uniform(noise.fold(keys, 2))))
    weights = np.sum((STARTS[0] - STARTS[1]) ** 2, axis=1)
    expected = np.average(np.cos(L * np.arccos(1 - epsilon**2 / 2)), weights=weights)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_chains_that_start_at_the_same_point_have_no_correlation_to_lose(monkeypatch):
    monkeypatch.setitem(globals(), "STARTS", np.stack([STARTS[0], STARTS[0]]))
    assert correlation(langevin, 2, 1.0, step_size=0.5, noise_scale=1.0)[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_generation_with_a_metropolis_test_has_the_exact_moments_of_the_data(kernel, tuning):
    """Long chains have no bias: x_0 is distributed as data with the noise of level 0.

    The step sizes are almost the widths of the conditionals. Langevin fails this test.
    """
    n = 50_000
    t = jnp.arange(6)
    noise_precision = (1 - SCHEDULE.is_marginal(t)) / SCHEDULE.sigma[1:] ** 2
    step_size = 0.8 / jnp.sqrt(1 / marginal_moments(t)[1] + noise_precision)
    sampler = Sampler(hmc.init, kernel, {"step_size": step_size} | tuning, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    conditionals = CONDITIONALS._replace(sampler=sampler)
    x = jax.jit(lambda keys: ladder.generate(keys, conditionals, (1,)))(keys)
    mean, variance = (
        np.float64(v).item() for v in mixtures.marginal(DATA, 0, SCHEDULE).mean_and_covariance()
    )
    assert_mean(x[:, 0], mean, variance, of=2)
    assert_variance(x[:, 0], mean, variance, of=2)


@pytest.mark.slow
@pytest.mark.parametrize("x_tilde", [-2.0, 1.0])
def test_top_level_is_drawn_from_the_unscaled_marginal_for_any_x_tilde(x_tilde):
    """The data have two modes, and MALA's steps are long enough to move between them.

    Fails if the quadratic term is kept at the top, or x is divided by a_T there.
    """
    n, t = 100_000, 5
    data = mixtures.isotropic(np.array([[-0.5], [2.5]]), 0.2, np.array([0.4, 0.6]))
    sampler = Sampler(mala.init, mala.kernel, {"step_size": jnp.full(6, 1.2)}, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    F = mixtures.exact_F(data, SCHEDULE)
    x = jax.jit(
        lambda keys: ladder.recover(
            keys,
            Conditionals(F, SCHEDULE, sampler),
            x_tilde=jnp.full((n, 1), x_tilde),
            t=jnp.full(n, t),
        )
    )(keys)
    grid = np.linspace(-7, 7, 1401)
    log_p = mixtures.marginal(data, t, SCHEDULE).log_density(grid[:, None])
    masses = np.exp(np.float64(log_p)) / np.exp(np.float64(log_p)).sum()
    for power in (1, 2):
        mean, square = masses @ grid**power, masses @ grid ** (2 * power)
        assert_mean(np.float64(x[:, 0]) ** power, mean, square - mean**2, of=2)


def test_a_chain_run_in_two_calls_equals_a_chain_run_in_one():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(4))
    x_tilde, t = jax.random.normal(jax.random.key(1), (4, 3)), jnp.array([0, 2, 4, 5])

    def run(position, first, last):
        return ladder.run_chain(
            keys, LANGEVIN, lambda y: exact_F(y, t), position, t, jnp.arange(first, last)
        )[0]

    whole = run(x_tilde, 0, 9)
    np.testing.assert_allclose(run(run(x_tilde, 0, 4), 4, 9), whole, rtol=1e-6)
    assert np.abs(run(run(x_tilde, 0, 4), 0, 5) - whole).max() > 0.01


# Kernel, tuning, and the numbers of values and gradients that 4 steps compute.
COSTS = [
    (langevin, {}, (0, 4)),
    (mala, {}, (5, 5)),
    (hmc, {"leapfrog": jnp.full(6, 3)}, (13, 13)),
]


@pytest.mark.parametrize(
    ("module", "tuning", "cost"),
    COSTS,
    ids=[module.__name__.split(".")[-1] for module, _, _ in COSTS],
)
def test_chains_compute_only_the_values_and_gradients_that_they_use(module, tuning, cost):
    """Counts them at run time, inside the log-density.

    HMC computes the value along its trajectories too; for a network, that is one sum more than
    the gradient alone. Fails if Langevin computes a gradient at its starting point, or if the
    log-density of every step is accumulated.
    """
    counted = collections.Counter()

    def counting(name, value):
        def count(value):
            counted[name] += 1
            return value

        return jax.pure_callback(count, jax.typeof(value), value)

    @jax.custom_vjp
    def log_density(y):
        return counting("value", -jnp.sum(y**2, axis=1) / 2)

    log_density.defvjp(
        lambda y: (log_density(y), y),
        lambda y, cotangent: (counting("gradient", -y * cotangent[:, None]),),
    )
    sampler = Sampler(module.init, module.kernel, {"step_size": S} | tuning, K=4)
    conditionals = Conditionals(lambda y, t: log_density(y), SCHEDULE, sampler)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(3))
    chain = jax.jit(lambda x: ladder.sample_conditional(keys, conditionals, x, jnp.arange(3)))
    jax.block_until_ready(chain(jnp.ones((3, 2))))
    assert (counted["value"], counted["gradient"]) == cost
