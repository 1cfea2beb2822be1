import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conditionals import (
    GRID,
    X_TILDE,
    assert_moments,
    exact,
    log_density_fn,
    long_chain,
    masses,
)
from helpers.statistical import assert_mean, assert_variance

from drl_jax import noise
from drl_jax.data import mixtures
from drl_jax.mcmc import langevin

MEAN, VARIANCE = 1.5, 0.4
log_density = mixtures.gaussian(np.array([MEAN]), np.array([[VARIANCE]])).log_density


def run(n, steps, s, start, noise_scale=1.0):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))

    def step(state, k):
        state, _ = langevin.kernel(noise.fold(keys, k), state, log_density, s, noise_scale)
        return state, None

    state = langevin.init(jnp.full((n, 1), start), log_density)
    return np.asarray(jax.lax.scan(step, state, jnp.arange(steps))[0].position)[:, 0]


def exact_moments(steps, s, start, noise_scale=1.0):
    """Returns the mean and variance after some steps on a Gaussian of variance v.

    There a Langevin step is y' = r y + (1 - r) mean + s z with r = 1 - s²/2v.
    """
    r = 1 - s**2 / (2 * VARIANCE)
    mean, variance = start, 0.0
    for _ in range(steps):
        mean, variance = r * mean + (1 - r) * MEAN, r**2 * variance + (noise_scale * s) ** 2
    return mean, variance


def test_every_step_has_the_exact_moments_on_a_gaussian():
    """Fails if the drift has s² for s²/2, or the step size is 2% too large."""
    n, s = 200_000, 0.5
    for steps in (1, 2, 5, 40):
        y = run(n, steps, jnp.full(n, s), start=-1.0)
        mean, variance = exact_moments(steps, s, start=-1.0)
        assert_mean(y, mean, variance, of=8)
        assert_variance(y, mean, variance, of=8)


def transitions(name, s):
    """Returns the transition matrix of a Langevin step on the grid, from row to column.

    Each row is N(drift, s²), where the drift is the kernel's step without noise.
    """
    n = len(GRID)
    log_p, keys = log_density_fn(name, n), jax.random.split(jax.random.key(0), n)
    state = langevin.init(jnp.asarray(GRID)[:, None], log_p)
    drifted, _ = langevin.kernel(keys, state, log_p, jnp.full(n, s), noise_scale=jnp.zeros(n))
    density = np.exp(-((GRID - np.asarray(drifted.position)) ** 2) / (2 * s**2))
    return density / density.sum(axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "bimodal"])
def test_stationary_bias_on_a_conditional_is_quadratic_in_the_step_size(name):
    """Tests the bias of E y² in the stationary distribution of the chain on a grid.

    Half the step size has a quarter of the bias, to first order. On a normal of variance v,
    E y² = v / (1 - s² / 4v) exactly. Fails if the drift is 2% too large, has s for s² or the
    wrong sign, or if the conditional's sigma is 2% off.
    """
    steps = np.array([0.08, 0.04, 0.02])
    with jax.enable_x64(True):
        p = masses(exact(name))
        stationary = [np.linalg.matrix_power(transitions(name, s), 2**18)[0] for s in steps]
        bias = (stationary - p) @ GRID**2
        np.testing.assert_allclose(bias[:-1] / bias[1:], 4, rtol=0.06)
        if name == "normal":
            v = float(exact(name).variances[0, 0, 0])
            np.testing.assert_allclose(bias, v / (1 - steps**2 / (4 * v)) - v, rtol=1e-5)
        else:  # the conditional has two modes
            assert np.sum((p[1:-1] > p[:-2]) & (p[1:-1] > p[2:])) == 2
            assert p[np.abs(GRID) < 0.2].min() < 0.5 * p[GRID < 0].max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "bimodal"])
def test_long_chains_on_a_conditional_have_the_moments_of_the_transition_matrix(name):
    """Tests chains from x_tilde, whose step is long enough to bias the moments.

    Fails if the noise or the drift is 2% too large, or the conditional's sigma is 2% off.
    """
    s, steps = 0.2, 250
    with jax.enable_x64(True):
        p, matrix = masses(exact(name)), transitions(name, s)
    start = np.argmin(np.abs(GRID - X_TILDE))
    y = long_chain(name, langevin.init, langevin.kernel, 100_000, steps, step_size=s)
    assert_moments(y, np.linalg.matrix_power(matrix, steps)[start])
    with pytest.raises(AssertionError, match="standard errors"):
        assert_moments(y, p)


def test_noise_scale_scales_only_the_noise():
    n, s = 100_000, 0.5
    y = run(n, 10, jnp.full(n, s), start=0.0, noise_scale=0.3)
    mean, variance = exact_moments(10, s, 0.0, noise_scale=0.3)
    assert_mean(y, mean, variance, of=2)
    assert_variance(y, mean, variance, of=2)


def test_langevin_without_noise_is_gradient_ascent():
    y = run(2, 3, jnp.array([0.1, 0.3]), start=0.0, noise_scale=0.0)
    expected = [exact_moments(3, s, 0.0)[0] for s in (0.1, 0.3)]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.slow
def test_info_holds_the_log_density_and_gradient_before_the_step():
    y = jnp.array([[0.0], [2.0]])
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2))
    _, info = langevin.kernel(
        keys, langevin.init(y, log_density), log_density, jnp.array([0.1, 0.1])
    )
    np.testing.assert_allclose(info.log_density, log_density(y), rtol=1e-6)
    np.testing.assert_allclose(info.gradient, -(y - MEAN) / VARIANCE, rtol=1e-6)
