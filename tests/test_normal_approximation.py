import jax
import jax.numpy as jnp
import numpy as np
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import normal_approximation


def data():
    return mixtures.mixture(
        np.array([0.3, 0.7]), np.array([[-0.6], [0.5]]), np.array([[[0.08]], [[0.15]]])
    )


def draw(keys, t, x_tilde, schedule, noise_scale=1.0):
    """One draw for every x_tilde [B, D] at its level t [B], with the exact energies."""
    F = mixtures.exact_F(data(), schedule)

    def log_density_fn(y):
        return recovery.conditional_log_density(F, y, x_tilde, t, schedule)

    start = normal_approximation.init(x_tilde, log_density_fn)
    sigma = schedule.sigma[t + 1]
    state, _ = normal_approximation.kernel(keys, start, log_density_fn, sigma, noise_scale)
    return state.position


def test_from_x_tilde_it_draws_the_papers_normal_distribution():
    """N(x_tilde + sigma² grad F(x_tilde), sigma² I), at the top too, where a is 0.

    Fails with the drift of a Langevin step (half of it), and with sigma 2% too large.
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


def test_its_divergence_from_the_conditional_falls_with_the_fourth_power_of_sigma(monkeypatch):
    """KL -> sigma⁴ F''(x_tilde)² / 4, over the sigmas of T1k, by sums over a grid in float64.

    The conditional's variance is sigma² / (1 - sigma² F'') to first order, and the means
    differ by sigma⁴ F' F'', which costs sigma⁶ only. The kernel says the normal's mean and
    width: its draws where the noise is 0 and 1. At none of the x_tilde is F'' ever near 0.
    Fails with the drift or the width 1% off.
    """
    levels = np.unique(np.geomspace(1, 999, 25).astype(int)) - 1
    with jax.enable_x64(True):
        schedule = diffusion.schedule(1000)
        sigma = np.asarray(schedule.sigma[levels + 1])
        for x in (-0.9, -0.65, 0.8):
            t, x_tilde = jnp.asarray(levels), jnp.full((len(levels), 1), x)
            keys = noise.example_keys(jax.random.key(0), t)
            ends = []
            for z in (0.0, 1.0):
                monkeypatch.setattr(noise, "normal", lambda keys, shape, z=z: z)
                ends.append(np.asarray(draw(keys, t, x_tilde, schedule))[:, 0])
            mean, width = ends[0], ends[1] - ends[0]
            u, du = np.linspace(-9, 9, 2001, retstep=True)
            log_normal = -(u**2) / 2 - np.log(2 * np.pi) / 2 - np.log(width)[:, None]
            exact = mixtures.conditional(data(), x_tilde, t, schedule)
            y = jnp.asarray(mean[:, None] + width[:, None] * u)
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
