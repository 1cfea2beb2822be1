from itertools import pairwise

import numpy as np
import pytest
from helpers.statistical import RATE
from scipy import stats

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


def test_r_hat_of_labels_adds_the_variances_of_the_indicators_of_the_classes():
    """Gelman et al. (2013), eqs. 11.1 to 11.4, with sums over the classes.

    Their ratio is that of probabilities of different labels, by counting pairs of draws. The
    first of an odd number of draws does not count.
    """
    n, rng = 60, np.random.default_rng(0)
    shares = np.array([[0.45, 0.45, 0.1]] * 3 + [[0.2, 0.2, 0.6]] * 3)
    labels = np.stack([rng.choice(3, size=n, p=p) for p in shares]).astype(float)
    halves = labels.reshape(12, n // 2)
    indicators = np.float64(halves == np.arange(3)[:, None, None])
    between = n // 2 * np.sum(np.var(indicators.mean(axis=2), axis=1, ddof=1))
    within = np.sum(np.mean(np.var(indicators, axis=2, ddof=1), axis=1))
    expected = np.sqrt(((n // 2 - 1) * within + between) / (n // 2 * within))
    changes = np.mean([sum(a != b for a, b in pairwise(row)) for row in labels])
    found = diagnostics.mixing(labels, np.zeros(6, int))
    assert found == (pytest.approx(expected), changes)
    same = np.mean([np.mean(half != half[:, None]) for half in halves])
    any_two = np.mean(labels.ravel() != labels.ravel()[:, None])
    assert 1.05 < found.label_r_hat == pytest.approx(np.sqrt(any_two / same), rel=0.01)
    odd = np.insert(labels, 0, 9.0, axis=1)
    assert diagnostics.mixing(odd, np.zeros(6, int)) == (found.label_r_hat, changes + 1)


def test_r_hat_of_independent_labels_is_close_to_one():
    """For n draws per half-chain and m half-chains, with K classes of equal probability,
    (R-hat² - (n - 1) / n) n is a chi-square variable with k = (m - 1) (K - 1) degrees of
    freedom, divided by k, if the shares of the classes are close to normal. So the test fails
    with probability RATE."""
    C, n, K = 100, 500, 10
    labels = np.random.default_rng(0).integers(K, size=(C, 2 * n)).astype(float)
    found = diagnostics.mixing(labels, np.zeros(C, int))
    k = (2 * C - 1) * (K - 1)
    low, high = stats.chi2.ppf([RATE / 2, 1 - RATE / 2], k) / k
    assert low < (found.label_r_hat**2 - (n - 1) / n) * n < high
    assert abs(found.label_r_hat - 1) < 0.001
    assert abs(found.label_changes / ((2 * n - 1) * (1 - 1 / K)) - 1) < 0.02


def test_chains_that_keep_their_labels_have_infinite_r_hat_unless_all_labels_agree():
    distribution = np.zeros(4, int)
    same = np.full((4, 20), 3.0)
    assert diagnostics.mixing(same, distribution) == (1.0, 0.0)
    differ = np.arange(4.0)[:, None] + np.zeros(20)
    assert diagnostics.mixing(differ, distribution) == (np.inf, 0.0)
    # Chains of other distributions may differ.
    pairs = np.repeat(differ, 2, axis=0), np.repeat(np.arange(4), 2)
    assert diagnostics.mixing(*pairs) == (1.0, 0.0)
    assert diagnostics.mixing(differ[:, :3], distribution) is None


def test_r_hat_of_labels_is_the_median_over_the_distributions():
    labels = np.zeros((6, 20))
    labels[1] = 1.0  # of three pairs, one disagrees
    assert diagnostics.mixing(labels, np.repeat(np.arange(3), 2)).label_r_hat == 1
    labels[3] = 1.0
    assert diagnostics.mixing(labels, np.repeat(np.arange(3), 2)).label_r_hat == np.inf


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
