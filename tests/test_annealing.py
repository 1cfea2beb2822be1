"""The parts of a density against what is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from drl_jax import diffusion, noise
from drl_jax.data import mixtures
from drl_jax.sampling import annealing


def line():
    """Two bumps on a line, of unequal width."""
    one, two = np.array([[-0.6]]), np.array([[0.5]])
    bump = mixtures.isotropic(np.concatenate([one, two]), 0.1)
    return bump._replace(variances=jnp.array([[0.01], [0.04]]))


@pytest.mark.parametrize("T", [1, 6, 1000])
def test_every_level_is_a_density_of_x(T):
    """Also of the topmost two, where y is not scaled. Without D log a: fails."""
    schedule, data = diffusion.schedule(T), line()
    F = mixtures.exact_F(data, schedule)
    x = np.linspace(-7, 7, 28001)
    for t in np.unique(np.linspace(0, T, 12).astype(int)):
        log_q = annealing.level_log_density(
            F, jnp.asarray(x)[:, None], jnp.full(len(x), t), schedule
        )
        np.testing.assert_allclose(np.trapezoid(np.exp(log_q), x), 1, rtol=1e-5)
        if t < T:
            theirs = mixtures.marginal(data, t, schedule).log_density(jnp.asarray(x)[:, None])
            np.testing.assert_allclose(log_q, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("T", [1, 2, 6, 501, 1000])
def test_rungs_lead_from_white_noise_to_data_equally_far_apart(T):
    schedule = diffusion.schedule(T)
    level, beta = map(np.asarray, annealing.annealing_path(schedule, 200))
    assert (level[0], beta[0], level[-1], beta[-1]) == (T, 0, 0, 0)
    assert set(level) == set(range(T + 1))
    assert np.all(np.diff(level - beta) < 0)
    log_sigma_bar = np.log(np.float64(schedule.sigma_bar))
    steps = -np.diff(np.interp(level - beta, np.arange(T + 1), log_sigma_bar))
    total = log_sigma_bar[-1] - log_sigma_bar[0]
    assert np.max(steps) <= 1.5 * total / 200  # a level's gap is cut in whole rungs
    assert len(level) - 1 + T / 2 >= 200
    assert len(level) - 1 <= 200 + T


def test_a_rung_is_a_geometric_mean_of_two_levels():
    schedule = diffusion.schedule(6)
    F = mixtures.exact_F(line(), schedule)
    x = jax.random.normal(jax.random.key(0), (5, 1))

    def level(t):
        return annealing.level_log_density(F, x, jnp.full(5, t), schedule)

    for t, beta in ((6, 0.0), (6, 0.3), (3, 0.9), (1, 0.5), (0, 0.0)):
        found = annealing.intermediate_log_density(
            F, x, jnp.int32(t), jnp.float32(beta), schedule
        )
        expected = (1 - beta) * level(t) + beta * level(max(t - 1, 0))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_thousands_of_gains_are_summed_exactly():
    """Each of 1e4 nats, as of T6's level 0. In float32 the sum is off by tenths: fails."""
    rng = np.random.default_rng(0)
    gains = np.float32(1e4 * rng.standard_normal((50, 6000)))
    found = annealing.partition(gains, -gains)
    log_w = np.sum(np.float64(gains), axis=1)
    expected = np.max(log_w) + np.log(np.mean(np.exp(log_w - np.max(log_w))))
    np.testing.assert_allclose(found.lower.log_Z, expected, rtol=0, atol=1e-7)


def test_a_bounds_error_and_effective_sample_size_are_those_of_its_weights():
    rng = np.random.default_rng(0)
    n, s = 400, 0.7
    many = [annealing.bound(s * rng.standard_normal(n)) for _ in range(4000)]
    estimates, errors, sizes = np.array(
        [(b.log_Z, b.std_error, b.effective_sample_size) for b in many]
    ).T
    np.testing.assert_allclose(np.std(estimates), np.median(errors), rtol=0.06)
    np.testing.assert_allclose(np.median(sizes), n * np.exp(-(s**2)), rtol=0.03)
    equal = annealing.bound(np.full(50, -3.0))
    assert (equal.log_Z, equal.std_error) == (-3.0, 0.0)
    assert equal.effective_sample_size == pytest.approx(50)
    alone = annealing.bound(np.append(np.zeros(49), 1000.0))
    assert alone.effective_sample_size == 1
    assert not alone.meaningful
    assert alone.log_Z == pytest.approx(1000 - np.log(50))


@pytest.mark.parametrize("values", [2, 17, 256])
@pytest.mark.parametrize("dequantised", [False, True])
def test_a_uniform_pixels_bound_is_its_probability(values, dequantised):
    """If p(x_0) is what uniform pixels look like with the noise, the bound is tight: log 1/V.

    That density is written here by scipy, in float64.
    """
    schedule = diffusion.schedule(6)
    n = 2000
    keys = noise.example_keys(jax.random.key(0), jnp.arange(n))
    v = np.linspace(-1, 1, values)
    x = v[np.arange(n) % values][:, None]
    width = 2 / (values - 1) if dequantised else 0.0
    _, x_0 = annealing.noisy_log_density(
        keys, lambda y, t: jnp.zeros(len(y)), jnp.asarray(x, jnp.float32), width, schedule
    )
    a, sigma = float(schedule.a_bar[0]), float(schedule.sigma_bar[0])
    apart = np.float64(x_0) - a * v
    if dequantised:
        ends = (
            stats.norm.cdf((apart + a * width / 2) / sigma),
            stats.norm.cdf((apart - a * width / 2) / sigma),
        )
        each = (ends[0] - ends[1]) / (a * width)
    else:
        each = stats.norm.pdf(apart / sigma) / sigma
    log_p = np.log(np.mean(each, axis=1))
    total = log_p + annealing.log_volume(x_0, values, dequantised, schedule)
    np.testing.assert_allclose(total, -np.log(values), atol=2e-3)


@pytest.mark.parametrize("dequantised", [False, True])
def test_the_bounds_of_all_values_of_a_pixel_add_up_to_no_more_than_one(dequantised):
    """And to little less where the density is smooth: here normal."""
    values, schedule = 17, diffusion.schedule(6)
    v = np.repeat(np.linspace(-1, 1, values), 20_000)[:, None]
    keys = noise.example_keys(jax.random.key(0), jnp.arange(len(v)))
    width = 2 / (values - 1) if dequantised else 0.0
    x = jnp.asarray(v, jnp.float32)
    _, x_0 = annealing.noisy_log_density(
        keys, lambda y, t: jnp.zeros(len(y)), x, width, schedule
    )
    log_p = stats.norm.logpdf(np.float64(x_0)[:, 0], 0.1, 0.4)
    log_P = log_p + annealing.log_volume(x_0, values, dequantised, schedule)
    total = np.exp(log_P.reshape(values, -1).mean(axis=1)).sum()
    assert total < 1 + 1e-3
    # A smooth density wastes what lies between spikes, if the pixels are not spread out.
    assert total > (0.9 if dequantised else 0.15)
