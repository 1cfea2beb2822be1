import functools

import numpy as np
import pytest
import scipy.linalg
from helpers.fixtures import INCEPTION

from drl_jax.errors import UserError
from drl_jax.metrics import frechet


def fit_in_batches(x, size=32):
    """Fits a normal distribution to vectors that arrive in batches."""
    batches = (frechet.batch_moments(x[i : i + size]) for i in range(0, len(x), size))
    return frechet.to_normal(functools.reduce(frechet.merge, batches))


FITS = pytest.mark.parametrize("fit", [frechet.fit, fit_in_batches])


def with_exact_moments(mean, covariance, n, seed=0):
    """Returns n vectors whose sample mean and covariance are exactly the given ones."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


@FITS
def test_distance_of_axis_aligned_normals_has_its_closed_form(fit):
    a = with_exact_moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 50)
    b = with_exact_moments(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 4.0, 1.0]), 70, seed=1)
    assert frechet.frechet_distance(fit(a), fit(b)) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)


@FITS
def test_distance_agrees_with_scipys_matrix_square_root(fit):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(100, 8)), rng.normal(size=(120, 8)) @ rng.normal(size=(8, 8)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet.frechet_distance(fit(a), fit(b)) == pytest.approx(expected, rel=1e-8)


@FITS
def test_distance_of_features_equals_the_fid_of_torch_fidelity(fit):
    with np.load(INCEPTION / "metrics.npz") as metrics:
        a, b = fit(metrics["features_a"]), fit(metrics["features_b"])
        assert frechet.frechet_distance(a, b) == pytest.approx(metrics["fid"], rel=1e-6)


@FITS
def test_distance_to_itself_is_zero_even_with_fewer_vectors_than_dimensions(fit):
    x = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32)
    assert abs(frechet.frechet_distance(fit(x), fit(x))) < 1e-9
    assert frechet.frechet_distance(fit(x), fit(x + 1)) == pytest.approx(200, rel=1e-6)


def test_distance_between_halves_of_the_data_is_small_but_positive():
    """Even if they are sorted, as data sets by class are."""
    x = np.random.default_rng(0).normal(size=(2000, 5))
    assert 0 < frechet.split_half_distance(x) < 0.1
    assert frechet.split_half_distance(x[np.argsort(x[:, 0])]) < 0.1


def test_the_halves_of_the_data_are_disjoint_and_random():
    x = np.array([0.0, 1.0, 3.0, 7.0])[:, None]
    pairs = [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
    expected = [frechet.frechet_distance(*(frechet.fit(x[i]) for i in pair)) for pair in pairs]
    found = [frechet.split_half_distance(x, seed) for seed in range(20)]
    np.testing.assert_allclose(np.unique(np.round(found, 9)), np.sort(np.round(expected, 9)))


def shifted(n, d=5):
    """Returns vectors far from the origin, where E x² - (E x)² would lose all precision."""
    return (np.random.default_rng(0).normal(size=(n, d)) @ np.diag([1, 2, 3, 4, 5])) + 1e8


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_merged_moments_equal_those_of_all_vectors(size):
    x = shifted(1000)
    batches = [frechet.batch_moments(x[i : i + size]) for i in range(0, 1000, size)]
    total = functools.reduce(frechet.merge, batches, frechet.zero_moments(5))
    assert total.n == 1000
    np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-14)
    expected = np.cov(x, rowvar=False)
    np.testing.assert_allclose(
        frechet.covariance(total), expected, rtol=0, atol=1e-6 * expected.max()
    )


def test_the_order_of_merging_does_not_matter():
    x = np.random.default_rng(0).normal(size=(100, 4))
    a, b, c = (frechet.batch_moments(batch) for batch in np.split(x, [13, 20]))
    one = frechet.merge(frechet.merge(a, b), c)
    other = frechet.merge(c, frechet.merge(b, a))
    assert one.n == other.n
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12, atol=1e-12)


def test_moments_of_float32_vectors_are_summed_in_float64():
    x = shifted(500).astype(np.float32)
    total = frechet.merge(frechet.batch_moments(x[:200]), frechet.batch_moments(x[200:]))
    assert total.mean.dtype == total.scatter.dtype == np.float64
    np.testing.assert_allclose(total.mean, np.mean(np.float64(x), axis=0), rtol=1e-14)


def test_the_root_from_eigenvalues_reproduces_the_covariance():
    x = np.random.default_rng(0).normal(size=(30, 40))  # rank 29
    _, root = frechet.to_normal(frechet.batch_moments(x))
    np.testing.assert_allclose(root.T @ root, np.cov(x, rowvar=False), atol=1e-12)


@pytest.mark.parametrize(("smallest", "accepted"), [(-0.5e-10, True), (-2e-10, False)])
def test_negative_eigenvalues_are_accepted_only_within_the_tolerance(smallest, accepted):
    moments = frechet.Moments(11, np.zeros(2), np.diag([smallest, 1.0]) * 10)
    if accepted:
        _, root = frechet.to_normal(moments)
        np.testing.assert_allclose(root.T @ root, np.diag([0, 1]), atol=1e-9)
    else:
        with pytest.raises(ValueError, match="-2e-10 and 1"):
            frechet.to_normal(moments)


def test_a_single_image_is_rejected():
    with pytest.raises(UserError, match=r"number of images is 1.*at least 2"):
        frechet.to_normal(frechet.batch_moments(np.zeros((1, 3))))
