import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import limit

from drl_jax import diffusion, noise
from drl_jax.errors import UserError

BETAS = np.linspace(1e-4, 0.02, 1000)


def exact(T):
    """Returns a, sigma, a_bar, sigma_bar of T6 or T1k by definition: products of 1 - beta."""
    ends = np.arange(1001) if T == 1000 else np.array([0, 100, 200, 300, 400, 500, 999])
    keep = np.append(1 - BETAS, 0.0)
    runs = [keep[s:e] for s, e in zip([0, *(ends[:-1] + 1)], ends + 1, strict=True)]
    a_squared = np.array([np.prod(run) for run in runs])
    a_bar_squared = np.cumprod(keep)[ends]
    return [np.sqrt(v) for v in (a_squared, 1 - a_squared, a_bar_squared, 1 - a_bar_squared)]


@pytest.mark.parametrize("T", [6, 1000])
def test_schedules_of_the_paper_equal_products_over_the_betas_to_the_last_digit(T):
    """Tests float32 and float64.

    Fails if a level of T6 starts one beta late, if sigma is computed from a in float32, or if
    the last beta is 0.02 instead of 1.
    """
    names = ("a", "sigma", "a_bar", "sigma_bar")
    for name, expected in zip(names, exact(T), strict=True):
        found = getattr(diffusion.schedule(T), name)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=0, err_msg=name)
        with jax.enable_x64(True):
            found = getattr(diffusion.schedule(T), name)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=name)


def test_sigmas_of_t6_are_those_of_the_authors_program():
    published = [0.01, 0.32368, 0.51650, 0.63221, 0.71324, 0.77337, 0.99974]
    np.testing.assert_allclose(diffusion.schedule(6).sigma, published, atol=5e-6)


def test_t1k_ends_in_white_noise():
    schedule = diffusion.schedule(1000)
    assert schedule.T == 1000
    assert schedule.a[-1] == schedule.a_bar[-1] == 0
    assert schedule.sigma[-1] == schedule.sigma_bar[-1] == 1


def test_cosine_schedule_has_the_noise_levels_of_cdrl():
    published = [0.0074, 0.252, 0.482, 0.682, 0.840, 0.948, 0.997]
    schedule = diffusion.schedule(6, "cosine")
    np.testing.assert_allclose(schedule.sigma_bar, published, atol=6e-4)


@pytest.mark.parametrize("T", [1, 6, 20, 502, 1000])
def test_cosine_schedule_has_the_log_snr_of_the_paper(T):
    """λ(u) = -2 log tan(A u + B), u = t / T; 9.8 at level 0 and -5.1 at level T.

    Fails if the angles end one level early, or A and B are exchanged.
    """
    with jax.enable_x64(True):
        _, _, a_bar, sigma_bar = jax.tree.leaves(diffusion.schedule(T, "cosine"))
    B = np.arctan(np.exp(-9.8 / 2))
    A = np.arctan(np.exp(5.1 / 2)) - B
    log_snr = -2 * np.log(np.tan(A * np.arange(T + 1) / T + B))
    assert (log_snr[0], log_snr[-1]) == pytest.approx((9.8, -5.1))
    np.testing.assert_allclose(a_bar**2, 1 / (1 + np.exp(-log_snr)), rtol=1e-9)
    np.testing.assert_allclose(sigma_bar**2, 1 / (1 + np.exp(log_snr)), rtol=1e-9)


@pytest.mark.parametrize(
    ("T", "name"),
    [(T, "linear") for T in (1, 2, 6, 11, 501, 1000)] + [(T, "cosine") for T in (1, 20, 1000)],
)
def test_squares_of_signal_and_noise_factors_sum_to_one_and_noise_increases(T, name):
    schedule = diffusion.schedule(T, name)
    assert schedule.a.shape == (T + 1,)
    np.testing.assert_allclose(schedule.a**2 + schedule.sigma**2, 1, atol=2e-7)
    np.testing.assert_allclose(schedule.a_bar**2 + schedule.sigma_bar**2, 1, atol=2e-7)
    assert np.all(np.diff(schedule.sigma_bar) > 0)
    np.testing.assert_allclose(np.cumprod(schedule.a), schedule.a_bar, atol=1e-5)


@pytest.mark.parametrize("T", [-1, 0, 502, 999, 1001])
def test_numbers_of_levels_that_do_not_fit_the_betas_raise(T):
    with pytest.raises(UserError, match=rf"T = {T} "):
        diffusion.schedule(T)


def test_schedules_that_do_not_exist_raise():
    with pytest.raises(UserError, match=r"'sigmoid' .* 'linear' or 'cosine'"):
        diffusion.schedule(6, "sigmoid")
    with pytest.raises(UserError, match="T = 0 "):
        diffusion.schedule(0, "cosine")


