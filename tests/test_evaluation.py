import numpy as np
import pytest
import scipy.linalg

from drl_jax import evaluation


def with_exact_moments(mean, covariance, n, seed=0):
    """n vectors whose sample mean and covariance are exactly as given."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_axis_aligned_normals_has_its_closed_form():
    a = with_exact_moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 50)
    b = with_exact_moments(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 4.0, 1.0]), 70, seed=1)
    assert evaluation.frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(100, 8)), rng.normal(size=(120, 8)) @ rng.normal(size=(8, 8)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_vanishes_on_itself_also_with_few_vectors_of_many_dimensions():
    x = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32)
    assert abs(evaluation.frechet_distance(x, x)) < 1e-9
    assert evaluation.frechet_distance(x, x + 1) == pytest.approx(200, rel=1e-6)


def test_two_halves_of_the_data_are_near_but_not_the_same():
    x = np.random.default_rng(0).normal(size=(2000, 5))
    assert 0 < evaluation.split_half_distance(x) < 0.1


def test_pixel_metrics_say_distance_scale_and_range():
    data = np.random.default_rng(0).uniform(-1, 1, size=(500, 2, 2, 1))
    metrics = evaluation.pixel_metrics(data + 0.5, data)
    assert metrics["pixel_frechet"] == pytest.approx(4 * 0.25, rel=1e-6)
    assert metrics["pixel_frechet_of_data_halves"] < 0.1
    assert metrics["pixel_max"] == pytest.approx(1.5, abs=0.01)
    assert metrics["pixel_min"] == pytest.approx(-0.5, abs=0.01)
