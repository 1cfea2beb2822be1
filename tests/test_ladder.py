import collections

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
    gaussian,
    marginal,
)
from helpers.statistical import assert_mean, assert_variance

from drl_jax import noise
from drl_jax.data import mixtures
from drl_jax.mcmc import hmc, langevin, mala, normal_approximation
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import Conditionals, Sampler

KERNELS = [(mala.kernel, {}), (hmc.kernel, {"leapfrog": jnp.full(6, 3)})]


def exact_ladder():
    """Mean and variance of every x_t that the ladder of finite chains gives.

    On a Gaussian each Langevin step is affine in (y, x_tilde), so y after K steps is
    alpha x_tilde + beta + noise.
    """
    mean, variance = 0.0, 1.0
    levels = []
    for t in reversed(range(6)):
        m, v = (float(x) for x in marginal(jnp.array(t)))
        s2, sigma2 = float(S[t]) ** 2, float(SCHEDULE.sigma[t + 1]) ** 2
        pull = 0.0 if t == 5 else 1 / sigma2
        alpha, beta, spread = 1.0, 0.0, 0.0
        r = 1 - s2 / 2 * (1 / v + pull)
        for _ in range(K):
            alpha = r * alpha + s2 / 2 * pull
            beta = r * beta + s2 / 2 * m / v
            spread = r**2 * spread + s2
        a = float(SCHEDULE.a_y(jnp.array(t)))
        mean, variance = (alpha * mean + beta) / a, (alpha**2 * variance + spread) / a**2
        levels.append((mean, variance))
    return levels[::-1]


def test_every_level_of_generation_has_its_exact_moments_on_gaussian_data():
    """Fails when x is not divided by a, when the top keeps the quadratic term, and when the
    levels are scanned upwards (each tried)."""
    n = 200_000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    descend = jax.jit(lambda x, top, bottom: ladder.descend(keys, CONDITIONALS, x, top, bottom))
    x = ladder.white_noise(keys, (1,), SCHEDULE)
    for t, (mean, variance) in reversed(list(enumerate(exact_ladder()))):
        x = descend(x, t + 1, t)
        assert_mean(x[:, 0], mean, variance, of=12)
        assert_variance(x[:, 0], mean, variance, of=12)
    whole = ladder.generate(keys, CONDITIONALS, (1,))
    np.testing.assert_allclose(whole, x, rtol=1e-5, atol=1e-6)


def test_a_sample_depends_on_its_own_key_alone():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(10))
    many = ladder.generate(keys, CONDITIONALS, (3,))
    few = ladder.generate(keys[4:6], CONDITIONALS, (3,))
    np.testing.assert_allclose(many[4:6], few, rtol=1e-6)


def test_noise_scale_sharpens_samples():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))
    half = {"step_size": S, "noise_scale": jnp.full(6, 0.5)}
    sampler = LANGEVIN._replace(tuning=half)
    sharp = ladder.generate(keys, CONDITIONALS._replace(sampler=sampler), (1,))
    plain = ladder.generate(keys, CONDITIONALS, (1,))
    assert np.var(sharp) < 0.8 * np.var(plain)


@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_a_warm_up_finds_the_steps_of_the_target_acceptance(kernel, tuning):
    """Chains that come after it, and adapt no more, are accepted as often as asked."""
    sampler = Sampler(hmc.init, kernel, {"step_size": S} | tuning, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(500))
    conditionals = CONDITIONALS._replace(sampler=sampler)
    warm_up = jax.jit(lambda keys: ladder.warm_up(keys, conditionals, (8,), 80, 0.7))
    step_size, acceptance = warm_up(keys)
    np.testing.assert_allclose(acceptance, 0.7, atol=0.05)
    adapted = sampler._replace(tuning=tuning | {"step_size": step_size})
    keys = noise.example_keys(jax.random.key(1), jnp.arange(600))
    t = jnp.arange(600) % 6
    x_tilde = jax.random.normal(jax.random.key(2), (600, 8))
    conditionals = CONDITIONALS._replace(sampler=adapted)
    _, acceptance = ladder.sample_conditional(keys, conditionals, x_tilde, t)
    np.testing.assert_allclose(acceptance.reshape(100, 6).mean(axis=0), 0.7, atol=0.06)


