import numpy as np

from drl_jax.metrics import diagnostics


def test_independent_draws_are_worth_their_number():
    draws = np.random.default_rng(0).normal(size=(40, 200, 3))
    found = diagnostics.convergence(draws, np.arange(40) % 10)
    assert found.draws == 8000
    assert 0.75 < found.effective_sample_size / 8000 < 1.2  # the worst of three
    assert found.r_hat <= found.r_hat_worst < 1.05


def test_only_chains_of_one_distribution_are_compared():
    draws = np.random.default_rng(0).normal(size=(40, 200, 3))
    number = np.arange(40) % 10
    apart = draws + 5 * number[:, None, None]
    assert diagnostics.convergence(apart, number).r_hat_worst < 1.05
    assert diagnostics.convergence(apart, 0 * number).r_hat > 2
    one_astray = draws + 5 * (np.arange(40) == 7)[:, None, None]
    found = diagnostics.convergence(one_astray, number)
    assert found.r_hat < 1.05
    assert found.r_hat_worst > 2


def test_the_worst_scalar_speaks():
    draws = np.random.default_rng(0).normal(size=(4, 200, 3))
    draws[:2, :, 1] += 5
    assert diagnostics.convergence(draws, np.zeros(4)).r_hat > 2


def test_chains_that_never_move_have_not_converged():
    found = diagnostics.convergence(np.ones((4, 10, 2)), np.zeros(4))
    assert found.r_hat == np.inf
    assert found.effective_sample_size == 0


def test_too_few_draws_say_nothing():
    draws = np.random.default_rng(0).normal(size=(4, 4, 2))
    assert diagnostics.convergence(draws[:, :3], np.zeros(4)) is None
    assert np.isfinite(diagnostics.convergence(draws, np.zeros(4)).r_hat)
