import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import normal_approximation


def data():
    return mixtures.mixture(
        np.array([0.3, 0.7]), np.array([[-0.6], [0.5]]), np.array([[[0.08]], [[0.15]]])
    )


def draw(keys, t, x_tilde, schedule, noise_scale=1.0):
    """Draws once from every x_tilde [B, D] at level t [B], with the exact energies."""
    F = mixtures.exact_F(data(), schedule)

    def log_density_fn(y):
        return recovery.conditional_log_density(F, y, x_tilde, t, schedule)

    start = normal_approximation.init(x_tilde, log_density_fn)
    sigma = schedule.sigma[t + 1]
    state, _ = normal_approximation.kernel(keys, start, log_density_fn, sigma, noise_scale)
    return state.position


def test_draws_from_x_tilde_have_the_moments_of_the_papers_normal_distribution():
    """N(x_tilde + sigma² grad F(x_tilde), sigma² I), also at the top, where a is 0.

    Fails if the drift is halved, as in a Langevin step, or sigma is 2% too large.
    """
    levels, n = (0, 30, 500, 998, 999), 200_000
    schedule = diffusion.schedule(1000)
    x_tilde = jnp.full((n, 1), -0.8)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    draws = jax.jit(lambda t: draw(noise.fold(keys, t), jnp.full(n, t), x_tilde, schedule))
    for t in levels:
        variance = float(schedule.sigma[t + 1]) ** 2
        score = mixtures.energy_marginal(data(), t, schedule).score(x_tilde[:1])[0, 0]
        y = np.asarray(draws(t))
        assert_mean(y, -0.8 + variance * float(score), variance, of=2 * len(levels))
        assert_variance(y, -0.8 + variance * float(score), variance, of=2 * len(levels))


@pytest.mark.slow
def test_divergence_from_the_conditional_is_of_fourth_order_in_sigma(monkeypatch):
    """KL -> sigma⁴ F''(x_tilde)² / 4 as sigma -> 0, by sums over a grid in float64.

    To first order, the conditional's variance is sigma² / (1 - sigma² F''). The means differ by
    sigma⁴ F' F'', which contributes only sigma⁶. The mean and standard deviation of the
    approximation are the kernel's draws for noise 0 and 1. F'' is not close to 0 at any of the
    x_tilde. Fails if the drift or the standard deviation is 1% off.
    """
    levels = np.unique(np.geomspace(1, 999, 25).astype(int)) - 1
    with jax.enable_x64(True):
        schedule = diffusion.schedule(1000)
        sigma = np.asarray(schedule.sigma[levels + 1])
        for x in (-0.9, -0.65, 0.8):
            t, x_tilde = jnp.asarray(levels), jnp.full((len(levels), 1), x)
            keys = noise.example_keys(jax.random.key(0), t)
            draws = []
            for z in (0.0, 1.0):
                monkeypatch.setattr(noise, "normal", lambda keys, shape, z=z: z)
                draws.append(np.asarray(draw(keys, t, x_tilde, schedule))[:, 0])
            mean, std = draws[0], draws[1] - draws[0]
            u, du = np.linspace(-9, 9, 2001, retstep=True)
            log_normal = -(u**2) / 2 - np.log(2 * np.pi) / 2 - np.log(std)[:, None]
            exact = mixtures.conditional(data(), x_tilde, t, schedule)
            y = jnp.asarray(mean[:, None] + std[:, None] * u)
            log_exact = jax.vmap(exact.log_density, 1, 1)(y[:, :, None])
            masses = np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi) * du
            divergence = (log_normal - np.asarray(log_exact)) @ masses
            score = mixtures.energy_marginal(data(), t, schedule).score
            curvature = jax.grad(lambda y, score=score: score(y).sum())(x_tilde)[:, 0]
            scaled = divergence / (np.square(curvature) / 4)
            small = sigma < 0.03
            slope, _ = np.polyfit(np.log(sigma[small]), np.log(scaled[small]), 1)
            assert abs(slope - 4) < 0.015
            np.testing.assert_allclose(scaled / sigma**4, 1, atol=0.03)
            np.testing.assert_allclose(scaled[0] / sigma[0] ** 4, 1, atol=0.003)
