"""HMC, and MALA, which is HMC of one leapfrog step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conditionals import assert_moments, exact, long_chain, masses, schedule
from helpers.statistical import assert_mean, assert_variance

from drl_jax import noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import hmc, langevin, mala

MEAN, VARIANCE = np.array([1.5, -0.5]), np.array([0.4, 2.0])
GAUSSIAN = mixtures.gaussian(MEAN, np.diag(VARIANCE))


def gaussian(y):
    return GAUSSIAN.log_density(y)


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
    start = GAUSSIAN.sample(noise.example_keys(jax.random.key(9), jnp.arange(n)))
    y, info = run(gaussian, start, kernel, 6, step_size=0.9, **tuning)
    assert 0.3 < np.mean(info.acceptance) < 0.95
    assert abs(np.mean(info.accepted) - np.mean(info.acceptance)) < 0.01
    assert_mean(y, MEAN, VARIANCE, of=2)
    assert_variance(y, MEAN, VARIANCE, of=2)


@pytest.mark.parametrize("name", ["normal", "bimodal"])
@pytest.mark.parametrize(("kernel", "tuning"), KERNELS, ids=["mala", "hmc"])
def test_long_chains_have_a_conditionals_moments_where_langevins_have_not(kernel, tuning, name):
    """The moments up to the fourth, from x_tilde on; the steps are as long as for Langevin.

    Fails if every proposal is accepted, with half the momentum's energy in the acceptance,
    with a gradient kept from a refused proposal, and with the conditional's sigma 2% off.
    """
    n, steps, s = 100_000, 150, 0.25
    p = masses(exact(name))
    y = long_chain(name, hmc.init, kernel, n, steps, step_size=s, **tuning)
    assert_moments(y, p)
    y = long_chain(name, langevin.init, langevin.kernel, n, steps, step_size=s)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_moments(y, p)


def in_the_plane(n):
    """A conditional of T6 in the plane: a function of n positions, and its closed form."""
    data = mixtures.PLANE["blobs"]()
    x_tilde, t = jnp.array([[0.2, -0.1]]), 2
    F = mixtures.exact_F(data, schedule())

    def log_density_fn(y):
        starts = jnp.broadcast_to(x_tilde, (n, 2))
        return recovery.conditional_log_density(F, y, starts, jnp.full(n, t), schedule())

    return log_density_fn, mixtures.conditional(data, x_tilde, t, schedule())


def test_mala_balances_every_pair_of_a_grid_of_proposals(monkeypatch):
    """p(y) q(y' | y) alpha(y, y') = p(y') q(y | y') alpha(y', y), and one of both alphas is 1.

    The noise is such that the proposal lands on the point wanted; q is the Langevin step's.
    Fails with half the momentum's energy in the acceptance, with q left out, with the mean
    over the dimensions for the sum, and with the drift of twice the step.
    """
    with jax.enable_x64(True):
        side = np.linspace(-0.8, 1.0, 5)
        grid = np.stack(np.meshgrid(side, 0.9 * side), axis=-1).reshape(-1, 2)
        i, j = np.indices((25, 25)).reshape(2, -1)
        log_p, closed = in_the_plane(625)
        s = 0.5
        z = (grid[j] - grid[i] - s**2 / 2 * np.asarray(closed.score(grid))[i]) / s
        monkeypatch.setattr(noise, "normal", lambda keys, shape: jnp.asarray(z))
        keys = noise.example_keys(jax.random.key(0), jnp.arange(625))
        start = hmc.init(jnp.asarray(grid[i]), log_p)
        state, info = mala.kernel(keys, start, log_p, jnp.full(625, s))
        expected = np.where(info.accepted[:, None], grid[j], grid[i])
        np.testing.assert_allclose(state.position, expected, atol=1e-12)
        alpha = np.asarray(info.acceptance).reshape(25, 25)
        log_q = -np.sum(z**2, axis=1).reshape(25, 25) / 2
        flow = np.exp(np.asarray(closed.log_density(grid))[:, None] + log_q) * alpha
        np.testing.assert_allclose(flow, flow.T, rtol=1e-9)
        np.testing.assert_allclose(np.maximum(alpha, alpha.T), 1)
        assert np.sum((alpha > 0.01) & (alpha < 0.9)) > 50


def test_a_trajectory_of_hmc_returns_when_its_momentum_is_reversed_and_balances(monkeypatch):
    """(y, p) -> (y', p') is by the leapfrog of the definition; (y', -p') leads back to y.

    The flow p(y) N(p) alpha of the one is that of the other. Fails with a full first kick of
    the momentum, one leapfrog step too few, half the momentum's energy in the acceptance, and
    the gradient of the start kept.
    """
    n, e, L = 200, 0.35, 4
    with jax.enable_x64(True):
        log_p, closed = in_the_plane(n)
        rng = np.random.default_rng(0)
        y, p = rng.normal(size=(2, n, 2))
        keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
        # So that every proposal is taken.
        monkeypatch.setattr(noise, "uniform", lambda keys: jnp.zeros(n))

        def run(y, momentum):
            monkeypatch.setattr(noise, "normal", lambda keys, shape: jnp.asarray(momentum))
            start = hmc.init(jnp.asarray(y), log_p)
            state, info = hmc.kernel(keys, start, log_p, jnp.full(n, e), jnp.full(n, L))
            return np.asarray(state.position), np.asarray(info.acceptance)

        end, p_end = y, p
        for _ in range(L):
            p_end = p_end + e / 2 * np.asarray(closed.score(end))
            end = end + e * p_end
            p_end = p_end + e / 2 * np.asarray(closed.score(end))
        there, alpha = run(y, p)
        np.testing.assert_allclose(there, end, atol=1e-10)
        back, alpha_back = run(there, -p_end)
        np.testing.assert_allclose(back, y, atol=1e-10)

        def log_joint(y, p):
            return np.asarray(closed.log_density(y)) - np.sum(p**2, axis=1) / 2

        flow = np.exp(log_joint(y, p)) * alpha
        np.testing.assert_allclose(flow, np.exp(log_joint(end, p_end)) * alpha_back, rtol=1e-9)
        np.testing.assert_allclose(np.maximum(alpha, alpha_back), 1)
        assert np.sum(np.minimum(alpha, alpha_back) < 0.95) > 50


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
