import jax
import jax.numpy as jnp
import numpy as np
from statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise, recovery
from drl_jax.mcmc import normal_approximation

SCHEDULE = diffusion.schedule(1000)


def F(y, t):
    """A quadratic log-density of precision 3 about 0.5."""
    return -1.5 * jnp.sum((y - 0.5) ** 2, axis=1)


def draw(t, x_tilde, n, noise_scale=1.0):
    keys = noise.example_keys(jax.random.key(t), jnp.arange(n))
    starts, ts = jnp.full((n, 1), x_tilde), jnp.full(n, t)

    def log_density_fn(y):
        return recovery.conditional_log_density(F, y, starts, ts, SCHEDULE)

    start = normal_approximation.init(starts, log_density_fn)
    state, _ = normal_approximation.kernel(
        keys, start, log_density_fn, SCHEDULE.sigma[ts + 1], noise_scale
    )
    return np.asarray(state.position)


def test_from_x_tilde_it_draws_the_papers_normal_distribution():
    """N(x_tilde + sigma² grad F(x_tilde), sigma² I), at the top too, where a is 0.

    Fails with the drift of a Langevin step (half of it), tried.
    """
    for t in (0, 30, 500, 998, 999):
        variance = float(SCHEDULE.sigma[t + 1]) ** 2
        mean = -0.8 + variance * -3 * (-0.8 - 0.5)
        y = draw(t, -0.8, n=100_000)
        assert_mean(y, mean, variance)
        assert_variance(y, mean, variance)


def test_its_error_falls_with_the_fourth_power_of_sigma():
    """The conditional of a quadratic F is normal: precision 3 + 1 / sigma².

    Its mean is x_tilde + sigma² grad F / (1 + 3 sigma²), which the approximation misses by
    3 sigma⁴ grad F to first order.
    """
    sigma2 = np.float64(SCHEDULE.sigma[1:1000]) ** 2
    gradient = -3 * (-0.8 - 0.5)
    exact = gradient * sigma2 / (1 + 3 * sigma2)
    approximate = np.array([draw(t, -0.8, 1, noise_scale=0.0)[0, 0] for t in (100, 900)]) + 0.8
    error = (approximate - exact[[100, 900]]) / (3 * gradient * sigma2[[100, 900]] ** 2)
    np.testing.assert_allclose(error, 1, rtol=0.1)
