"""The log-density of a level as a function for other libraries, and BlackJAX's NUTS on it."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact
from helpers.statistical import RATE, limit
from scipy import stats

import drl_jax
from drl_jax import noise
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.mcmc import mala
from drl_jax.metrics import diagnostics

STEP_SIZE = 0.013  # of both samplers on the digits; MALA then accepts 63% of its proposals
MOONS = mixtures.PLANAR_SHAPES["moons"]()


def nuts(log_density, key, starts, num_steps, step_size):
    """Returns the positions of NUTS [chains, steps, *D]."""
    sampler = blackjax.nuts(log_density, step_size, jnp.ones(starts[0].size))

    def chain(key, start):
        def step(state, key):
            state, _ = sampler.step(key, state)
            return state, state.position

        return jax.lax.scan(step, sampler.init(start), jax.random.split(key, num_steps))[1]

    keys = jax.random.split(key, len(starts))
    return np.asarray(jax.jit(jax.vmap(chain))(keys, starts), np.float64)


def langevin(log_density, key, starts, num_steps, step_size):
    """Returns the positions of MALA [chains, steps, *D]."""
    batched = jax.vmap(log_density)

    @jax.jit
    def run(keys, starts):
        sizes = jnp.full(len(starts), step_size)

        def step(state, k):
            state, _ = mala.kernel(noise.fold(keys, k), state, batched, sizes)
            return state, state.position

        return jax.lax.scan(step, mala.init(starts, batched), jnp.arange(num_steps))[1]

    positions = run(noise.example_keys(key, jnp.arange(len(starts))), starts)
    return np.asarray(positions, np.float64).swapaxes(0, 1)


def assert_equal_means(a, b):
    """Asserts that statistics [chains, S] of independent chains have equal means.

    If they have, this fails with a probability of 1e-6 (`helpers.statistical`).
    """
    variances = (a.var(axis=0, ddof=1) + b.var(axis=0, ddof=1)) / len(a)
    z = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(variances)
    assert np.abs(z).max() < limit(z.size), z


@pytest.mark.parametrize("t", [0, 3, 5, 6])
def test_it_is_the_log_density_of_the_data_at_a_level(t):
    """Fails if x is not scaled to y, or by the factor of another level."""
    model = exact.model(MOONS, 6, log_Z=2.0)
    x = jax.random.normal(jax.random.key(0), (5, 2))
    found = jax.vmap(model.log_density_fn(t))(x)
    expected = mixtures.marginal(MOONS, t, model.method.schedule)
    constant = 2.0 if t < 6 else 0.0
    tolerance = 1e-3 if t < 6 else 1e-2  # level 6 is white noise, of which a_bar is 0.006
    np.testing.assert_allclose(found - constant, expected.log_density(x), atol=tolerance)
    gradient = jax.jit(jax.grad(model.log_density_fn(t)))(x[0])
    np.testing.assert_allclose(gradient, expected.score(x[:1])[0], atol=0.02, rtol=1e-3)


def test_it_has_the_label_of_given_and_the_reference_of_the_digits():
    for name, model in (("mnist", lambda m: m.given(4)), ("digits", lambda m: m)):
        model = model(drl_jax.load(name, set_up_jax=False))
        x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *model.shape)), jnp.float32)
        a = model.method.schedule.y_scale(jnp.array(0))
        difference = model.log_density(a * x, np.zeros(2, int))
        found = jax.vmap(model.log_density_fn(0))(x)
        np.testing.assert_allclose(
            found[1] - found[0], difference[1] - difference[0], rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize("level", [-1, 7])
def test_a_level_that_does_not_exist_is_an_error(level):
    with pytest.raises(UserError, match="does not exist"):
        exact.model(MOONS, 6).log_density_fn(level)


def test_a_batch_or_integers_are_errors():
    log_density = exact.model(MOONS, 6).log_density_fn(0)
    with pytest.raises(UserError, match="1x3x2: give nx2"):
        log_density(jnp.zeros((3, 2)))
    with pytest.raises(UserError, match="int32"):
        log_density(jnp.zeros(2, int))


@pytest.mark.slow
def test_nuts_and_our_own_chains_leave_the_exact_density_unchanged():
    """Log-density and moments of 1,000 chains on moons, compared with exact samples.

    The chains start from exact samples, so that mixing does not matter. Fails if one of both
    samples at temperature 1.5.
    """
    model, n = exact.model(MOONS, 6), 1000
    level = mixtures.marginal(MOONS, 0, model.method.schedule)

    def draw(seed):
        keys = noise.example_keys(jax.random.key(seed), jnp.arange(n))
        return level.sample(keys)

    def statistics(x):
        log_p = np.asarray(level.log_density(jnp.float32(x)))[:, None]
        return np.concatenate([log_p, x, x**2, x[:, :1] * x[:, 1:], x**4], axis=1)

    log_density, key = model.log_density_fn(0), jax.random.key(0)
    ends = np.float64(draw(1))
    for sampler, steps, step_size in ((nuts, 30, 0.1), (langevin, 200, 0.15)):
        x = sampler(log_density, key, draw(0), steps, step_size)
        found = diagnostics.convergence(x, np.zeros(n, int))
        assert found.effective_sample_size > n  # their starts alone count as n
        assert_equal_means(statistics(x[:, -1]), statistics(ends))


@pytest.mark.slow
def test_nuts_and_our_own_chains_agree_on_the_digits():
    """Log-density and six directions of level 0, from the same 16 samples of the model.

    The chains do not mix between digits, and even near a digit they mix slowly: R-hat over the
    two chains per sample is 1.5 for NUTS and 2.2 for MALA. So the averages over their second
    half are compared in pairs. A false alarm has a probability of 1e-6, if the averages have no
    bias that the samplers do not share. Fails if one of both samples at temperature 1.5.
    """
    model = drl_jax.load("digits", set_up_jax=False)
    log_density, key = model.log_density_fn(0), jax.random.key(0)
    starts = jnp.repeat(jnp.asarray(model.sample(key, 16)), 2, axis=0)
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 6)))[0]
    all_log_densities = jax.jit(jax.vmap(jax.vmap(log_density)))
    averages = []
    for sampler, steps, at_least in ((nuts, 200, 60), (langevin, 10_000, 30)):
        x = sampler(log_density, key, starts, steps, STEP_SIZE)[:, steps // 2 :: steps // 200]
        log_p = np.asarray(all_log_densities(jnp.float32(x)))[..., None]
        values = np.concatenate([log_p, x.reshape(*x.shape[:2], -1) @ directions], axis=-1)
        found = diagnostics.convergence(values, np.repeat(np.arange(16), 2))
        assert found.effective_sample_size > at_least
        averages.append(values.mean(axis=1).reshape(16, 2, -1).mean(axis=1))
    p_values = stats.ttest_rel(*averages, axis=0).pvalue
    assert p_values.min() > RATE / p_values.size, p_values
