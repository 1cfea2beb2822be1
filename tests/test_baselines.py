"""Simple densities fitted to data, against SciPy's."""

import numpy as np
import pytest
from scipy import stats

from drl_jax.metrics import baselines, distances


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def two_blobs(seed, n):
    """Returns signals of three steps and one channel, of two equally probable kinds."""
    kinds = np.where(np.random.default_rng(seed).random(n) < 0.5, -4, 4)
    return kinds[:, None, None] + normal(seed + 1, n, 3, 1)


def test_the_gaussian_is_that_of_maximum_likelihood_in_the_units_of_the_data():
    """Fails if the density is that of the standardised features."""
    mixing = np.array([[3.0, 0, 0], [1, 0.1, 0], [0.5, 0.2, 10]])
    train, x = normal(1, 200, 3) @ mixing, normal(2, 50, 3) @ mixing
    found = baselines.log_densities(train, x)["gaussian"]
    exact = stats.multivariate_normal(train.mean(axis=0), np.cov(train.T, bias=True)).logpdf(x)
    assert found["log_density"] == pytest.approx(exact.mean(), rel=1e-4)
    assert found["std_error"] == pytest.approx(exact.std() / np.sqrt(50), rel=1e-4)


def test_the_kernel_density_is_that_of_scipy(monkeypatch):
    """SciPy's kernels have the covariance of the data times a factor: the identity here.

    In several chunks.
    """
    monkeypatch.setattr(distances, "CHUNK", 100)
    centres, x = normal(1, 40, 2), normal(2, 30, 2)
    centres = centres - centres.mean(axis=0)
    centres = centres @ np.linalg.inv(np.linalg.cholesky(np.cov(centres.T))).T
    exact = stats.gaussian_kde(centres.T, bw_method=0.3).logpdf(x.T)
    np.testing.assert_allclose(
        baselines.kernel_log_density(centres, x, 0.3), exact, rtol=1e-6, atol=1e-6
    )


def test_the_bandwidth_maximises_the_density_of_each_example_given_the_others(monkeypatch):
    """Fails if an example has a kernel of its own: the smallest bandwidth is then the best."""
    monkeypatch.setattr(distances, "CHUNK", 100)
    x = normal(1, 30, 2)
    scores = [
        np.mean(
            [
                baselines.kernel_log_density(np.delete(x, i, axis=0), x[i : i + 1], h)
                for i in range(len(x))
            ]
        )
        for h in baselines.BANDWIDTHS
    ]
    best = baselines.BANDWIDTHS[int(np.argmax(scores))]
    assert baselines.best_bandwidth(x) == best
    assert best not in (baselines.BANDWIDTHS[0], baselines.BANDWIDTHS[-1])


def test_the_number_of_components_is_that_of_the_data():
    """And the mixture has nearly the density of the data, which the Gaussian cannot have.

    The fit has 7 to 20 parameters, which cost about half a nat per 300 examples each. The
    standard error of the difference to the true log-density is much smaller.
    """
    x = two_blobs(5, 200)
    found = baselines.log_densities(two_blobs(1, 300), x)
    true = np.logaddexp(*(stats.norm(c).logpdf(x).sum(axis=(1, 2)) for c in (-4, 4))) - np.log(
        2
    )
    assert found["mixture"]["components"] == 2
    assert abs(found["mixture"]["log_density"] - true.mean()) < 0.1
    assert found["mixture"]["log_density"] > found["gaussian"]["log_density"] + 0.5
    assert found["mixture"]["log_density"] > found["kernel"]["log_density"]


def test_a_few_examples_are_enough():
    """The folds leave four examples for the fit, so there are at most four components."""
    found = baselines.log_densities(normal(1, 5, 2), normal(2, 3, 2))
    assert found["mixture"]["components"] <= 4
    assert np.isfinite([value["log_density"] for value in found.values()]).all()
