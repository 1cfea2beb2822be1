import jax
import jax.numpy as jnp
import numpy as np
from statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise, recovery, sampling
from drl_jax.mcmc import langevin
from drl_jax.sampling import Sampler

SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-3
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
MEAN, VARIANCE, K = 0.4, 0.25, 8  # of the data; chain steps
LANGEVIN = Sampler(langevin.init, langevin.kernel, {"step_size": S}, K)


def marginal(t):
    """Mean and variance of y_t = a_{t+1} x_t for data N(MEAN, VARIANCE)."""
    a = SCHEDULE.a_y(t)
    v = SCHEDULE.a_bar[t] ** 2 * VARIANCE + SCHEDULE.sigma_bar[t] ** 2
    return a * SCHEDULE.a_bar[t] * MEAN, a**2 * v


def gaussian(y, t):
    """F of the true marginals: the log-density of y_t."""
    mean, variance = (noise.per_example(m, y) for m in marginal(t))
    return jnp.sum(-((y - mean) ** 2) / (2 * variance), axis=1)


def exact_ladder():
    """Mean and variance of every x_t that the ladder of finite chains gives.

    On a Gaussian each Langevin step is affine in (y, x_tilde), so y after K steps is
    alpha x_tilde + beta + noise.
    """
    mean, variance = 0.0, 1.0
    levels = []
    for t in reversed(range(6)):
        m, v = (float(x) for x in marginal(jnp.array(t)))
        s2, sigma2 = float(S[t]) ** 2, float(SCHEDULE.sigma[t + 1]) ** 2
        pull = 0.0 if t == 5 else 1 / sigma2
        alpha, beta, spread = 1.0, 0.0, 0.0
        r = 1 - s2 / 2 * (1 / v + pull)
        for _ in range(K):
            alpha = r * alpha + s2 / 2 * pull
            beta = r * beta + s2 / 2 * m / v
            spread = r**2 * spread + s2
        a = float(SCHEDULE.a_y(jnp.array(t)))
        mean, variance = (alpha * mean + beta) / a, (alpha**2 * variance + spread) / a**2
        levels.append((mean, variance))
    return levels[::-1]


def test_every_level_of_generation_has_its_exact_moments_on_gaussian_data():
    """Fails when x is not divided by a, when the top keeps the quadratic term, and when the
    levels are scanned upwards (each tried)."""
    n = 200_000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    descend = jax.jit(
        lambda x, top, bottom: sampling.descend(
            keys, gaussian, x, top, bottom, SCHEDULE, LANGEVIN
        )
    )
    x = sampling.white_noise(keys, (1,), SCHEDULE)
    for t, (mean, variance) in reversed(list(enumerate(exact_ladder()))):
        x = descend(x, t + 1, t)
        assert_mean(x[:, 0], mean, variance)
        assert_variance(x[:, 0], mean, variance)
    whole = sampling.generate(keys, gaussian, (1,), SCHEDULE, LANGEVIN)
    np.testing.assert_allclose(whole, x, rtol=1e-5, atol=1e-6)


def test_a_sample_depends_on_its_own_key_alone():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(10))
    many = sampling.generate(keys, gaussian, (3,), SCHEDULE, LANGEVIN)
    few = sampling.generate(keys[4:6], gaussian, (3,), SCHEDULE, LANGEVIN)
    np.testing.assert_allclose(many[4:6], few, rtol=1e-6)


def test_noise_scale_sharpens_samples():
    keys = noise.example_keys(jax.random.key(0), jnp.arange(2000))
    half = {"step_size": S, "noise_scale": jnp.full(6, 0.5)}
    sharp = sampling.generate(keys, gaussian, (1,), SCHEDULE, LANGEVIN._replace(tuning=half))
    plain = sampling.generate(keys, gaussian, (1,), SCHEDULE, LANGEVIN)
    assert np.var(sharp) < 0.8 * np.var(plain)
