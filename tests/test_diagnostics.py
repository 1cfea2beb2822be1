import numpy as np

from drl_jax.metrics import diagnostics


def test_independent_draws_have_an_effective_sample_size_near_their_number():
    draws = np.random.default_rng(0).normal(size=(40, 200, 3))
    found = diagnostics.convergence(draws, np.arange(40) % 10)
    assert found.draws == 8000
    assert 0.75 < found.effective_sample_size / 8000 < 1.2  # the worst of three scalars
    assert found.r_hat <= found.r_hat_worst < 1.05


def test_only_chains_on_the_same_distribution_are_compared():
    draws = np.random.default_rng(0).normal(size=(40, 200, 3))
    distribution = np.arange(40) % 10
    shifted = draws + 5 * distribution[:, None, None]
    assert diagnostics.convergence(shifted, distribution).r_hat_worst < 1.05
    assert diagnostics.convergence(shifted, 0 * distribution).r_hat > 2
    one_shifted = draws + 5 * (np.arange(40) == 7)[:, None, None]
    found = diagnostics.convergence(one_shifted, distribution)
    assert found.r_hat < 1.05
    assert found.r_hat_worst > 2


def test_the_worst_scalar_counts():
    draws = np.random.default_rng(0).normal(size=(4, 200, 3))
    draws[:2, :, 1] += 5
    found = diagnostics.convergence(draws, np.zeros(4, int))
    assert found.r_hat > 2
    assert found.effective_sample_size < 20


def test_r_hat_is_that_of_the_halves_of_the_chains():
    """Gelman et al. (2013), eqs. 11.1 to 11.4. Fails for whole chains, and for ranks."""
    chains, n = 6, 50
    rng = np.random.default_rng(0)
    trend = np.linspace(0, 2, n) * rng.normal(size=(chains, 1))
    draws = np.exp(rng.normal(size=(chains, n)) / 2 + trend)
    halves = draws.reshape(2 * chains, n // 2)
    between = n // 2 * np.var(halves.mean(axis=1), ddof=1)
    within = np.mean(np.var(halves, axis=1, ddof=1))
    expected = np.sqrt(((n // 2 - 1) / (n // 2) * within + between / (n // 2)) / within)
    found = diagnostics.convergence(draws[..., None], np.zeros(chains, int))
    np.testing.assert_allclose(found.r_hat, expected, rtol=1e-9)
    assert expected > 1.02


def test_the_effective_sample_size_is_that_of_the_mean_and_not_of_ranks():
    """Those of exp(2 y) are equal to those of y, but its autocorrelation is lower."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 400))
    for i in range(1, 400):
        y[:, i] = 0.8 * y[:, i - 1] + 0.6 * y[:, i]
    of_y, of_exp = (
        diagnostics.convergence(x[..., None], np.zeros(20, int)).effective_sample_size
        for x in (y, np.exp(2 * y))
    )
    assert of_exp > 1.3 * of_y


def test_chains_that_never_move_have_infinite_r_hat_and_no_effective_samples():
    """Wherever they stand, and even if another scalar changes."""
    different = np.ones((4, 10, 2)) * np.arange(4)[:, None, None]
    one_changes = different.copy()
    one_changes[..., 1] = np.random.default_rng(0).normal(size=(4, 10))
    for draws in (np.ones((4, 10, 2)), different, one_changes):
        found = diagnostics.convergence(draws, np.zeros(4, int))
        assert found.r_hat == np.inf
        assert found.effective_sample_size == 0


def test_too_few_draws_give_no_result():
    draws = np.random.default_rng(0).normal(size=(4, 4, 2))
    assert diagnostics.convergence(draws[:, :3], np.zeros(4, int)) is None
    assert np.isfinite(diagnostics.convergence(draws, np.zeros(4, int)).r_hat)


def ar1(r, chains, n):
    """Returns draws [chains, n, 2] of stationary processes whose autocorrelation is r^lag."""
    draws = np.random.default_rng(0).normal(size=(chains, n, 2))
    for i in range(1, n):
        draws[:, i] = r * draws[:, i - 1] + np.sqrt(1 - r**2) * draws[:, i]
    return draws


def test_draws_to_forget_are_the_lag_at_which_an_ar1_process_has_a_correlation_below_a_tenth():
    """0.7^6 = 0.118 and 0.7^7 = 0.082. The means of the distributions do not matter.

    Fails if the mean over all chains is subtracted, or the lag is off by one.
    """
    distribution = np.arange(400) % 100
    draws = ar1(0.7, 400, 400) + 5 * distribution[:, None, None]
    assert diagnostics.draws_to_forget(draws, distribution) == 7


def test_chains_in_different_modes_or_that_hardly_move_never_forget():
    distribution = np.arange(40) % 10
    modes = ar1(0.7, 40, 100) + 5 * (np.arange(40) < 20)[:, None, None]
    steps = np.random.default_rng(0).normal(size=(40, 200, 2))
    random_walk = np.cumsum(steps, axis=1)[:, 100:]
    for draws in (modes, random_walk, np.ones((40, 100, 2)), modes[:, :3]):
        assert diagnostics.draws_to_forget(draws, distribution) is None
