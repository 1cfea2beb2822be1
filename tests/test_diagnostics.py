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
    assert diagnostics.convergence(draws, np.zeros(4, int)).r_hat > 2


def test_chains_that_never_move_have_infinite_r_hat_and_no_effective_samples():
    found = diagnostics.convergence(np.ones((4, 10, 2)), np.zeros(4, int))
    assert found.r_hat == np.inf
    assert found.effective_sample_size == 0


def test_too_few_draws_give_no_result():
    draws = np.random.default_rng(0).normal(size=(4, 4, 2))
    assert diagnostics.convergence(draws[:, :3], np.zeros(4, int)) is None
    assert np.isfinite(diagnostics.convergence(draws, np.zeros(4, int)).r_hat)
