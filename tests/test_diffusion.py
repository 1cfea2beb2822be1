import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statistical import assert_covariance, assert_mean, assert_variance

from drl_jax import diffusion
from drl_jax.errors import UserError

BETAS = np.linspace(1e-4, 0.02, 1000)


def test_t6_levels_are_runs_of_the_linear_schedule():
    schedule = diffusion.schedule(6)
    ends = (0, 100, 200, 300, 400, 500, 999)
    starts = (-1, *ends[:-1])
    a = [np.prod(np.sqrt(1 - BETAS[s + 1 : e + 1])) for s, e in zip(starts, ends, strict=True)]
    np.testing.assert_allclose(schedule.a, a, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma, np.sqrt(1 - np.square(a)), rtol=1e-6)
    np.testing.assert_allclose(schedule.a_bar, np.cumprod(a), rtol=1e-6)
    np.testing.assert_allclose(
        schedule.sigma, [0.01, 0.32368, 0.51650, 0.63221, 0.71324, 0.77337, 0.99974], atol=5e-6
    )


def test_t1k_gives_each_level_one_beta_and_ends_in_white_noise():
    schedule = diffusion.schedule(1000)
    assert schedule.T == 1000
    np.testing.assert_allclose(schedule.a[:-1], np.sqrt(1 - BETAS), rtol=1e-6)
    assert schedule.a[-1] == 0
    assert schedule.sigma[-1] == 1
    assert schedule.a_bar[-1] == 0


@pytest.mark.parametrize("T", [1, 2, 6, 11, 501, 1000])
def test_signal_and_noise_keep_unit_energy(T):
    schedule = diffusion.schedule(T)
    assert schedule.a.shape == (T + 1,)
    np.testing.assert_allclose(schedule.a**2 + schedule.sigma**2, 1, atol=2e-7)
    np.testing.assert_allclose(schedule.a_bar**2 + schedule.sigma_bar**2, 1, atol=2e-7)
    assert np.all(np.diff(schedule.sigma_bar) > 0)


@pytest.mark.parametrize("T", [-1, 0, 502, 999, 1001])
def test_levels_that_do_not_fit_on_the_schedule_are_refused(T):
    with pytest.raises(UserError, match=rf"T = {T} "):
        diffusion.schedule(T)


def test_y_is_not_scaled_at_the_top_level_which_is_the_marginal():
    schedule = diffusion.schedule(6)
    t = jnp.arange(6)
    np.testing.assert_array_equal(schedule.is_marginal(t), [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(schedule.a_y(t)[:5], schedule.a[1:6])
    assert schedule.a_y(t)[5] == 1


@pytest.mark.parametrize("T", [6, 1000])
def test_pairs_have_the_joint_moments_of_the_diffusion(T):
    """Every level of T6 and ten of T1k; broken by swapping sigma[t + 1] for sigma[t]."""
    schedule = diffusion.schedule(T)
    x, n = 0.7, 100_000
    keys = jax.random.split(jax.random.key(0), n)
    data = jnp.full((n, 1), x)
    sample = jax.jit(lambda t: diffusion.diffuse_pair(keys, data, jnp.full(n, t), schedule))
    for t in range(0, T, max(1, T // 10)):
        x_t, x_tilde = (np.asarray(v, np.float64)[:, 0] for v in sample(t))
        a_bar, v = np.float64(schedule.a_bar), np.float64(schedule.sigma_bar) ** 2
        assert_mean(x_t, a_bar[t] * x, v[t])
        assert_mean(x_tilde, a_bar[t + 1] * x, v[t + 1])
        assert_variance(x_t, a_bar[t] * x, v[t])
        assert_variance(x_tilde, a_bar[t + 1] * x, v[t + 1])
        assert_covariance(
            x_t - a_bar[t] * x,
            x_tilde - a_bar[t + 1] * x,
            schedule.a[t + 1] * v[t],
            v[t],
            v[t + 1],
        )


@pytest.mark.parametrize("T", [6, 1000])
def test_the_posterior_is_what_bayes_makes_of_the_pairs(T):
    """Regression of x_t on x_{t+1} in the joint normal distribution, in float64."""
    schedule = diffusion.schedule(T)
    t = jnp.unique(jnp.linspace(0, T - 1, 10).astype(int))
    x, x_next = 0.7, -0.4
    n = len(t)
    mean, std = diffusion.posterior(jnp.full((n, 1), x), jnp.full((n, 1), x_next), t, schedule)
    a, _, a_bar, sigma_bar = (np.float64(v) for v in jax.tree.leaves(schedule))
    t = np.asarray(t)
    slope = a[t + 1] * sigma_bar[t] ** 2 / sigma_bar[t + 1] ** 2
    expected = a_bar[t] * x + slope * (x_next - a_bar[t + 1] * x)
    np.testing.assert_allclose(mean[:, 0], expected, rtol=1e-5, atol=1e-6)
    variance = sigma_bar[t] ** 2 - slope * a[t + 1] * sigma_bar[t] ** 2
    np.testing.assert_allclose(std**2, variance, rtol=2e-4, atol=1e-7)
