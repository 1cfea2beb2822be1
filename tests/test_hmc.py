import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.conditionals import DATA, assert_moments, masses
from helpers.metropolis import (
    MEAN,
    VARIANCE,
    assert_gaussian_is_invariant,
    assert_samples_conditional,
    gaussian,
    planar_conditional,
    run,
)
from helpers.statistical import assert_mean

from drl_jax import noise
from drl_jax.mcmc import hmc

kernel = jax.jit(hmc.kernel, static_argnums=2)


@pytest.mark.slow
def test_gaussian_is_invariant_at_step_sizes_where_langevin_is_biased():
    """Chains that start in the distribution stay in it, for any step size.

    Fails if every proposal is accepted, if the acceptance counts half the kinetic energy, or if
    the gradient of a rejected proposal is kept.
    """
    assert_gaussian_is_invariant(hmc.kernel, leapfrog=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "bimodal"])
def test_long_chains_have_the_moments_of_a_conditional_where_langevin_does_not(name):
    """Fails as above, and if the conditional's sigma is 2% off."""
    assert_samples_conditional(hmc.kernel, name, leapfrog=3)


@pytest.mark.slow
def test_trajectories_are_reversible_and_satisfy_detailed_balance(monkeypatch):
    """(y, p) -> (y', p') follows the leapfrog's definition, and (y', -p') leads back to y.

    p(y) N(p) alpha is the same in both directions. Fails if the first momentum update is a full
    step, one leapfrog step is missing, the acceptance counts half the kinetic energy, the
    gradient at the start is used throughout, or the step size depends on y.
    """
    n, e, L = 200, 0.35, 4
    with jax.enable_x64(True):
        log_p, closed_form = planar_conditional(n)
        rng = np.random.default_rng(0)
        y, p = rng.normal(size=(2, n, 2))
        keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
        # Accepts every proposal, and makes steps of half the given size.
        monkeypatch.setattr(noise, "uniform", lambda keys: jnp.zeros(n))

        def propose(y, momentum):
            monkeypatch.setattr(noise, "normal", lambda keys, shape: jnp.asarray(momentum))
            start = hmc.init(jnp.asarray(y), log_p)
            state, info = hmc.kernel(keys, start, log_p, jnp.full(n, 2 * e), jnp.full(n, L))
            return np.asarray(state.position), np.asarray(info.acceptance)

        end, p_end = y, p
        for _ in range(L):
            p_end = p_end + e / 2 * np.asarray(closed_form.score(end))
            end = end + e * p_end
            p_end = p_end + e / 2 * np.asarray(closed_form.score(end))
        proposal, alpha = propose(y, p)
        np.testing.assert_allclose(proposal, end, atol=1e-10)
        reversed_proposal, reversed_alpha = propose(proposal, -p_end)
        np.testing.assert_allclose(reversed_proposal, y, atol=1e-10)

        def log_joint(y, p):
            return np.asarray(closed_form.log_density(y)) - np.sum(p**2, axis=1) / 2

        flow = np.exp(log_joint(y, p)) * alpha
        reversed_flow = np.exp(log_joint(end, p_end)) * reversed_alpha
        np.testing.assert_allclose(flow, reversed_flow, rtol=1e-9)
        np.testing.assert_allclose(np.maximum(alpha, reversed_alpha), 1)
        assert np.sum(np.minimum(alpha, reversed_alpha) < 0.95) > 50