def test_top_level_is_the_marginal_with_unscaled_y():
    schedule = diffusion.schedule(6)
    t = jnp.arange(6)
    np.testing.assert_array_equal(schedule.is_marginal(t), [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(schedule.y_scale(t)[:5], schedule.a[1:6])
    assert schedule.y_scale(t)[5] == 1


@pytest.mark.slow
@pytest.mark.parametrize("T", [6, 1000])
def test_pairs_have_the_joint_moments_of_the_diffusion_at_every_level(T):
    """The noise in x_t and in x_{t+1} - a x_t is standard normal and uncorrelated.

    This implies the moments of x_{t+1}. At 1000 levels it is also more sensitive than they are,
    since sigma_{t+1} is small compared with sigma_bar_{t+1}. Fails if sigma is 2% too large in
    `step`, sigma_bar or a_bar 2% too large in `diffuse`, a[t] is used for a[t + 1], both draws
    use the same eps, or the sign of a is flipped.
    """
    a, sigma, a_bar, sigma_bar = (jnp.asarray(v, jnp.float32) for v in exact(T))
    schedule = diffusion.schedule(T)
    x, B, D = 3.0, 500, 240  # 120,000 numbers per level
    keys = noise.example_keys(jax.random.key(0), jnp.arange(B))

    def moments(t):
        x_t, x_tilde = diffusion.diffuse_pair(
            noise.fold(keys, t), jnp.full((B, D), x), jnp.full(B, t), schedule
        )
        eps_bar = (x_t - a_bar[t] * x) / sigma_bar[t]
        eps = (x_tilde - a[t + 1] * x_t) / sigma[t + 1]
        pairs = (eps_bar, eps, eps_bar**2, eps**2, eps_bar * eps)
        return jnp.stack([jnp.mean(v) for v in pairs])

    found = np.asarray(jax.jit(lambda: jax.lax.map(moments, jnp.arange(T)))(), np.float64)
    z = (found - [0, 0, 1, 1, 0]) / np.sqrt(np.array([1, 1, 2, 2, 1]) / (B * D))
    assert np.max(np.abs(z)) < limit(z.size)


def test_both_levels_of_a_shared_noise_pair_have_the_same_standard_normal_noise():
    """The false-alarm rate is that of `limit`. Fails if a level has the scales of the other."""
    T, x, B, D = 6, 3.0, 2000, 60
    _, _, a_bar, sigma_bar = exact(T)
    keys = noise.example_keys(jax.random.key(0), jnp.arange(B))
    moments = []
    for t in range(T):
        pair = diffusion.shared_noise_pair(
            noise.fold(keys, t), jnp.full((B, D), x), jnp.full(B, t), diffusion.schedule(T)
        )
        eps, eps_next = (
            (np.float64(v) - a_bar[s] * x) / sigma_bar[s]
            for v, s in zip(pair, (t, t + 1), strict=True)
        )
        np.testing.assert_allclose(eps, eps_next, atol=1e-3 if t else 1e-2)
        moments.append([eps_next.mean(), (eps_next**2).mean()])
    z = (np.array(moments) - [0, 1]) / np.sqrt(np.array([1, 2]) / (B * D))
    assert np.max(np.abs(z)) < limit(z.size)


@pytest.mark.parametrize("T", [6, 1000])
def test_posterior_is_the_regression_of_x_t_on_x_next(T):
    """Compares with conditioning the joint normal distribution of the pair, in float64."""
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


@pytest.mark.parametrize(("T", "groups"), [(1, 1), (6, 6), (11, 10), (1000, 10)])
def test_levels_form_at_most_ten_groups_of_neighbours(T, groups):
    found = diffusion.level_groups(T)
    assert [t for group in found for t in group] == list(range(T))
    assert len(found) == groups
    for g, levels in enumerate(found):  # as the training step computes the group of a level
        assert {t * groups // T for t in levels} == {g}


@pytest.mark.parametrize(("T", "name"), [(6, "cosine"), (100, "cosine"), (1000, "linear")])
def test_conditioning_is_the_angle_between_signal_and_noise(T, name):
    """Zero for the data, 1000 for white noise, whatever the number of levels."""
    schedule = diffusion.schedule(T, name)
    angle = np.asarray(schedule.conditioning) * np.pi / 2000
    np.testing.assert_allclose(np.sin(angle), schedule.sigma_bar, atol=1e-5)
    np.testing.assert_allclose(np.cos(angle), schedule.a_bar, atol=1e-5)


def test_the_lowest_noise_of_the_cosine_schedule_can_be_chosen():
    """The highest stays the same, and the angles between them are evenly spaced."""
    usual, found = diffusion.schedule(20, "cosine"), diffusion.schedule(20, "cosine", 0.1)
    assert found.sigma_bar[0] == pytest.approx(0.1)
    assert found.a_bar[-1] == pytest.approx(usual.a_bar[-1])
    angles = np.arctan2(found.sigma_bar, found.a_bar)
    np.testing.assert_allclose(np.diff(angles), np.mean(np.diff(angles)), rtol=1e-3)


@pytest.mark.parametrize(("name", "T"), [("linear", 1000), ("cosine", 100)])
def test_thinned_schedules_have_the_noise_of_all_steps_between_their_levels(name, T):
    full = diffusion.schedule(T, name)
    half, levels = diffusion.thinned(full, T // 2)
    np.testing.assert_array_equal(levels, np.arange(0, T, 2))
    ends = np.append(levels, T)
    for field in ("a_bar", "sigma_bar"):
        np.testing.assert_array_equal(getattr(half, field), getattr(full, field)[ends])
    np.testing.assert_allclose(half.a**2 + half.sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(half.a[1:] * half.a_bar[:-1], half.a_bar[1:], rtol=2e-6)
    np.testing.assert_array_equal(diffusion.thinned(full, T)[0].sigma, full.sigma)
    some, levels = diffusion.thinned(full, 3)
    assert list(levels) == [0, round(T / 3), round(2 * T / 3)]
    assert some.T == 3
    for wrong in (0, T + 1):
        with pytest.raises(UserError, match=f"{wrong} noise levels are not among {T}"):
            diffusion.thinned(full, wrong)
