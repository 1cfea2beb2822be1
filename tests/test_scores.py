import numpy as np
import pytest
import scipy.special
from helpers.fixtures import INCEPTION
from helpers.statistical import assert_mean

from drl_jax.metrics import scores


def test_inception_score_equals_that_of_torch_fidelity():
    with np.load(INCEPTION / "metrics.npz") as metrics:
        mean, std = scores.inception_score(metrics["logits"])
        assert mean == pytest.approx(metrics["isc_mean"], rel=1e-6)
        assert std == pytest.approx(metrics["isc_std"], rel=1e-6)


def test_inception_score_is_the_number_of_classes_if_they_are_certain_and_equally_frequent():
    logits = 1e3 * np.eye(4)[np.arange(80) % 4]
    assert scores.inception_score(logits) == pytest.approx((4, 0))


def test_inception_score_of_equal_images_is_one():
    logits = np.tile(np.random.default_rng(0).normal(size=7), (50, 1))
    assert scores.inception_score(logits) == pytest.approx((1, 0))


def test_inception_score_of_fewer_images_than_splits_is_one():
    assert scores.inception_score(np.random.default_rng(0).normal(size=(3, 5))) == (1, 0)


def test_inception_score_is_invariant_to_a_constant_added_to_the_logits():
    logits = np.random.default_rng(0).normal(size=(100, 5))
    assert scores.inception_score(logits + 500) == pytest.approx(scores.inception_score(logits))


def test_the_mean_score_of_splits_is_below_the_score_of_all_images():
    """Each split sees fewer images, so its p(class) is closer to the single images'."""
    logits = np.random.default_rng(0).normal(size=(200, 50)) * 3
    mean, _ = scores.inception_score(logits)
    assert mean < 0.9 * scores.inception_score(logits, splits=1)[0]


def test_squared_mmd_equals_a_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(5, 4)) + 1

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    def mean_of_pairs(z):
        n = len(z)
        pairs = [k(z[i], z[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    across = np.mean([k(a, b) for a in x for b in y])
    expected = mean_of_pairs(x) + mean_of_pairs(y) - 2 * across
    assert scores.squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_squared_mmd_is_unbiased():
    """Its mean is zero for equal distributions, with samples so small that a bias would show.

    The test uses the mean and the variance of 2,000 estimates.
    """
    rng = np.random.default_rng(0)
    estimates = [
        scores.squared_mmd(rng.normal(size=(6, 3)), rng.normal(size=(4, 3)))
        for _ in range(2000)
    ]
    assert_mean(estimates, 0, np.var(estimates))
    assert min(estimates) < 0  # a biased estimate never is negative


def test_kernel_distance_of_shifted_normals_has_its_closed_form():
    """E k is a polynomial in the moments, here of N(0, 1) and N(m, 1) in one dimension.

    k = 1 + 3xy + 3x²y² + x³y³, so MMD² = 3 (E x - E y)² + 3 (E x² - E y²)² + (E x³ - E y³)².
    """
    m = 0.5
    expected = 3 * m**2 + 3 * (m**2) ** 2 + (m**3 + 3 * m) ** 2
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1)) + m
    mean, std = scores.kernel_distance(x, y, size=300)
    assert mean == pytest.approx(expected, rel=0.2)
    assert 0 < std < expected


def test_kernel_distance_draws_without_replacement():
    """All 50 vectors are in every subset, so the distances differ only by rounding."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    mean, std = scores.kernel_distance(x, y)
    assert mean == pytest.approx(scores.squared_mmd(x, y), rel=1e-9)
    assert std < 1e-12


def test_inception_score_agrees_with_scipys_softmax_and_relative_entropy():
    logits = np.random.default_rng(0).normal(size=(20, 6)) * 5
    p = scipy.special.softmax(logits, axis=1)
    divergence = np.sum(scipy.special.rel_entr(p, p.mean(axis=0)), axis=1)
    mean, _ = scores.inception_score(logits, splits=1)
    assert mean == pytest.approx(np.exp(divergence.mean()), rel=1e-12)