@pytest.mark.slow
def test_trajectory_follows_the_exact_hamiltonian_flow_of_a_gaussian():
    """The exact flow is a rotation; the leapfrog's error is of second order in the step."""
    y = jax.random.normal(jax.random.key(1), (5, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(5))
    u = 0.5 + noise.uniform(noise.fold(keys, 2))
    step, L = 0.1 / u, jnp.full(5, 4)
    p = noise.normal(noise.fold(keys, 0), (2,))
    state, info = kernel(keys, hmc.init(y, gaussian), gaussian, step, L)
    assert np.all(info.accepted)
    angle = 0.4 / np.sqrt(VARIANCE)
    exact = MEAN + (y - MEAN) * np.cos(angle) + p * np.sqrt(VARIANCE) * np.sin(angle)
    np.testing.assert_allclose(state.position, exact, atol=0.01)


@pytest.mark.parametrize("turn", [np.pi / 2, 6.0])
def test_lengths_of_trajectories_vary_by_half_around_their_mean(turn):
    """On N(0, 1), a trajectory rotates (y, p) by turn * u, with u ~ U(0.5, 1.5).

    So the mean of y' given y is y E cos(turn u). This is 0 for a quarter turn, and 0.05 for
    the length of five steps of 1.2 standard deviations, with which trajectories without u
    return to their start, with cos(6) = 0.96. The leapfrog steps of this test are so short
    that they change the mean by less than a standard error. Fails without u, and for
    u ~ U(0.6, 1.4).
    """
    n, L = 100_000, 60
    start = np.ones((n, 1))
    y, info = run(
        lambda y: -(y[:, 0] ** 2) / 2, start, hmc.kernel, 1, step_size=turn / L, leapfrog=L
    )
    assert np.mean(info.accepted) > 0.999
    mean = (np.sin(1.5 * turn) - np.sin(0.5 * turn)) / turn
    assert_mean(y[:, 0], mean, 1 - mean**2)


def test_a_trajectory_of_one_step_is_not_random():
    """It is a Langevin step, as for MALA."""
    y = jax.random.normal(jax.random.key(1), (5, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(5))
    start = hmc.init(y, gaussian)
    state, info = kernel(keys, start, gaussian, jnp.full(5, 0.3), jnp.full(5, 1))
    assert np.all(info.accepted)
    z = noise.normal(noise.fold(keys, 0), (2,))
    proposal = y + 0.3**2 / 2 * start.gradient + 0.3 * z
    np.testing.assert_allclose(state.position, proposal, rtol=1e-5)


@pytest.mark.slow
def test_trajectories_of_random_length_leave_a_mixture_invariant():
    """Chains that start from exact samples keep the first four moments.

    Fails if the step size is longer where the density is higher.
    """
    n = 100_000
    data = DATA["bimodal"]()
    start = data.sample(noise.example_keys(jax.random.key(9), jnp.arange(n)))
    y, info = run(data.log_density, start, hmc.kernel, 5, step_size=0.25, leapfrog=3)
    assert 0.5 < np.mean(info.acceptance) < 0.95
    assert_moments(y[:, 0], masses(data))


@pytest.mark.slow
def test_each_chain_has_its_own_trajectory_length():
    y = jax.random.normal(jax.random.key(1), (3, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(3))
    start, step = hmc.init(y, gaussian), jnp.full(3, 0.2)
    mixed, _ = kernel(keys, start, gaussian, step, jnp.array([1, 4, 7]))
    assert len(np.unique(noise.uniform(noise.fold(keys, 2)))) == 3
    for i, L in enumerate((1, 4, 7)):
        alone, _ = kernel(keys, start, gaussian, step, jnp.full(3, L))
        np.testing.assert_allclose(mixed.position[i], alone.position[i], rtol=1e-5)


def test_proposals_with_a_log_density_that_is_not_finite_are_rejected():
    def cliff(y):
        return jnp.where(y[:, 0] > 0, jnp.nan, -(y[:, 0] ** 2))

    start = jnp.full((500, 1), -0.1)
    y, info = run(cliff, start, hmc.kernel, 5, step_size=0.5, leapfrog=1)
    assert np.all(y <= 0)
    assert 0.1 < np.mean(info.accepted) < 0.9


@pytest.mark.slow
def test_state_holds_the_log_density_and_gradient_at_its_position():
    y = jax.random.normal(jax.random.key(1), (50, 2))
    keys = noise.example_keys(jax.random.key(2), jnp.arange(50))
    step, L = jnp.full(50, 1.2), jnp.full(50, 1)
    state, info = kernel(keys, hmc.init(y, gaussian), gaussian, step, L)
    assert 0 < np.sum(info.accepted) < 50
    np.testing.assert_allclose(state.log_density, gaussian(state.position), rtol=1e-6)
    np.testing.assert_allclose(state.gradient, -(state.position - MEAN) / VARIANCE, rtol=1e-5)
    np.testing.assert_array_equal(state.position[~info.accepted], y[~info.accepted])
