import jax
import jax.numpy as jnp
import numpy as np
from statistical import assert_mean, assert_variance

from drl_jax import noise
from drl_jax.mcmc import langevin

MEAN, VARIANCE = 1.5, 0.4


def log_density(y):
    return -jnp.sum((y - MEAN) ** 2, axis=1) / (2 * VARIANCE)


def run(n, steps, s, start, noise_scale=1.0):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))

    def step(state, k):
        state, _ = langevin.kernel(noise.fold(keys, k), state, log_density, s, noise_scale)
        return state, None

    state = langevin.init(jnp.full((n, 1), start), log_density)
    return np.asarray(jax.lax.scan(step, state, jnp.arange(steps))[0].position)[:, 0]


def exact_moments(steps, s, start, noise_scale=1.0):
    """On a Gaussian, a Langevin step is y' = r y + (1 - r) mean + s z, r = 1 - s²/2v."""
    r = 1 - s**2 / (2 * VARIANCE)
    mean, variance = start, 0.0
    for _ in range(steps):
        mean, variance = r * mean + (1 - r) * MEAN, r**2 * variance + (noise_scale * s) ** 2
    return mean, variance


def test_every_step_has_the_exact_moments_on_a_gaussian():
    """Broken by s²/2 -> s² in the drift, and by a step size 2% too large: both fail."""
    n, s = 200_000, 0.5
    for steps in (1, 2, 5, 40):
        y = run(n, steps, jnp.full(n, s), start=-1.0)
        mean, variance = exact_moments(steps, s, start=-1.0)
        assert_mean(y, mean, variance)
        assert_variance(y, mean, variance)


def test_noise_scale_scales_the_noise_alone():
    n, s = 100_000, 0.5
    y = run(n, 10, jnp.full(n, s), start=0.0, noise_scale=0.3)
    mean, variance = exact_moments(10, s, 0.0, noise_scale=0.3)
    assert_mean(y, mean, variance)
    assert_variance(y, mean, variance)


def test_without_noise_it_climbs_the_gradient():
    y = run(2, 3, jnp.array([0.1, 0.3]), start=0.0, noise_scale=0.0)
    expected = [exact_moments(3, s, 0.0)[0] for s in (0.1, 0.3)]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_info_holds_the_log_density_and_gradient_before_the_step():
    y = jnp.array([[0.0], [2.0]])
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2))
    _, info = langevin.kernel(
        keys, langevin.init(y, log_density), log_density, jnp.array([0.1, 0.1])
    )
    np.testing.assert_allclose(info.log_density, log_density(y), rtol=1e-6)
    np.testing.assert_allclose(info.gradient, -(y - MEAN) / VARIANCE, rtol=1e-6)
