import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.metropolis import (
    assert_gaussian_is_invariant,
    assert_samples_conditional,
    planar_conditional,
)

from drl_jax import noise
from drl_jax.mcmc import mala


@pytest.mark.slow
def test_gaussian_is_invariant_at_step_sizes_where_langevin_is_biased():
    """Chains that start in the distribution stay in it, for any step size.

    Fails if every proposal is accepted, if the acceptance counts half the kinetic energy, or if
    the gradient of a rejected proposal is kept.
    """
    assert_gaussian_is_invariant(mala.kernel)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "bimodal"])
def test_long_chains_have_the_moments_of_a_conditional_where_langevin_does_not(name):
    """Fails as above, and if the conditional's sigma is 2% off."""
    assert_samples_conditional(mala.kernel, name)


@pytest.mark.slow
def test_detailed_balance_holds_between_all_points_of_a_grid(monkeypatch):
    """p(y) q(y' | y) alpha(y, y') = p(y') q(y | y') alpha(y', y), and one of the alphas is 1.

    q is the density of a Langevin step. The noise is chosen so that the proposal is y'. Fails
    if the acceptance counts half the kinetic energy, leaves out q or takes a mean over
    dimensions for the sum, or if the drift is that of twice the step size.
    """
    with jax.enable_x64(True):
        side = np.linspace(-0.8, 1.0, 5)
        grid = np.stack(np.meshgrid(side, 0.9 * side), axis=-1).reshape(-1, 2)
        i, j = np.indices((25, 25)).reshape(2, -1)
        log_p, closed_form = planar_conditional(625)
        s = 0.5
        z = (grid[j] - grid[i] - s**2 / 2 * np.asarray(closed_form.score(grid))[i]) / s
        monkeypatch.setattr(noise, "normal", lambda keys, shape: jnp.asarray(z))
        keys = noise.example_keys(jax.random.key(0), jnp.arange(625))
        start = mala.init(jnp.asarray(grid[i]), log_p)
        state, info = mala.kernel(keys, start, log_p, jnp.full(625, s))
        expected = np.where(info.accepted[:, None], grid[j], grid[i])
        np.testing.assert_allclose(state.position, expected, atol=1e-12)
        alpha = np.asarray(info.acceptance).reshape(25, 25)
        log_q = -np.sum(z**2, axis=1).reshape(25, 25) / 2
        flow = np.exp(np.asarray(closed_form.log_density(grid))[:, None] + log_q) * alpha
        np.testing.assert_allclose(flow, flow.T, rtol=1e-9)
        np.testing.assert_allclose(np.maximum(alpha, alpha.T), 1)
        assert np.sum((alpha > 0.01) & (alpha < 0.9)) > 50
