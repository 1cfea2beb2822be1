"""HMC, and MALA, which is HMC of one leapfrog step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from statistical import assert_mean, assert_variance

from drl_jax import noise
from drl_jax.mcmc import hmc, mala

MEAN, VARIANCE = jnp.array([1.5, -0.5]), jnp.array([0.4, 2.0])


def gaussian(y):
    return -jnp.sum((y - MEAN) ** 2 / (2 * VARIANCE), axis=1)


def bimodal(y):
    """Two bumps of unequal weight, 0.3 and 0.7, at -1 and 1."""
    bump = -((y[:, 0, None] - jnp.array([-1.0, 1.0])) ** 2) / (2 * 0.5**2)
    return jax.nn.logsumexp(bump + jnp.log(jnp.array([0.3, 0.7])), axis=1)


def run(log_density, start, kernel, steps, seed=0, **tuning):
    n = len(start)
    keys = noise.example_keys(jax.random.key(seed), jnp.arange(n))
    tuning = {name: jnp.full(n, value) for name, value in tuning.items()}

    def step(state, k):
        return kernel(noise.fold(keys, k), state, log_density, **tuning)

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))
    state, info = run(hmc.init(jnp.asarray(start), log_density))
    return np.asarray(state.position), info


hmc_kernel = jax.jit(hmc.kernel, static_argnums=2)
mala_kernel = jax.jit(mala.kernel, static_argnums=2)

KERNELS = [(mala.kernel, {}), (hmc.kernel, {"leapfrog": 3})]


@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_a_gaussian_is_left_as_it_is_at_steps_where_langevin_would_be_biased(kernel, tuning):
    """Chains that start in the distribution stay in it, whatever the step.

    Fails (each tried) if every proposal is accepted, with half the momentum's energy in the
    acceptance, and with a gradient kept from a refused proposal.
    """
    n = 100_000
    start = MEAN + jnp.sqrt(VARIANCE) * jax.random.normal(jax.random.key(9), (n, 2))
    y, info = run(gaussian, start, kernel, 6, step_size=0.9, **tuning)
    assert 0.3 < np.mean(info.acceptance) < 0.95
    assert abs(np.mean(info.accepted) - np.mean(info.acceptance)) < 0.01
    assert_mean(y, np.asarray(MEAN), np.asarray(VARIANCE))
    assert_variance(y, np.asarray(MEAN), np.asarray(VARIANCE))


@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_a_bimodal_density_is_left_as_it_is(kernel, tuning):
    n = 100_000
    which, eps = jax.random.split(jax.random.key(3))
    signs = jnp.where(jax.random.bernoulli(which, 0.7, (n, 1)), 1.0, -1.0)
    start = signs + 0.5 * jax.random.normal(eps, (n, 1))
    y, _ = run(bimodal, start, kernel, 8, step_size=0.7, **tuning)
    for power in (1, 2, 3):
        moment, square = (
            integrate.quad(lambda v, p=p: v**p * float(density(v)), -5, 5)[0]
            for p in (power, 2 * power)
        )
        assert_mean(y**power, moment, square - moment**2)


def density(v):
    bumps = np.exp(-((v - np.array([-1, 1])) ** 2) / 0.5) * [0.3, 0.7]
    return bumps.sum() / (0.5 * np.sqrt(2 * np.pi))


def test_mala_accepts_by_the_ratio_of_densities_and_proposals():
    """p(y') q(y | y') / (p(y) q(y' | y)) of the Langevin proposal q, written out."""
    n, s = 1000, 0.8
    y = 2 * jax.random.normal(jax.random.key(1), (n, 1))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(n))
    _, info = mala_kernel(keys, hmc.init(y, bimodal), bimodal, jnp.full(n, s))

    def drifted(y):
        return y + s**2 / 2 * jax.grad(lambda y: bimodal(y).sum())(y)

    proposed = drifted(y) + s * noise.normal(noise.fold(keys, 0), (1,))
    forth = -jnp.sum((proposed - drifted(y)) ** 2, axis=1) / (2 * s**2)
    back = -jnp.sum((y - drifted(proposed)) ** 2, axis=1) / (2 * s**2)
    ratio = jnp.exp(bimodal(proposed) - bimodal(y) + back - forth)
    np.testing.assert_allclose(info.acceptance, jnp.minimum(ratio, 1), rtol=1e-4, atol=1e-6)
    assert np.mean(ratio < 1) > 0.2


def test_a_trajectory_follows_the_exact_flow():
    """On a Gaussian that is a rotation, and the leapfrog's error is of order e²."""
    y = jax.random.normal(jax.random.key(1), (5, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(5))
    small, L = jnp.full(5, 0.1), jnp.full(5, 4)
    p = noise.normal(noise.fold(keys, 0), (2,))
    state, info = hmc_kernel(keys, hmc.init(y, gaussian), gaussian, small, L)
    assert np.all(info.accepted)
    angle = 0.4 / np.sqrt(VARIANCE)
    exact = MEAN + (y - MEAN) * np.cos(angle) + p * np.sqrt(VARIANCE) * np.sin(angle)
    np.testing.assert_allclose(state.position, exact, atol=0.01)


def test_each_chain_has_its_own_length_of_trajectory():
    y = jax.random.normal(jax.random.key(1), (3, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(3))
    start, step = hmc.init(y, gaussian), jnp.full(3, 0.2)
    mixed, _ = hmc_kernel(keys, start, gaussian, step, jnp.array([1, 4, 7]))
    for i, L in enumerate((1, 4, 7)):
        alone, _ = hmc_kernel(keys, start, gaussian, step, jnp.full(3, L))
        np.testing.assert_allclose(mixed.position[i], alone.position[i], rtol=1e-5)


def test_what_is_not_finite_is_refused():
    def cliff(y):
        return jnp.where(y[:, 0] > 0, jnp.nan, -(y[:, 0] ** 2))

    start = jnp.full((500, 1), -0.1)
    y, info = run(cliff, start, mala.kernel, 5, step_size=0.5)
    assert np.all(y <= 0)
    assert 0.1 < np.mean(info.accepted) < 0.9


def test_the_state_holds_the_log_density_and_gradient_of_its_position():
    y = jax.random.normal(jax.random.key(1), (50, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(50))
    state, info = mala_kernel(keys, hmc.init(y, gaussian), gaussian, jnp.full(50, 1.2))
    assert 0 < np.sum(info.accepted) < 50
    np.testing.assert_allclose(state.log_density, gaussian(state.position), rtol=1e-6)
    np.testing.assert_allclose(state.gradient, -(state.position - MEAN) / VARIANCE, rtol=1e-5)
    np.testing.assert_array_equal(state.position[~info.accepted], y[~info.accepted])