@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_an_adjusted_ladder_has_the_exact_moments_of_the_data(kernel, tuning):
    """No bias is left where chains are long and their ends accepted: x_0 is data with noise.

    The steps are nearly as long as the conditionals are wide. Langevin fails this (tried).
    """
    n = 50_000
    t = jnp.arange(6)
    pull = (1 - SCHEDULE.is_marginal(t)) / SCHEDULE.sigma[1:] ** 2
    step_size = 0.8 / jnp.sqrt(1 / marginal(t)[1] + pull)
    sampler = Sampler(hmc.init, kernel, {"step_size": step_size} | tuning, K=40)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    conditionals = CONDITIONALS._replace(sampler=sampler)
    x = jax.jit(lambda keys: ladder.generate(keys, conditionals, (1,)))(keys)
    mean, variance = (
        np.float64(v).item() for v in mixtures.marginal(DATA, 0, SCHEDULE).mean_and_covariance()
    )
    assert_mean(x[:, 0], mean, variance, of=2)
    assert_variance(x[:, 0], mean, variance, of=2)


@pytest.mark.parametrize("x_tilde", [-2.0, 1.0])
def test_the_top_level_is_drawn_from_the_marginal_whatever_the_noise_above(x_tilde):
    """And neither y nor x_{T-1} is scaled. Of data with two modes; MALA's steps are long.

    Fails with the quadratic term kept at the top, and with x divided by a_T there.
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


def test_a_chain_that_is_stopped_goes_on_as_if_it_had_not_been():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(4))
    x_tilde, t = jax.random.normal(jax.random.key(1), (4, 3)), jnp.array([0, 2, 4, 5])

    def run(position, first, last):
        return ladder.run_chain(
            keys, LANGEVIN, lambda y: gaussian(y, t), position, t, jnp.arange(first, last)
        )[0]

    whole = run(x_tilde, 0, 9)
    np.testing.assert_allclose(run(run(x_tilde, 0, 4), 4, 9), whole, rtol=1e-6)
    assert np.abs(run(run(x_tilde, 0, 4), 0, 5) - whole).max() > 0.01


COSTS = [(langevin, {}, (0, 4)), (normal_approximation, {}, (0, 4)), (mala, {}, (5, 5))]
COSTS.append((hmc, {"leapfrog": jnp.full(6, 3)}, (13, 13)))


@pytest.mark.parametrize(
    ("module", "tuning", "cost"), COSTS, ids=[m.__name__.split(".")[-1] for m, *_ in COSTS]
)
def test_a_chain_computes_no_density_and_no_gradient_that_it_does_not_use(module, tuning, cost):
    """Counted where they are computed, in 4 steps: of the value, and of the gradient.

    HMC's trajectories carry the value along; a network's is one sum more than its gradient.

    Fails with a gradient at Langevin's start, and where a step's log-density is summed up.
    """
    counted = collections.Counter()

    def counting(name, value):
        def count(value):
            counted[name] += 1
            return value

        return jax.pure_callback(count, jax.typeof(value), value)

    @jax.custom_vjp
    def half_square(y):
        return counting("value", -jnp.sum(y**2, axis=1) / 2)

    half_square.defvjp(
        lambda y: (half_square(y), y),
        lambda y, ct: (counting("gradient", -y * ct[:, None]),),
    )
    sampler = Sampler(module.init, module.kernel, {"step_size": S} | tuning, K=4)
    conditionals = Conditionals(lambda y, t: half_square(y), SCHEDULE, sampler)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(3))
    chain = jax.jit(lambda x: ladder.sample_conditional(keys, conditionals, x, jnp.arange(3)))
    jax.block_until_ready(chain(jnp.ones((3, 2))))
    assert (counted["value"], counted["gradient"]) == cost
