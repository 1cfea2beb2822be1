"""Distances between samples and data, against closed forms; the tests are at fixed seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import limit
from scipy import stats

from drl_jax.data import mixtures
from drl_jax.metrics import distances
from drl_jax.metrics.plane import BANDWIDTHS


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def correlated(rho, seed, n):
    """Returns n vectors of two values with variance 1 and correlation rho."""
    return normal(seed, n, 2) @ np.linalg.cholesky([[1, rho], [rho, 1]]).T


@pytest.mark.parametrize("m", [1000, 700])
def test_the_sliced_distance_of_shifted_sets_is_the_mean_of_their_projected_shift(m):
    """W1 is |uᵀshift| along u, whose mean is |shift| 2 / pi in the plane.

    With 2,000 directions its standard error is 0.0155 of 2.24 times 1.4. The second set has
    every value 7 or 10 times, in whole or in part, so that both have equal distributions.
    """
    x = normal(0, 100, 2)
    shift = np.array([1.0, -2.0])
    found = distances.sliced_wasserstein(
        np.repeat(x, 10, axis=0), np.repeat(x, m // 100, axis=0) + shift, directions=2000
    )
    error = np.linalg.norm(shift) * np.sqrt((0.5 - (2 / np.pi) ** 2) / 2000)
    assert abs(found - np.linalg.norm(shift) * 2 / np.pi) < limit(2) * error


def test_the_sliced_distance_of_numbers_is_the_area_between_distribution_functions():
    """For {0, 1} and {0, 1, 5}: 1/6 on [0, 1] and 1/3 on [1, 5]."""
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [1.0], [5.0]])
    assert distances.sliced_wasserstein(x, y) == pytest.approx(1 / 6 + 4 / 3)


def test_the_energy_distance_averages_distances_over_different_vectors():
    """2 (3 + 2) / 2 - 1 - 0 for {0, 1} and {3, 3}. Fails for the V-statistic, with 1 / 2."""
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [3.0]])
    assert distances.energy_distance(x, y) == pytest.approx(4, abs=1e-6)
    assert np.isnan(distances.energy_distance(x[:1], y))


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_the_energy_distance_of_normal_distributions_is_unbiased(shift, monkeypatch):
    """For N(0, 1) and N(shift, 1): 2 E|N(shift, 2)| - 2 E|N(0, 2)|. In several chunks.

    Means of 400 estimates; the sets are small, so that a bias would show.
    """
    monkeypatch.setattr(distances, "CHUNK", 7)
    x, y = normal(1, 400, 5, 1), normal(2, 400, 8, 1) + shift
    found = [distances.energy_distance(*pair) for pair in zip(x, y, strict=True)]
    folded = 2 / np.sqrt(np.pi) * np.exp(-(shift**2) / 4) + shift * (
        1 - 2 * stats.norm.cdf(-shift / np.sqrt(2))
    )
    expected = 2 * folded - 4 / np.sqrt(np.pi)
    assert abs(np.mean(found) - expected) < limit(3) * stats.sem(found)


def test_squared_distances_are_exact_far_from_the_origin():
    x, y = 1e6 + normal(1, 6, 3), 1e6 + normal(2, 4, 3)
    found = np.concatenate(list(distances.squared_distances(x, y)))
    expected = np.sum((x[:, None] - y) ** 2, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_classifier_does_not_separate_equal_distributions():
    """Of 1,600 vectors, 800 are expected to be assigned to their set.

    The vectors of a fold are classified by the same network, so their errors are not quite
    independent: the spread is taken as 1.5 times that of independent ones.
    """
    found = [
        distances.c2st_accuracy(normal(seed, 200, 5), normal(100 + seed, 200, 5))
        for seed in range(4)
    ]
    assert abs(np.mean(found) - 0.5) < limit(1) * 1.5 * np.sqrt(0.25 / 1600)


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda x: x + np.eye(13)[0], 0.6),  # one value is shifted by its standard deviation
        (lambda x: np.stack([np.roll(v, j) for j, v in enumerate(x.T)], axis=1), 0.7),
    ],
    ids=["shifted", "decorrelated"],
)
def test_a_classifier_separates_different_distributions(change, least):
    """The best accuracy for the shift is 0.69; 0.6 is 5 standard errors above 1/2."""
    mixing = np.eye(13) + 0.5
    x, y = normal(1, 400, 13) @ mixing, normal(2, 300, 13) @ mixing
    wrong = change(x / y.std(axis=0))
    assert distances.c2st_accuracy(wrong, y / y.std(axis=0)) > least


def test_errors_of_correlations_are_those_of_known_matrices(monkeypatch):
    """Correlations 0.8 and 0.2 of the first and the last feature: off by 0.6, others by 0.

    The root mean square over the six pairs is 0.6 sqrt(2 / 6). With 40,000 vectors the standard
    error of a correlation is at most 0.005.
    """
    monkeypatch.setattr(distances, "BLOCK", 2)
    n = 40_000
    x, y = (
        np.insert(correlated(rho, i, n), 1, normal(9 + i, n), axis=1)
        for i, rho in enumerate((0.8, 0.2))
    )
    rms, largest = distances.correlation_errors(5 + 3 * x, y)
    assert largest == pytest.approx(0.6, abs=limit(2) * 0.007)
    assert rms == pytest.approx(0.6 / np.sqrt(3), abs=limit(2) * 0.007)
    assert distances.correlation_errors(x, x) == (0, 0)
    assert np.isnan(distances.correlation_errors(x[:, :1], y[:, :1])).all()


def test_distances_do_not_depend_on_the_units_of_the_data():
    x, y = normal(1, 60, 4, 2), normal(2, 40, 4, 2)
    scale = 10.0 ** np.arange(8).reshape(4, 2)
    found, scaled = distances.compare(x, y), distances.compare(x * scale - 7, y * scale - 7)
    assert found.keys() == scaled.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, scaled[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_errors_of_mean_and_std_are_in_standard_deviations_of_the_data():
    y = 3 * normal(2, 50, 4, 2)
    wrong = y.mean(axis=0) + 1.5 * (y - y.mean(axis=0)) + 2 * y.std(axis=0)
    found = distances.compare(wrong, y)
    np.testing.assert_allclose(found["error_of_mean"], np.full((4, 2), 2), rtol=1e-9)
    np.testing.assert_allclose(found["error_of_std"], np.full((4, 2), 0.5), rtol=1e-9)


def test_halves_of_the_data_show_what_is_due_to_chance():
    """The samples are wrong, the halves differ by chance. Fails if they are exchanged."""
    y = normal(1, 200, 6)
    found = distances.compare(0.5 * normal(2, 200, 6), y)
    for name in ("sliced_wasserstein", "energy_distance", "c2st_accuracy"):
        assert found[name] > found[f"{name}_of_data_halves"]
    assert abs(found["c2st_accuracy_of_data_halves"] - 0.5) < 0.2
    assert abs(found["energy_distance_of_data_halves"]) < 0.1


def test_four_examples_are_enough_for_all_numbers_that_are_defined():
    """Of the halves, the classifier has too few. A constant feature is no error."""
    found = distances.compare(normal(1, 4, 3), np.ones((4, 3)))
    assert {name for name, value in found.items() if np.isnan(value).any()} == {
        "c2st_accuracy",
        "c2st_accuracy_of_data_halves",
    }


def draws(n, seed, std=0.12):
    """Draws n points of the eight blobs, with this width."""
    blobs = mixtures.PLANAR_SHAPES["blobs"]()
    blobs = blobs._replace(variances=jnp.full_like(blobs.variances, std**2))
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(jax.jit(blobs.sample)(keys))


def test_the_rate_of_false_alarms_is_the_significance_level():
    """Of 400 tests at level 0.1, 40 ± 6 are expected to reject."""
    n, tests, alpha = 40, 400, 0.1
    x = draws(2 * n * tests, seed=0).reshape(tests, 2, n, 2)
    rng = np.random.default_rng(0)
    p = np.array([distances.two_sample_test(rng, *pair, 99, BANDWIDTHS) for pair in x])
    assert p.min() >= 0.01
    spread = np.sqrt(tests * alpha * (1 - alpha))
    assert abs(np.sum(p <= alpha) - tests * alpha) < limit(2) * spread
    assert abs(np.mean(p) - 0.5) < limit(2) / np.sqrt(12 * tests)


def test_two_points_are_no_evidence_of_different_distributions():
    """There are only two partitions, with equal statistics. Fails if a tie does not count."""
    x, y = np.zeros((1, 2)), np.array([[0.3, 2.0]])
    assert distances.two_sample_test(np.random.default_rng(0), x, y, 99) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + np.float32([0.06, 0]),
        lambda x: x * np.float32(1.1),
        lambda x: np.where(x[:, :1] > 0.6, -x, x),  # one blob is missing
        lambda x: draws(len(x), 1, std=0.18),
    ],
    ids=["shifted", "larger", "missing", "wider"],
)
def test_a_wrong_sampler_is_detected(change):
    rng = np.random.default_rng(0)
    x, y = change(draws(1000, 1)), draws(1000, 2)
    assert distances.two_sample_test(rng, x, y, bandwidths=BANDWIDTHS) <= 0.01


@pytest.mark.parametrize("scale", [1, 100], ids=str)
def test_in_more_dimensions_the_kernels_follow_the_scale_of_the_data(scale):
    """Equal distributions are rejected with probability 0.01. Fails with `BANDWIDTHS`.

    One of 20 values has another standard deviation in the wrong sample.
    """
    x, y = scale * np.random.default_rng(1).normal(size=(2, 500, 20))
    wrong = x * np.where(np.arange(20), 1, 3)
    p_equal, p_wrong = (
        distances.two_sample_test(np.random.default_rng(0), z, y) for z in (x, wrong)
    )
    assert p_equal > 0.01
    assert p_wrong <= 0.01
